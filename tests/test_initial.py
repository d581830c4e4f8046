"""What a run takes over of an earlier one: a trained B under its own A, and nothing that is then lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tagi_ds.build import build_tagi
from tagi_ds.config import EngineConfig, OptimizerConfig, RunConfig
from tagi_ds.convert.run_weights import RunWeights
from tagi_ds.data.examples import Batch
from tagi_ds.engine import distributed
from tagi_ds.engine.checkpoint import CheckpointStore, RunState, best_checkpoint
from tagi_ds.engine.strategy import make_strategy
from tagi_ds.errors import UserError
from tagi_ds.initial import mark_of
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.stages.training import BackboneRecord
from tagi_ds.teachers.bank import common_a
from tests.conftest import stir

RANK, SEED = 4, 3
NORM = "backbone.encoder.final_layer_norm.weight"


def config_of(backbone: Path, seed: int = SEED, **model: Any) -> RunConfig:
    config = RunConfig(seed=seed)
    config.model = dataclasses.replace(config.model, backbone=str(backbone), rank=RANK, bottleneck=8, **model)
    return config


def a_run(config: RunConfig, folder: Path, as_run: bool) -> TagiForConditionalGeneration:
    """What a run trained, in its folder with one checkpoint, or converted."""
    model = build_tagi(config)
    stir(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.startswith("backbone."):
                parameter.mul_(1.5)
    if not as_run:
        model.save_pretrained(folder)
        return model
    strategy = make_strategy(EngineConfig(strategy="single", precision="fp32"), distributed.current())
    strategy.prepare(model, OptimizerConfig(), 1)
    record = BackboneRecord(config, "pretrain", model.shared_a_mark)
    CheckpointStore(folder, keep=1).save(strategy, RunState(step=1, total_steps=1, extra=record.state_dict()))
    return model


def updates(model: TagiForConditionalGeneration, batch: Batch) -> dict[str, Tensor]:
    assert batch.instruction_attention_mask is not None
    with torch.no_grad():
        state = model.eval().compile_instructions(batch.instruction_ids, batch.instruction_attention_mask)
    return {site: b @ a for site, (a, b) in state.adapters.items()}


def teachers_a(model: TagiForConditionalGeneration, seed: int = SEED) -> dict[str, Tensor]:
    return common_a(model.site_table, RANK, seed)


as_either = pytest.mark.parametrize("as_run", [True, False], ids=["run folder", "model folder"])


@as_either
def test_finetuning_begins_with_the_updates_that_pretraining_ended_with(
    as_run: bool, tiny_folder: Path, tiny_batch: Batch, tmp_path: Path
) -> None:
    trained = a_run(config_of(tiny_folder, a="shared"), tmp_path, as_run)
    given = teachers_a(trained)
    started = build_tagi(config_of(tiny_folder, a="shared", initial=str(tmp_path)), shared_a=given)
    for site, update in updates(started, tiny_batch).items():
        assert torch.equal(update, updates(trained, tiny_batch)[site]), site
    for name, a in started.named_parameters():
        if name.endswith("a_base"):
            assert not a.requires_grad
    assert started.shared_a_mark == mark_of(given)


@as_either
def test_a_b_of_another_a_is_refused(as_run: bool, tiny_folder: Path, tmp_path: Path) -> None:
    trained = a_run(config_of(tiny_folder, seed=SEED + 1, a="shared"), tmp_path, as_run)
    config = config_of(tiny_folder, a="shared", initial=str(tmp_path))
    with pytest.raises(UserError, match=r"trained under another A than the teachers have.*\n.*one seed"):
        build_tagi(config, shared_a=teachers_a(trained))
    if as_run:
        with pytest.raises(UserError, match="trained under another A than this run has"):
            build_tagi(config)
    else:
        assert build_tagi(config).shared_a_mark == mark_of(teachers_a(trained, SEED + 1)), "its own came with it"


def test_a_run_that_does_not_say_its_a_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint without the record may have been trained under any."""
    config = config_of(tiny_folder, a="shared")
    model = build_tagi(config)
    strategy = make_strategy(EngineConfig(strategy="single", precision="fp32"), distributed.current())
    strategy.prepare(model, OptimizerConfig(), 1)
    CheckpointStore(tmp_path, keep=1).save(strategy, RunState(step=1, total_steps=1))
    config.model.initial = str(tmp_path)
    with pytest.raises(UserError, match="does not say under which A it was trained"):
        build_tagi(config)
    with pytest.raises(UserError, match="began with another frozen A"):
        BackboneRecord(config, "finetune", model.shared_a_mark).load_state_dict({})
    BackboneRecord(config, "finetune", model.shared_a_mark).load_state_dict({"shared_a": model.shared_a_mark})


def test_precision_does_not_tell_one_a_from_itself(tiny_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_folder, a="shared")
    model = build_tagi(config, torch.bfloat16)
    model.save_pretrained(tmp_path)
    config.model.initial = str(tmp_path)
    given = teachers_a(model)
    started = build_tagi(config, shared_a=given)
    held = {site: a for site, (a, _) in _adapters(started).items()}
    assert all(torch.equal(held[site][0], given[site]) for site in given), "the teachers', unrounded"


def _adapters(model: TagiForConditionalGeneration) -> Any:
    ids = torch.tensor([[5, 6, 1]])
    return model.compile_instructions(ids, torch.ones_like(ids)).adapters


@pytest.mark.parametrize("source", ["seed", "model.initial"])
def test_a_converted_run_has_the_a_that_it_was_trained_with(source: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_folder, a="shared")
    if source == "model.initial":
        a_run(config_of(tiny_folder, seed=SEED + 1, a="shared"), tmp_path / "before", as_run=False)
        config.model.initial = str(tmp_path / "before")
    model = a_run(config, tmp_path / "run", as_run=True)
    own = dict(model.named_parameters())
    weights: Any = RunWeights(config, "finetune", None, best_checkpoint(tmp_path / "run"))  # type: ignore[arg-type]
    converted = dict(weights.tensors())
    assert {name for name in own if name.startswith("hypernetwork.")} <= converted.keys()
    assert all(torch.equal(value, own[name]) for name, value in converted.items())
    if source == "model.initial":
        config.model.initial = None
        with pytest.raises(UserError, match="not to be had any more"):
            RunWeights(config, "finetune", None, best_checkpoint(tmp_path / "run"))  # type: ignore[arg-type]


@as_either
def test_a_backbone_that_trained_is_not_lost_on_the_way(as_run: bool, tiny_folder: Path, tmp_path: Path) -> None:
    trained = dict(a_run(config_of(tiny_folder, also_train="norms"), tmp_path, as_run).named_parameters())
    for kept in ("norms", "all"):
        started = build_tagi(config_of(tiny_folder, also_train=kept, initial=str(tmp_path)))
        assert torch.equal(dict(started.named_parameters())[NORM], trained[NORM])
    for lost in ("nothing", "embeddings"):
        with pytest.raises(UserError, match=rf"trained parts of its backbone.*also_train {lost}.*layer_norm"):
            build_tagi(config_of(tiny_folder, also_train=lost, initial=str(tmp_path)))


def test_a_converted_model_whose_backbone_stayed_as_it_was_may_be_followed_by_one_that_trains(
    tiny_folder: Path, tmp_path: Path
) -> None:
    a_run(config_of(tiny_folder), tmp_path, as_run=False)
    build_tagi(config_of(tiny_folder, also_train="all", initial=str(tmp_path)))
