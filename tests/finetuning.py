"""Finetuning with every loss on a small study, variant by variant; run as a script it is one rank of it.

Arguments: STUDY SNI BACKBONE and a JSON object {name: fields of Variant}. Each variant leaves a folder STUDY/<name>, or
goes on in that of another.
"""

from __future__ import annotations

import gc
import json
import operator
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tagi_ds import build
from tagi_ds.config import EngineConfig, OptimizerConfig, RunConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.checkpoint import CheckpointStore, RunState
from tagi_ds.engine.pipeline import PipelineStrategy
from tagi_ds.engine.strategy import StepOutcome, Strategy, make_strategy
from tagi_ds.engine.trainer import Interrupted
from tagi_ds.launch import Stage
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone
from tagi_ds.stages import hypernetwork
from tagi_ds.teachers.distillation import DistilledSource
from tests.teachers.stage_process import make_config

STEPS, LOOKED_AT = 20, (4, 19)
"""Steps of a run, and how many were taken before each of the gradients that are kept."""
TOP_K = 999
"""The whole vocabulary, so that the store says what the online teacher does."""
GRADIENTS, INITIAL = "gradients", "initial"


@dataclass
class Variant:
    """One way of running the same steps; `folder` is that of the variant with which it goes on, if any."""

    strategy: str = "single"
    json: str | None = None
    checkpointing: bool = False
    accumulation: int = 1
    logits: str = "store"
    stages: int = 1
    cache: str = "on"
    folder: str | None = None
    until: int = STEPS
    """Step in which a signal comes, after which the run stops as soon as all processes know."""


def finetune_config(study: Path, sni: Path, backbone: Path, name: str, variant: Variant) -> RunConfig:
    """The settings that all variants share, and those of this one."""
    config = make_config(study, sni, backbone)
    config.output_dir = str(study / (variant.folder or name))
    config.data.tasks_per_batch, config.data.examples_per_task = 4, 2
    config.model.bottleneck = 16
    config.model.initial = str(study / INITIAL) if (study / INITIAL).exists() else None
    config.loss.kl, config.loss.alignment, config.loss.missing = 2.0, "sigmoid", "label_only"
    config.loss.logits = variant.logits  # type: ignore[assignment]
    config.teachers.top_k = TOP_K
    config.teachers.logit_teacher = str(study / "teacher") if (study / "teacher").exists() else None
    config.optimizer.learning_rate, config.optimizer.clip = 3e-3, 0.5
    engine = config.engine
    engine.strategy, engine.deepspeed = variant.strategy, variant.json  # type: ignore[assignment]
    engine.activation_checkpointing, engine.accumulation = variant.checkpointing, variant.accumulation
    engine.stages, engine.instruction_cache = variant.stages, variant.cache  # type: ignore[assignment]
    engine.steps, engine.log_every, engine.checkpoint_every = STEPS, 1, 0
    return config


def save_as_run(model: TagiForConditionalGeneration, run_dir: Path) -> None:
    """A run folder with one checkpoint of this model."""
    strategy = make_strategy(EngineConfig(strategy="single", precision="fp32"), distributed.current())
    strategy.prepare(model, OptimizerConfig(), 1)
    CheckpointStore(run_dir, keep=1).save(strategy, RunState(step=1, total_steps=1))


def finetune(config: RunConfig, patch: pytest.MonkeyPatch, until: int = STEPS) -> None:
    """Runs the stage itself; beside its files are noted the examples of every step, gradients of some steps, and what
    this process found: backbone parameters that have changed, and whether it loaded an online teacher."""
    run_dir, ranks = Path(str(config.output_dir)), distributed.current()
    made: list[Strategy] = []
    teachers: list[Any] = []
    load = build.load_teacher
    patch.setattr(build, "load_teacher", lambda *given: (load(*given), teachers.append(given))[0])

    class Noted(DistilledSource):
        def next_step(self) -> list[Any]:
            batches = super().next_step()
            _note(run_dir, self.source.step, [name for batch in batches for name in batch.example_ids], made[0])
            return batches

    patch.setattr(hypernetwork, "DistilledSource", Noted)

    def watched(*arguments: Any) -> Strategy:
        strategy = make_strategy(*arguments)
        made.append(strategy)
        take = strategy.step

        def step(step: int) -> StepOutcome:
            if step in LOOKED_AT:
                _keep_gradients(strategy, run_dir, step)
            if step + 1 == until < STEPS:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(step)

        strategy.step = step  # type: ignore[method-assign]
        return strategy

    patch.setattr(hypernetwork, "make_strategy", watched)
    try:
        hypernetwork.finetune(Stage("finetune", config, ranks, run_dir))
    except Interrupted:
        assert until < STEPS
    changed = changed_backbone_parameters(made[0], Path(str(config.model.backbone)))
    found = {"changed": changed, "teacher": bool(teachers)}
    (run_dir / f"found.{ranks.rank}.json").write_text(json.dumps(found))


def _note(run_dir: Path, step: int, mine: list[str], strategy: Strategy) -> None:
    """What the global batch of a step holds, however it is dealt to replicas and micro-batches."""
    shares = distributed.gather_objects(mine if strategy.replica.speaks else [])
    if distributed.is_main():
        with (run_dir / "dealt.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([step, sorted(name for share in shares for name in share)]) + "\n")


def changed_backbone_parameters(strategy: Strategy, folder: Path) -> list[str]:
    """Names of the backbone's parameters and buffers that are not, bit for bit, what the folder holds."""
    original = _plain_state(folder)
    if isinstance(strategy, PipelineStrategy):
        prefix, own = "backbone.", strategy.parameters_here
        mine = {n.removeprefix(prefix): p.detach() for n, p in own.items() if n.startswith(prefix)}
        assert mine.keys() < original.keys()
    else:
        backbone: Any = strategy.module.backbone
        with strategy.gathered(list(backbone.parameters())):
            mine = {name: value.detach().clone() for name, value in backbone.state_dict().items()}
        assert mine.keys() == original.keys()
    return [name for name, value in mine.items() if not torch.equal(original[name], value)]


def _plain_state(folder: Path) -> dict[str, Tensor]:
    """The backbone as any process would load it, whole even while ZeRO-3 shards what is loaded."""
    from transformers.integrations import deepspeed as integration

    held, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        return load_backbone(folder).state_dict()
    finally:
        integration._hf_deepspeed_config_weak_ref = held


def _keep_gradients(strategy: Strategy, run_dir: Path, step: int) -> None:
    """Whole float32 gradients of what trains, as the optimizer is about to see them, before clipping."""
    gradient: Callable[[Any], Tensor | None] = operator.attrgetter("grad")
    if strategy.name != "single":
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad
    found, mine = {}, strategy.ranks.is_main
    named = dict(strategy.module.named_parameters())
    if isinstance(strategy, PipelineStrategy):
        named, mine = strategy.parameters_here, strategy.replica.index == 0
    for name, parameter in named.items():
        if parameter.requires_grad:
            value = gradient(parameter)
            assert value is not None, name
            found[name] = value.detach().float().clone().contiguous()
    if mine:
        save_file(found, run_dir / f"{GRADIENTS}.{step}.{strategy.ranks.rank}.safetensors")


@dataclass
class Outcome:
    """What a variant left behind."""

    losses: list[dict[str, float]]
    grad_norms: list[float]
    gradients: dict[int, dict[str, Tensor]]
    """By step of LOOKED_AT."""
    changed: list[list[str]]
    """Of each process, backbone parameters that are not as before."""
    teachers: list[bool]
    """Of each process, whether it loaded an online teacher."""
    dealt: list[list[str]]
    """Example ids of each step."""

    @classmethod
    def of(cls, run_dir: Path) -> Outcome:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        dealt = dict(json.loads(line) for line in (run_dir / "dealt.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines] == list(dealt) == list(range(1, STEPS + 1))
        found = [json.loads(path.read_text()) for path in sorted(run_dir.glob("found.*.json"))]
        return cls(
            [{name: value for name, value in line.items() if name.startswith("loss/")} for line in lines],
            [line["grad_norm"] for line in lines],
            {
                step: {n: g for path in run_dir.glob(f"{GRADIENTS}.{step}.*") for n, g in load_file(path).items()}
                for step in LOOKED_AT
            },
            [each["changed"] for each in found],
            [each["teacher"] for each in found],
            list(dealt.values()),
        )


def main() -> None:
    study, sni, backbone = (Path(text) for text in sys.argv[1:4])
    torch.set_num_threads(1)
    distributed.start(60)
    for name, settings in json.loads(sys.argv[4]).items():
        variant = Variant(**settings)
        with pytest.MonkeyPatch.context() as patch:
            finetune(finetune_config(study, sni, backbone, name, variant), patch, variant.until)
        # transformers shards whatever is loaded while a ZeRO-3 strategy lives.
        gc.collect()
    distributed.leave()


if __name__ == "__main__":
    main()
