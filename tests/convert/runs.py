"""Small training runs in their folders, as the stages leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tagi_ds import recipe, run_folder
from tagi_ds.build import build_meta, build_scratch, build_tagi, load_study_tokenizer, study_backbone
from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.convert.model_folder import write_prompt
from tagi_ds.data.examples import Batch
from tagi_ds.engine import distributed
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.strategy import make_strategy
from tagi_ds.engine.trainer import Trainer
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.objectives import SequenceObjective, TagiObjective
from tagi_ds.stages.training import BackboneRecord


class SameBatch:
    """The same micro-batch again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next_step(self) -> list[Batch]:
        return [self.batch]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def write_folder(model: TagiForConditionalGeneration, tokenizer: Any, folder: Path, **prompt: Any) -> Path:
    """A model in a folder as a conversion leaves it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_prompt(folder, DataConfig(max_target_tokens=5, **{"prompt": "plain", **prompt}))
    return folder


def train_run(stage: str, backbone: Path, folder: Path, batch: Batch, *flags: str) -> tuple[torch.nn.Module, RunConfig]:
    """Three steps of a stage with the single strategy; the trained module and its configuration."""
    arguments = {
        "output_dir": folder,
        "model.backbone": backbone,
        "model.rank": 4,
        "model.bottleneck": 16,
        "engine.strategy": "single",
        "engine.precision": "fp32",
        "engine.steps": 3,
        "optimizer.learning_rate": 0.01,
        "data.prompt": "plain",
        "data.max_target_tokens": 6,
        "scratch.d_model": 16,
        "scratch.d_ff": 24,
        "scratch.heads": 2,
    }
    argv = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    config = recipe.parse(stage, [*argv, *flags]).config
    run_dir = run_folder.open_run(config, stage, world_size=1)
    objective: TagiObjective | SequenceObjective = SequenceObjective()
    torch.manual_seed(config.seed)
    if stage in ("pretrain", "finetune"):
        model: torch.nn.Module = build_tagi(config)
        objective = TagiObjective(config.loss, config.model.alpha / config.model.rank)
    elif stage == "meta_train":
        model = build_meta(config, study_backbone(config))
    else:
        model = build_scratch(config, load_study_tokenizer(config))
    strategy = make_strategy(config.engine, distributed.current())
    strategy.prepare(model, config.optimizer, config.engine.steps)
    monitor = Monitor(run_dir, stage, config.engine.steps)
    record = BackboneRecord(config, stage, getattr(model, "shared_a_mark", None))
    Trainer(strategy, objective, SameBatch(batch), config.engine, run_dir, monitor, extra_state=record).fit()
    return model.eval(), config
