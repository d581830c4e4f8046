"""The exported adapter under plain peft, and the word that it is not the whole model where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from tagi_ds.convert.peft_adapter import export_adapter
from tagi_ds.data.examples import Batch
from tests.conftest import MakeTagi

INSTRUCTION = "say the lamp again"
ALL = ["q", "k", "v", "o", "wi", "wo"]


@pytest.mark.parametrize("sites", [["q", "v"], ["k"], ALL], ids="-".join)
@pytest.mark.parametrize("head", ["tiny_folder", "tied_folder"])
def test_plain_peft_on_the_plain_backbone_gives_the_models_logits(
    sites: list[str],
    head: str,
    make_tagi: MakeTagi,
    tiny_batch: Batch,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    backbone = request.getfixturevalue(head)
    model = make_tagi(folder=backbone, sites=sites, fusion=False, concatenate=False)
    assert export_adapter(model, tiny_tokenizer, INSTRUCTION, tmp_path / "adapter") is None
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["task_type"]) == ("LORA", "SEQ_2_SEQ_LM")
    assert (settings["r"], settings["lora_alpha"]) == (4, 8.0)
    assert settings["base_model_name_or_path"] == str(backbone)
    plain = AutoModelForSeq2SeqLM.from_pretrained(backbone)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    inputs = {name: getattr(tiny_batch, name) for name in ("input_ids", "attention_mask", "labels")}
    ids = tiny_tokenizer(INSTRUCTION, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model(**inputs, instruction_ids=ids, instruction_attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(adapted(**inputs).logits, ours, atol=1e-5, rtol=1e-4)
        with adapted.disable_adapter():
            assert (adapted(**inputs).logits - ours).abs().max() > 1e-2
    assert "not the whole model" not in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        ({}, ("instruction fusion", "concatenation")),
        ({"fusion": False}, ("concatenation",)),
        ({"fusion": False, "concatenate": False, "also_train": "norms"}, ("also_train: norms",)),
    ],
)
def test_where_more_than_lora_is_at_work_the_export_says_so(
    settings: dict[str, object],
    lacks: tuple[str, ...],
    make_tagi: MakeTagi,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    model = make_tagi(**settings)
    note = export_adapter(model, tiny_tokenizer, model.compile_task(INSTRUCTION, tiny_tokenizer), tmp_path / "a")
    assert note is not None
    for words in ("not the whole model", "--convert.to compiled", *lacks):
        assert words in note
    card = (tmp_path / "a" / "README.md").read_text()
    assert note in card
    assert INSTRUCTION in card
