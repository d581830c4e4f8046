"""A process of its own: one training step of the single-process strategy, and the peak of its memory on the processor.

python -m tests.plan.step_memory '{"size": [...], "settings": {...}, "work": {...}}'   prints bytes, as JSON

A first step on few tokens brings the optimizer's state into being; the peak is that of the second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.single import SingleStrategy
from tagi_ds.plan.workload import Workload
from tagi_ds.reading import TargetReader
from tests.plan.models import make_batch, make_model


def resident(field: str) -> int:
    """Bytes of a field of the process's status: RssAnon, or VmHWM (the highest resident size so far)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(task: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = Workload(**task["work"])
    _step(SingleStrategyOf(make_model()), Workload(2, 2, 4, 4, 4, False, "fp32"), 1000)  # libraries, once
    before = resident("VmRSS")
    model = make_model(tuple(task["size"]), **task["settings"])
    if work.checkpointing:
        model.backbone.gradient_checkpointing_enable()
    strategy = SingleStrategyOf(model)
    vocabulary = task["size"][0]
    _step(strategy, Workload(1, 1, 4, 4, 4, False, "fp32"), vocabulary)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest resident size starts anew
    _step(strategy, work, vocabulary)
    return {"bytes": resident("VmHWM") - before}


def SingleStrategyOf(model: Any) -> SingleStrategy:  # noqa: N802
    strategy = SingleStrategy(EngineConfig(strategy="single", precision="fp32"), distributed.current())
    strategy.prepare(model, OptimizerConfig(), 10)
    return strategy


def _step(strategy: SingleStrategy, work: Workload, vocabulary: int) -> None:
    batch = make_batch(work, vocabulary)
    labels = batch["labels"]
    assert labels is not None
    figures = strategy.model(**batch, read=TargetReader(labels)).figures
    strategy.backward(figures.label.sum())
    assert strategy.step(0).taken


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
