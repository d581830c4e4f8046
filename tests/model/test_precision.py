"""Answering in bfloat16: how it is chosen, what it weighs, and that its answers are those of its weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tagi_ds.answering import Answerer
from tagi_ds.data.collate import IGNORED
from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError
from tagi_ds.evaluation.ranking import choice_likelihoods
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone
from tagi_ds.model.compiled import CompiledTask
from tagi_ds.model.inference import Inference
from tagi_ds.model.precision import native_precision, require_room, weight_bytes
from tests.conftest import MakeTagi, model_inputs
from tests.convert.runs import write_folder

GPU = torch.device("cuda", 0)
NEW_TOKENS = 8
ROUNDING = 2**-8
"""Of a bfloat16, relative; a score is the sum of few roundings of this size at the model's widths."""


def in_both(model: TagiForConditionalGeneration, folder: Path) -> tuple[Any, Any]:
    """The model in bfloat16, and with these very weights in float32."""
    model.save_pretrained(folder)
    narrow = TagiForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    wide = TagiForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    return narrow, wide


def assert_likeliest(logits: Tensor, tokens: Tensor) -> None:
    """Every token (N, T) up to the end token is the likeliest by float32 scores (N, T, V), but for rounding."""
    counts = torch.cat([torch.ones_like(tokens[:, :1]), (tokens != 1).cumprod(1)[:, :-1]], dim=1).bool()
    behind = logits.max(-1).values - logits.gather(2, tokens[..., None])[..., 0]
    assert float(behind[counts].max()) <= 8 * ROUNDING * float(logits.abs().max())


def test_bf16_is_for_gpus_that_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        assert not including_emulation, "emulated it is slower than float32"
        return has_units

    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    has_units = True
    assert native_precision(GPU) == "bf16"
    assert native_precision(torch.device("cpu")) == "fp32"
    has_units = False
    assert native_precision(GPU) == "fp32"


@pytest.mark.parametrize("kind", ["tiny_folder", "tied_folder"])
def test_weights_are_reckoned_as_they_are_loaded(
    kind: str, make_tagi: MakeTagi, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    make_tagi(folder=folder).save_pretrained(tmp_path / "tagi")
    plain = load_backbone(folder, torch.bfloat16)
    whole = TagiForConditionalGeneration.from_pretrained(tmp_path / "tagi")
    assert weight_bytes([folder], "bf16") == sum(parameter.nbytes for parameter in plain.parameters())
    assert weight_bytes([tmp_path / "tagi"], "fp32") == sum(parameter.nbytes for parameter in whole.parameters())
    # Published pickles name the embeddings three times.
    (tmp_path / "pickle").mkdir()
    again = {f"{stack}.embed_tokens.weight": plain.shared.weight for stack in ("encoder", "decoder")}
    torch.save(dict(plain.named_parameters()) | again, tmp_path / "pickle" / "pytorch_model.bin")
    assert weight_bytes([tmp_path / "pickle"], "bf16") == weight_bytes([folder], "bf16")


def test_what_does_not_fit_is_refused_with_what_helps(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = weight_bytes([tiny_folder], "fp32")
    free = [0]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free[0], 10 * needed))
    require_room("m", [tiny_folder], "fp32", torch.device("cpu"))
    for free[0], narrower in ((needed - 1, True), (needed // 2 - 1, False)):
        with pytest.raises(UserError, match=r"^m has 0\.0 GB of weights in fp32, and 0\.0 of 0\.0 GB") as refused:
            require_room("m", [tiny_folder], "fp32", GPU)
        assert ("evaluation.precision bf16" in refused.value.mend) == narrower
        assert "GPUs with more memory" in refused.value.mend
    free[0] = needed // 2
    require_room("m", [tiny_folder], "bf16", GPU)


@pytest.mark.parametrize("settings", [{}, {"fusion": False, "concatenate": False}], ids=["tagi", "hypertuning"])
def test_answers_and_choices_are_those_of_the_weights(
    settings: dict[str, Any], make_tagi: MakeTagi, tiny_batch: Batch, tmp_path: Path
) -> None:
    narrow, wide = in_both(make_tagi(**settings), tmp_path)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    before = {name: parameter.clone() for name, parameter in narrow.named_parameters()}
    given = model_inputs(tiny_batch)
    labels = given.pop("labels")
    with Inference(narrow) as inference, torch.no_grad():
        answers = inference.generate(given, NEW_TOKENS)
        scores = wide(**given, decoder_input_ids=answers[:, :-1]).logits
        assert_likeliest(scores, answers[:, 1:])
        sums = choice_likelihoods(inference, tiny_batch, labels, torch.arange(5))
        expected = functional.cross_entropy(
            wide(**given, labels=labels).logits.mT, labels, ignore_index=IGNORED, reduction="none"
        ).sum(1)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(-sums, expected, rtol=8 * ROUNDING, atol=8 * ROUNDING)
    assert all(torch.equal(parameter, before[name]) for name, parameter in narrow.named_parameters())


def test_a_compiled_task_takes_on_the_type_of_the_model_that_reads_it(
    tiny_tagi: TagiForConditionalGeneration, tiny_batch: Batch, tmp_path: Path
) -> None:
    narrow, wide = in_both(tiny_tagi, tmp_path / "model")
    assert tiny_batch.instruction_ids is not None
    inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
    labels = tiny_batch.labels.clamp(min=0)
    for maker, reader in ((wide, narrow), (narrow, wide)):
        task = maker.compile_task(tiny_batch.instruction_ids[1:2])
        task.save(tmp_path / "task.safetensors")
        read = CompiledTask.load(tmp_path / "task.safetensors", reader)
        assert read.state.memory is not None
        assert read.state.memory.dtype == reader.dtype
        with torch.no_grad():
            ours = reader(**inputs, labels=labels, state=read.state).logits.float()
            own = maker(**inputs, labels=labels, state=task.state).logits.float()
        assert float((ours - own).norm() / own.norm()) < 8 * ROUNDING


def test_answering_asks_the_device_and_on_a_processor_takes_the_folders_type(
    tiny_tagi: TagiForConditionalGeneration, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tiny_tagi, tiny_tokenizer, tmp_path / "wide")
    tiny_tagi.bfloat16()
    narrow = write_folder(tiny_tagi, tiny_tokenizer, tmp_path / "narrow")

    def dtype_of(folder: Path, *precision: Any) -> torch.dtype:
        return Answerer.open(folder, "say the lamp", None, None, *precision).loaded.model.dtype

    assert (dtype_of(folder), dtype_of(narrow)) == (torch.float32, torch.bfloat16)
    assert (dtype_of(folder, "bf16"), dtype_of(narrow, "fp32")) == (torch.bfloat16, torch.float32)
    monkeypatch.setattr("tagi_ds.answering.native_precision", lambda device: "bf16")
    assert (dtype_of(folder), dtype_of(folder, "fp32")) == (torch.bfloat16, torch.float32)
