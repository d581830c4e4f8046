"""How often each task comes: whole numbers of chunks that repeat from cycle to cycle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tagi_ds.data.examples import Task, without_categories
from tagi_ds.errors import UserError

Sampling = Literal["size", "uniform", "category"]

RESOLUTION = 64
"""Chunks that the rarest task gets in a cycle at the least, where shares are not those of the tasks' sizes: every task
is within 1/128 of its share."""
SHARED_CYCLE = 2**20
"""Chunks of such a cycle at the most, for its order is held in memory; the rarest tasks' shares are then coarser."""
LONGEST_ORDER = 2**22
"""Chunks of an epoch whose order is held in memory (16 MB)."""


@dataclass(frozen=True)
class Quotas:
    """The plan of a mixture.

    Attributes:
        chunks: (tasks,) int64: chunks of each task's examples.
        quota: (tasks,) int64: chunks of each task in one cycle.
        epoch: chunks of an epoch: as many as the tasks have, or as their cap leaves. Where tasks are sampled by size
            it is one cycle (unless a cap leaves more than LONGEST_ORDER chunks).
    """

    chunks: np.ndarray
    quota: np.ndarray
    epoch: int


def plan(
    tasks: Sequence[Task],
    examples_per_task: int,
    sampling: Sampling = "size",
    task_cap: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> Quotas:
    """The quotas of some tasks.

    Args:
        tasks: each with an example at least.
        examples_per_task: examples in a chunk.
        sampling: `size`: in proportion to the chunks; `uniform`: all tasks alike; `category`: all categories alike,
            and within one its tasks.
        task_cap: by size, examples of a task that count.
        weights: share of each collection; within it the sampling decides. Default: no say in it.

    Raises:
        UserError: a task without examples, sampling by categories that no task has, or weights that do not name the
            tasks' collections.
    """
    sizes = np.array([len(task.examples) for task in tasks], dtype=np.int64)
    if not sizes.all():
        empty = tasks[int(np.flatnonzero(sizes == 0)[0])].name
        raise UserError(f"the task {empty} has no examples", "take it off the split, or mend its file")
    chunks = -(-sizes // examples_per_task)
    counted = chunks
    if sampling == "size" and task_cap is not None:
        counted = np.minimum(chunks, -(-task_cap // examples_per_task))
    epoch = int(counted.sum())
    by_size = sampling == "size" and not weights
    if by_size and (np.array_equal(counted, chunks) or epoch <= LONGEST_ORDER):
        return Quotas(chunks, counted, epoch)
    shares = _shares(tasks, counted, sampling, weights)
    return Quotas(chunks, _whole(shares, epoch), epoch)


def _shares(
    tasks: Sequence[Task], counted: np.ndarray, sampling: Sampling, weights: Mapping[str, float] | None
) -> np.ndarray:
    shares = counted.astype(np.float64)
    if sampling == "uniform":
        shares = np.ones(len(tasks))
    elif sampling == "category":
        if without_categories(tasks):
            raise UserError(
                f"data.sampling category, and none of the {len(tasks)} training tasks names its category",
                "set data.sampling size or uniform, or name a checkout of natural-instructions as data.sni_dir",
            )
        members = Counter((task.collection, task.category) for task in tasks)
        shares = np.array([1 / members[task.collection, task.category] for task in tasks])
    if not weights:
        return shares
    present = {task.collection for task in tasks}
    if present != set(weights):
        raise UserError(
            f"data.weights names {', '.join(sorted(weights))}; the training tasks are of {', '.join(sorted(present))}",
            "give every collection that is read a weight, and no other (data.sni_dir, data.p3_dir)",
        )
    for name, weight in weights.items():
        own = np.array([task.collection == name for task in tasks])
        shares[own] *= weight / shares[own].sum()
    return shares


def _whole(shares: np.ndarray, epoch: int) -> np.ndarray:
    """Quotas in proportion to the shares, in a cycle of about an epoch, or longer where that is too coarse."""
    relative = shares / shares.min()
    rarest = max(RESOLUTION, epoch / relative.sum())
    rarest = min(rarest, SHARED_CYCLE / relative.sum())
    # Whole for the rarest task, so that equal shares stay equal.
    return np.maximum(1, np.rint(relative * (round(rarest) if rarest > 1 else rarest))).astype(np.int64)
