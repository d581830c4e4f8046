"""Batches of examples dealt over ranks, safe against interruption: what generation and ranking share."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.engine import distributed
from tagi_ds.engine.profile import unit_done
from tagi_ds.evaluation.predictions import Prediction, PredictionStore, append

Prepared = TypeVar("Prepared")
Pair = tuple[Task, Example]
Collate = Callable[[Sequence[Pair]], Batch]
"""Examples with their tasks -> a batch in the same order. Its `instruction_ids` decide what the model is given."""


def collate_pairs(collator: Collator) -> Collate:
    """`collator` on single examples, each under its task's definition."""
    return lambda pairs: collator([TaskChunk(task, 0, (example,), (0,)) for task, example in pairs])


def plan_batches(pairs: Sequence[Pair], size: int, rows: Callable[[Example], int] = lambda _: 1) -> list[list[Pair]]:
    """Cuts examples into batches: a task's examples stay together, like lengths meet, the longest first.

    A task that fills half a batch has its own, of like sizes: they know one instruction, and its adapters may be merged
    into the weights. Smaller ones share batches. The longest first, so that memory that does not suffice shows early.

    Args:
        pairs: all examples of a group.
        size: rows a batch at the most, and one example at the least.
        rows: how many rows an example takes.
    """
    by_task: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_task.setdefault(pair[0].name, []).append(pair)
    runs: list[list[list[Pair]]] = []
    shared: list[list[Pair]] = []
    for members in by_task.values():
        members.sort(key=lambda pair: (-len(pair[1].input), pair[1].id))
        taken = [rows(example) for _, example in members]
        if 2 * sum(taken) < size:
            shared.append(members)
        else:
            like = -(-sum(taken) // -(-sum(taken) // size))
            runs.append(_cut(members, min(size, like + max(taken) - 1), rows))
    shared.sort(key=_longest)
    runs += [[batch] for batch in _cut([pair for members in shared for pair in members], size, rows)]
    return [batch for run in sorted(runs, key=lambda run: _longest(run[0])) for batch in run]


def _cut(pairs: Sequence[Pair], size: int, rows: Callable[[Example], int]) -> list[list[Pair]]:
    batches: list[list[Pair]] = []
    taken = size
    for pair in pairs:
        if taken + rows(pair[1]) > size:
            batches.append([])
            taken = 0
        batches[-1].append(pair)
        taken += rows(pair[1])
    return batches


def _longest(pairs: Sequence[Pair]) -> tuple[int, str]:
    """For an order by the longest input, tasks by name."""
    return -max(len(example.input) for _, example in pairs), pairs[0][0].name


def answer_all(
    model: nn.Module,
    pairs: Sequence[Pair],
    batches: Sequence[Sequence[Pair]],
    keys: Mapping[str, str],
    prepare: Callable[[Sequence[Pair]], Prepared],
    answer: Callable[[Sequence[Pair], Prepared], list[Prediction]],
    store: PredictionStore,
    progress: bool,
) -> list[Prediction]:
    """Has every batch answered by some rank; every rank must call it with the same arguments.

    Batches do not depend on the number of ranks, and one that an interruption left unfinished is answered again as a
    whole: the padding of a batch rounds what is computed in it, and the answers are the same however they came about.

    Args:
        model: put into evaluation mode meanwhile.
        pairs: all examples, in the order of the answers that are returned.
        batches: all examples, cut into batches.
        keys: example id -> key of all that its answer depends on.
        prepare: makes what a batch is answered from. It runs in a thread of its own, a batch ahead.
        answer: answers one batch.
        store: keeps the answers; all ranks must see the same folder.
        progress: a progress bar on rank 0.

    Returns:
        The answers in the order of `pairs`, on every rank.
    """
    ranks = distributed.current()
    known = store.usable(keys)
    # Nobody appends before everybody has read: all ranks must see the same work left.
    distributed.barrier()
    left = [batch for batch in batches if any(example.id not in known for _, example in batch)]
    rounds = -(-len(left) // ranks.world_size)
    with (
        store.append_to(ranks.rank) as shard,
        evaluating(model),
        _bar(store.group, rounds, progress and ranks.is_main) as bar,
    ):
        own = [turn * ranks.world_size + ranks.rank for turn in range(rounds)]
        # A rank without a batch of its own repeats the last: sharded parameters are gathered by all or by none.
        work = [left[min(at, len(left) - 1)] for at in own]
        for at, batch, prepared in zip(own, work, _ahead(prepare, work), strict=True):
            answers = answer(batch, prepared)
            if at < len(left):
                append(shard, answers)
            bar()
            unit_done()
    distributed.barrier()
    if ranks.is_main:
        found = store.usable(keys)
        store.finish(found[example.id] for _, example in pairs)
    distributed.barrier()
    found = store.usable(keys)
    return [found[example.id] for _, example in pairs]


def _ahead(prepare: Callable[[Sequence[Pair]], Prepared], work: Sequence[Sequence[Pair]]) -> Iterator[Prepared]:
    """What is prepared of each batch, the next one in a thread while the last is answered."""
    with ThreadPoolExecutor(1, "prepare") as thread:
        coming: deque[Future[Prepared]] = deque()
        for batch in work:
            coming.append(thread.submit(prepare, batch))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _bar(group: str, rounds: int, shown: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("answering {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as progress:
        bar = progress.add_task(group, total=rounds)
        yield lambda: progress.advance(bar)
