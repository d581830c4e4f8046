"""A model of which a process holds a stage: its values are those of the whole model, and the rest takes no memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tagi_ds.build import build_tagi
from tagi_ds.config import EngineConfig, RunConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.pipeline import PipelineStrategy
from tagi_ds.engine.trained import TrainedParameters
from tagi_ds.errors import UserError
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.weights import WeightFiles
from tests.conftest import MakeTagi, stir
from tests.finetuning import save_as_run

STAGES = 3
COSTS = [1.0, 1.0, 1.0, 1.0]


def config_of(backbone: Path, **model: Any) -> RunConfig:
    config = RunConfig()
    config.model = dataclasses.replace(config.model, backbone=str(backbone), rank=3, bottleneck=8, **model)
    return config


def built_of_stage(
    stage: int, config: RunConfig, dtype: torch.dtype, a: dict[str, torch.Tensor] | None
) -> TagiForConditionalGeneration:
    # Its making would join a group of processes.
    strategy = PipelineStrategy.__new__(PipelineStrategy)
    strategy.engine_config = EngineConfig(strategy="pipeline", stages=STAGES)
    strategy.ranks, strategy._replicas = distributed.Ranks(2 * stage + 1, 2 * STAGES, 0, torch.device("cpu")), 2
    return build_tagi(config, dtype, shared_a=a, held=strategy.held, stage_costs=COSTS)


def check_stages(config: RunConfig, dtype: torch.dtype = torch.float32, a: Any = None) -> None:
    whole = dict(build_tagi(config, dtype, shared_a=a).named_parameters())
    seen: dict[str, int] = dict.fromkeys(whole, 0)
    for stage in range(STAGES):
        model = built_of_stage(stage, config, dtype, a)
        own = dict(model.named_parameters())
        assert own.keys() == whole.keys()
        for name, parameter in own.items():
            assert parameter.requires_grad == whole[name].requires_grad
            assert parameter.shape == whole[name].shape
            assert parameter.dtype == whole[name].dtype
            if not parameter.is_meta:
                seen[name] += 1
                assert torch.equal(parameter, whole[name]), name
        if stage < STAGES - 1:
            assert own["backbone.decoder.final_layer_norm.weight"].is_meta
        if stage:
            assert own["hypernetwork.generator.encoder_block_0.groups.0.site"].is_meta
    shared = {name for name, count in seen.items() if count != 1}
    assert all(seen.values())
    assert all("shared" in name or "relative_attention_bias" in name for name in shared), shared
    assert shared, "embeddings are needed at both ends"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["own", "tied"])
def test_a_stage_has_the_values_of_the_whole(
    head: str, dtype: torch.dtype, tiny_folder: Path, tied_folder: Path
) -> None:
    check_stages(config_of(tiny_folder if head == "own" else tied_folder), dtype)


def test_the_teachers_a_reaches_the_stage_of_its_site(tiny_folder: Path, make_tagi: MakeTagi) -> None:
    sites = make_tagi(rank=3, bottleneck=8).site_table
    check_stages(config_of(tiny_folder, a="shared"), a={s.name: torch.randn(3, s.d_in) for s in sites})


@pytest.mark.parametrize("form", ["checkpoint", "model folder"])
def test_an_earlier_runs_hypernetwork_is_read_by_the_stage_that_holds_it(
    form: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_folder)
    model = build_tagi(config)
    stir(model)
    if form == "checkpoint":
        save_as_run(model, tmp_path / "run")
    else:
        model.save_pretrained(tmp_path / "run")
    config.model.initial = str(tmp_path / "run")
    check_stages(config)
    started = dict(build_tagi(config).named_parameters())
    name = "hypernetwork.generator.decoder_block_1.groups.0.b_head.weight"
    assert torch.equal(started[name], dict(model.named_parameters())[name])
    asked: list[str] = []
    for kind in (WeightFiles, TrainedParameters):
        read = kind.__getitem__
        monkeypatch.setattr(
            kind, "__getitem__", lambda self, name, read=read: (asked.append(name), read(self, name))[1]
        )
    built_of_stage(0, config, torch.float32, None)
    assert "hypernetwork.generator.encoder_block_0.groups.0.site" in asked
    assert not [name for name in asked if "decoder.block" in name or "decoder_block" in name or "lm_head" in name]


def test_a_backbone_whose_parts_do_not_fit_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    tensors = load_file(tiny_folder / "model.safetensors")
    norm = "encoder.block.0.layer.0.layer_norm.weight"

    def refused(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError) as error:
            built_of_stage(0, config_of(tmp_path), torch.float32, None)
        return str(error.value)

    assert f"{tmp_path} has no {norm}" in refused({n: t for n, t in tensors.items() if n != norm})
    assert "has the shape (3,), its config.json implies" in refused({**tensors, norm: torch.ones(3)})
    other = {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1}
    assert "are to be one tensor and differ" in refused({**tensors, **other})


def test_a_hypernetwork_of_another_backbone_is_refused(
    tiny_folder: Path, tied_folder: Path, tmp_path: Path, make_tagi: MakeTagi
) -> None:
    make_tagi(tied_folder, rank=3, bottleneck=8).save_pretrained(tmp_path / "model")
    build_tagi(config_of(tied_folder, initial=str(tmp_path / "model")))
    with pytest.raises(UserError, match=f"{tmp_path}.*another backbone.*{tiny_folder}"):
        build_tagi(config_of(tiny_folder, initial=str(tmp_path / "model")))


def test_narrower_fusion_cannot_begin_as_the_backbones_attention(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = build_tagi(config_of(tiny_folder, fusion_heads=2, fusion_start="random"))
    assert narrow.hypernetwork.fusion is not None
    for fits in ({"fusion_heads": 4}, {"fusion_heads": 2, "fusion": False}, {"fusion_heads": 2, "method": "hint"}):
        build_tagi(config_of(tiny_folder, **fits))
    monkeypatch.setattr("tagi_ds.build.load_backbone", lambda *_, **__: pytest.fail("loaded before it was refused"))
    with pytest.raises(UserError, match=r"fusion_heads 2 .* has 4 heads\n.*fusion_start random"):
        build_tagi(config_of(tiny_folder, fusion_heads=2))


def test_pickled_weights_are_read_by_stage_too(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    torch.save(load_file(tiny_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    check_stages(config_of(tmp_path))
