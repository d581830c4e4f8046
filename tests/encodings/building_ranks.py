"""A cache of made-up instructions, and the tiny model that encodes them; run as a script it is one rank of building.

Arguments: BACKBONE FOLDER and a JSON list of {name, strategy, stages, deepspeed}; each makes a cache FOLDER/<name>.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from tagi_ds.config import EngineConfig, OptimizerConfig, RunConfig
from tagi_ds.encodings import store
from tagi_ds.encodings.instructions import InstructionCache
from tagi_ds.engine import distributed
from tagi_ds.engine.strategy import Strategy, make_strategy
from tagi_ds.launch import Stage
from tagi_ds.model import TagiConfig, TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone

BINDING = {"backbone": "b", "tokenizer": "t", "dtype": "float32", "prompt": "plain"}
WIDTH = 32
BATCH_TOKENS = 48
"""So few that there are several files, of several instructions and of one."""


def instructions(count: int = 12) -> list[np.ndarray]:
    """Token ids of instructions of many lengths, two of them equal."""
    draw = np.random.default_rng(4)
    rows = [np.append(draw.integers(3, 280, length), 1).astype(np.int32) for length in range(1, 4 * count, 4)]
    return [*rows, rows[3]]


def prepared(backbone: Path, engine: EngineConfig) -> Strategy:
    """A strategy with the tiny model."""
    torch.manual_seed(0)
    strategy = make_strategy(engine, distributed.current())
    with strategy.model_context():
        model = TagiForConditionalGeneration.from_backbone(
            load_backbone(backbone), TagiConfig(rank=2, bottleneck=8), gather=strategy.gathered
        )
    model.freeze()
    strategy.prepare(model, OptimizerConfig(), 1)
    return strategy


def make_cache(folder: Path, **binding: str) -> InstructionCache:
    """The cache of `instructions`, not built."""
    stage = Stage("finetune", RunConfig(), distributed.current(), folder.parent)
    return InstructionCache(folder, instructions(), {**BINDING, **binding}, WIDTH, stage)


def main() -> None:
    backbone, folder, runs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    disable_progress_bar()
    store.BATCH_TOKENS = BATCH_TOKENS
    distributed.start(60)
    for run in runs:
        settings: dict[str, Any] = {name: value for name, value in run.items() if name != "name"}
        engine = EngineConfig(**settings, precision="fp32")
        make_cache(folder / run["name"]).build(prepared(backbone, engine))
    # Rank 0 holds what the others wait at.
    distributed.barrier()
    distributed.leave()


if __name__ == "__main__":
    main()
