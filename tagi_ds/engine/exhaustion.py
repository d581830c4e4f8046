"""Memory or disk that does not suffice: said in one error, with what to change, before anything is lost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tagi_ds.config import EngineConfig
from tagi_ds.engine.strategy import Strategy
from tagi_ds.errors import UserError

_SPARE = 1.02
_MASTER_AND_MOMENTS = 12
"""Bytes of a parameter's float32 master and AdamW's two moments in a checkpoint."""
_REFUSALS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


class MemoryExhaustedError(UserError):
    """An accelerator or a host whose memory does not suffice; the last checkpoint stands."""


@contextmanager
def memory_told(place: str, engine: EngineConfig, advice: str | None = None) -> Iterator[None]:
    """Within it an allocation that fails ends in one error with advice.

    Args:
        place: where in the run, e.g. ``step 7``.
        engine: decides the advice for training.
        advice: in the place of that.

    Raises:
        MemoryExhaustedError: in the place of torch's and Python's own.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise MemoryExhaustedError(f"{place}: out of memory ({what})", advice or memory_advice(engine)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or in host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no class of its own for its CPU allocator's refusal and for cuBLAS's.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)


def memory_advice(engine: EngineConfig) -> str:
    """What to change for a step, the cheapest first; none of it changes what is learnt."""
    steps = [
        f"raise engine.accumulation above {engine.accumulation}: smaller micro-batches of the same global batch",
    ]
    if not engine.activation_checkpointing:
        steps.append("set engine.activation_checkpointing true")
    return "; or ".join([*steps, *_of_the_model(engine)])


def evaluation_advice(engine: EngineConfig, examples: int | None) -> str:
    """What to change for an evaluation in the midst of training, which computes no gradients.

    Args:
        examples: in a validation batch; None where there is no such batch.
    """
    smaller = f"set evaluation.batch_examples below {examples}: smaller validation batches"
    return "; or ".join([*([] if examples in (None, 1) else [smaller]), *_of_the_model(engine)])


def _of_the_model(engine: EngineConfig) -> list[str]:
    steps = []
    if engine.strategy in ("single", "zero2"):
        steps.append("choose engine.strategy zero3, or more processes")
    elif engine.strategy == "pipeline":
        steps.append(f"raise engine.stages above {engine.stages}, with as many more processes")
    elif engine.strategy == "zero3" and "offload" not in (engine.deepspeed or ""):
        steps.append("set engine.deepspeed ds_configs/zero3_offload.json")
    return [*steps, "python launchers/plan.py --config RECIPE --cluster 8xH100 says what fits where"]


def checkpoint_bytes(strategy: Strategy, last: Path | None) -> int:
    """Size of a run's next checkpoint: the last one's, or an estimate by what trains.

    Args:
        strategy: with the model prepared.
        last: folder of the latest checkpoint; None where there is none.
    """
    if last is not None:
        return sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
    trained = sum(math.prod(shape) for shape in strategy.trainable_shapes().values())
    return trained * (_MASTER_AND_MOMENTS + strategy.dtype.itemsize)


def require_space(folder: Path, needed: int) -> None:
    """Refuses to begin writing where the disk will not hold it.

    Args:
        folder: where the checkpoint will lie; it exists, or its nearest parent counts.
        needed: bytes.

    Raises:
        UserError: too little is free.
    """
    place = folder
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed * _SPARE:
        raise UserError(
            f"a checkpoint in {folder} takes about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there; "
            "earlier checkpoints are as they were",
            "free space on that disk, lower engine.keep_checkpoints, or choose another --output_dir",
        )
