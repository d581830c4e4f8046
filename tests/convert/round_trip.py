"""Trains a small TAGI under DeepSpeed and keeps the engine's own logits; run as a script it is one rank.

Arguments: BACKBONE, BATCH (safetensors of the model's inputs) and a JSON object {run folder: engine settings}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from tagi_ds import recipe, run_folder
from tagi_ds.build import build_tagi
from tagi_ds.data.examples import Batch
from tagi_ds.engine import distributed
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.strategy import make_strategy
from tagi_ds.engine.trainer import Trainer
from tagi_ds.model.head import ReadingHead
from tagi_ds.objectives import TagiObjective
from tagi_ds.stages.training import BackboneRecord
from tests.convert.runs import SameBatch

LOGITS = "logits.safetensors"


class Listener:
    """Computes all logits of what the heads of a model read, while these have their weights."""

    def __init__(self, model: nn.Module) -> None:
        self.heard: Tensor | None = None
        for module in model.modules():
            if isinstance(module, ReadingHead):
                module.register_forward_hook(self._listen)

    def _listen(self, head: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
        with torch.no_grad():
            self.heard = nn.functional.linear(args[0], head.weight)


def train(backbone: Path, batch: Batch, run_dir: Path, engine: dict[str, Any], ranks: distributed.Ranks) -> None:
    arguments = {
        "output_dir": run_dir,
        "model.backbone": backbone,
        "model.rank": 4,
        "model.bottleneck": 16,
        "data.prompt": "plain",
        "engine.precision": "fp32",
        "engine.steps": 3,
        "optimizer.learning_rate": 0.01,
        **{f"engine.{name}": value for name, value in engine.items()},
    }
    config = recipe.parse("finetune", [text for key, value in arguments.items() for text in (f"--{key}", str(value))])
    settings = config.config
    run_folder.open_run(settings, "finetune", ranks.world_size, ranks.rank)
    strategy = make_strategy(settings.engine, ranks)
    with strategy.model_context():
        model = build_tagi(settings, strategy.dtype, strategy.gathered, construction=strategy.construction())
    objective, listener = TagiObjective(settings.loss, model.config.scaling), Listener(model)
    strategy.prepare(model, settings.optimizer, settings.engine.steps)
    monitor = Monitor(run_dir, "finetune", settings.engine.steps)
    record = BackboneRecord(settings, "finetune")
    source = SameBatch(batch)
    Trainer(strategy, objective, source, settings.engine, run_dir, monitor, extra_state=record).fit()
    strategy.module.eval()
    strategy.evaluate(objective, [batch])
    if listener.heard is not None and strategy.replica.index == 0:
        save_file({"logits": listener.heard}, run_dir / LOGITS)


def main() -> None:
    backbone, runs = Path(sys.argv[1]), json.loads(sys.argv[3])
    batch = Batch(**load_file(sys.argv[2]))
    torch.set_num_threads(1)
    disable_progress_bar()
    ranks = distributed.start(60)
    for folder, engine in runs.items():
        train(backbone, batch, Path(folder), engine, ranks)
    distributed.leave()


if __name__ == "__main__":
    main()
