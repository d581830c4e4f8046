"""Meta-training by LoRA: what trains, what is exported, and that the export is an ordinary model and a teacher."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tagi_ds import recipe
from tagi_ds.build import build_meta
from tagi_ds.convert.hugging_face import export_model
from tagi_ds.data.examples import Batch
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.engine.distributed import quieten_libraries
from tagi_ds.errors import UserError
from tagi_ds.model.adapter import find_sites
from tagi_ds.model.backbone import load_backbone
from tagi_ds.teachers.logit_teacher import load_teacher, teacher_folder
from tests.convert.runs import train_run

RANK = 4


@pytest.mark.parametrize("folder", ["tiny_folder", "tied_folder"])
def test_only_the_sites_change_and_by_the_rank(
    folder: str, request: pytest.FixtureRequest, tiny_batch: Batch, tmp_path: Path
) -> None:
    backbone: Path = request.getfixturevalue(folder)
    trained, config = train_run("meta_train", backbone, tmp_path / "run", tiny_batch, "--model.meta_lora", "true")
    training = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert training
    assert all("lora_" in name for name in training)
    exported = export_model(tmp_path / "run", None, tmp_path / "model")
    before, after = load_backbone(backbone).state_dict(), load_backbone(exported).state_dict()
    assert before.keys() == after.keys()
    sites = {f"{site.name}.weight" for site in find_sites(load_backbone(backbone), config.model.sites)}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == sites
    for name in sites:
        strengths = torch.linalg.svdvals((after[name] - before[name]).double())
        assert float(strengths[RANK]) < 1e-5 * float(strengths[0])
    inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
    with torch.no_grad():
        expected = trained.eval()(**inputs, labels=tiny_batch.labels).logits
        found = load_backbone(exported).eval()(**inputs, labels=tiny_batch.labels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    config.teachers.logit_teacher = str(exported)
    assert load_teacher(teacher_folder(config, backbone, load_tokenizer(backbone)), backbone, torch.float32)


def test_random_weights_are_not_taught_by_lora() -> None:
    with pytest.raises(UserError, match="a LoRA cannot teach random weights"):
        recipe.parse("meta_train", ["--model.meta_lora", "true", "--model.initial", "scratch"])


def test_what_peft_asks_of_transformers_is_no_warning_of_a_run(tiny_folder: Path) -> None:
    config = recipe.parse("meta_train", ["--model.meta_lora", "true", "--model.backbone", str(tiny_folder)]).config
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quieten_libraries()
        build_meta(config, tiny_folder)
    assert [str(each.message) for each in said] == []
