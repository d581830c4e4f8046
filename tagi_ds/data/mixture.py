"""The training order over tasks, and the batches of an evaluation.

The order is computed from (seed, position): nothing is replayed when a run resumes, and the global batch of a step
is the same for every number of ranks and micro-batches. To these it is dealt by length.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from tagi_ds.config import Dealing
from tagi_ds.data.collate import IGNORED, Collator, TaskChunk
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.extents import Extents
from tagi_ds.data.loader import Ahead
from tagi_ds.data.order import Share, ascending, check_state, choose, permutation, permuted
from tagi_ds.data.quotas import LONGEST_ORDER, Sampling, plan
from tagi_ds.errors import UserError

HELD_EXAMPLES = 8192
"""Examples of a task whose order is held in memory (16 KB); a larger task's is computed, one example at a time."""


class TaskMixture:
    """Deals out examples task by task.

    Each task's examples, permuted anew each time they have all come, and cut into chunks of `examples_per_task` (the
    last may be smaller), are an endless sequence of chunks. In every cycle each task has its quota of chunks
    (:mod:`tagi_ds.data.quotas`), and the slots of all tasks are permuted. So within a task no example comes again
    before all others came. A global batch is `tasks_per_batch` consecutive chunks of that endless order.

    Memory is O(tasks): of an order, at most 2 * LONGEST_ORDER slots are held, and longer ones are computed.

    Args:
        tasks: the training tasks.
        collator: makes the tensors.
        seed: of the order, of the wording of a chunk's instruction, and of an example's reference.
        tasks_per_batch: chunks in a global batch; a multiple of world_size * accumulation.
        examples_per_task: examples in a chunk.
        rank, world_size, accumulation: which share of the global batch `next_step` returns.
        sampling, task_cap, weights: how often each task comes, as in DataConfig.
        dealing: how a global batch is dealt to ranks and micro-batches, as in DataConfig.
        workers: processes that prepare this rank's batches ahead.
        finish: what is done to each batch where it is made, e.g. attaching stored distributions.
        left_out: malformed rows and files that the tasks are without, for the counts.

    Raises:
        UserError: no tasks, a task without examples, a global batch that cannot be dealt evenly, or weights that do
            not fit the tasks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        collator: Collator,
        seed: int,
        tasks_per_batch: int,
        examples_per_task: int = 1,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        *,
        sampling: Sampling = "size",
        task_cap: int | None = None,
        weights: Mapping[str, float] | None = None,
        dealing: Dealing = "length",
        workers: int = 0,
        finish: Callable[[Batch], Batch] | None = None,
        left_out: int = 0,
    ) -> None:
        if not tasks or examples_per_task < 1:
            raise UserError("there is nothing to train on", "check the training split and data.examples_per_task")
        self._tasks = list(tasks)
        self._collator = collator
        self._seed = seed
        self._tasks_per_batch = tasks_per_batch
        self._examples_per_task = examples_per_task
        self._share = Share(tasks_per_batch, rank, world_size, accumulation)
        self._extents = Extents(collator) if dealing == "length" and self._share.parts > 1 else None
        self._finish = finish
        self._quotas = plan(self._tasks, examples_per_task, sampling, task_cap, weights)
        self._ends = np.cumsum(self._quotas.quota)
        self._identity = {
            "data": fingerprint(self._tasks),
            "seed": seed,
            "examples_per_task": examples_per_task,
            "sampling": sampling,
            "task_cap": task_cap,
            "weights": dict(sorted(weights.items())) if weights else None,
        }
        # What the index left out is told with the run's first batch, by one rank for all.
        self._left_out = left_out if rank == 0 else 0
        self._step = 0
        self._position = 0
        self._batches = Ahead(self._prepared, workers)
        # A batch may straddle two cycles; the orders of older ones are never asked for again.
        self._cycle_order = lru_cache(maxsize=2)(self._ordered)
        self._example_order = lru_cache(maxsize=2 * len(tasks))(self._permuted)

    @property
    def chunks(self) -> int:
        """Chunks in an epoch: as many as the tasks have, or as their cap leaves, however they are sampled."""
        return self._quotas.epoch

    @property
    def epoch_steps(self) -> float:
        """Global batches in an epoch."""
        return self.chunks / self._tasks_per_batch

    @property
    def step(self) -> int:
        """Global batches dealt out so far."""
        return self._step

    @property
    def epoch(self) -> float:
        """Epochs dealt out so far, with the begun one's share."""
        return self._position / self.chunks

    def global_batch(self, step: int) -> list[TaskChunk]:
        """The chunks of any step's global batch, before dealing, in a run that never changed `tasks_per_batch`."""
        first = step * self._tasks_per_batch
        return [self._chunk(position) for position in range(first, first + self._tasks_per_batch)]

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        batches = next(self._batches)
        self._step += 1
        self._position += self._tasks_per_batch
        return batches

    def close(self) -> None:
        """Ends the workers, if there are any."""
        self._batches.close()

    def state_dict(self) -> dict[str, Any]:
        """The position in chunks, and what it is a position in; neither ranks nor workers nor batch size matter."""
        return {"step": self._step, "position": self._position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position at once; with another `tasks_per_batch` the remaining chunks stay the same.

        Raises:
            UserError: the state was taken over other tasks, another seed, other chunks or another sampling.
        """
        check_state(state, self._identity)
        self._batches.close()
        self._step, self._position = int(state["step"]), int(state["position"])

    def _prepared(self, worker: int, workers: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every `workers`-th global batch from the position on."""
        first = self._position + worker * self._tasks_per_batch
        for position in itertools.count(first, workers * self._tasks_per_batch):
            batches = [self._collator([self._chunk(at) for at in part]) for part in self._dealt(position)]
            if position == 0:
                batches[0].counts["malformed"] = self._left_out
            yield [self._finish(batch) for batch in batches] if self._finish else batches

    def _dealt(self, position: int) -> list[Sequence[int]]:
        """Positions of the chunks of this rank's micro-batches, in the global batch that begins at one."""
        positions = range(position, position + self._tasks_per_batch)
        if self._extents is None:
            return self._share.of(positions)
        chosen = [self._chosen(at) for at in positions]
        lengths = np.array([self._extents(self._tasks[it.task], it.paraphrase, it.rows) for it in chosen])
        return self._share.by_length(positions, lengths, self._collator.config.pad_multiple)

    def _ordered(self, cycle: int) -> np.ndarray:
        order = permutation(int(self._ends[-1]), self._seed, "chunks", cycle).astype(np.uint32)
        # Where a cycle is each task's own epoch, its chunks may come in any order. Elsewhere a task's sequence goes
        # on over the cycles' ends, and must be followed in its order.
        return order if self._each_once else ascending(order, self._ends)

    @cached_property
    def _each_once(self) -> bool:
        return bool(np.array_equal(self._quotas.quota, self._quotas.chunks))

    def _permuted(self, epoch: int, task: int) -> np.ndarray:
        size, name = len(self._tasks[task].examples), self._tasks[task].name
        return permutation(size, self._seed, "examples", epoch, name).astype(np.uint16)

    def _row(self, epoch: int, task: int, position: int) -> int:
        size = len(self._tasks[task].examples)
        if size > HELD_EXAMPLES:
            return permuted(position, size, self._seed, "examples", epoch, self._tasks[task].name)
        return int(self._example_order(epoch, task)[position])

    def _slot(self, position: int) -> tuple[int, int]:
        """(cycle, slot in it) of a position in the endless order."""
        length = int(self._ends[-1])
        cycle, offset = divmod(position, length)
        if length > LONGEST_ORDER:
            return cycle, permuted(offset, length, self._seed, "chunks", cycle)
        return cycle, int(self._cycle_order(cycle)[offset])

    def _chosen(self, position: int) -> _Chosen:
        """What the chunk at a position of the endless order consists of; no example is read."""
        cycle, slot = self._slot(position)
        index = int(np.searchsorted(self._ends, slot, side="right"))
        task, quota = self._tasks[index], int(self._quotas.quota[index])
        # Number of the chunk in the task's own endless sequence.
        number = cycle * quota + slot - int(self._ends[index] - quota)
        epoch, chunk = divmod(number, int(self._quotas.chunks[index]))
        begin = chunk * self._examples_per_task
        end = min(begin + self._examples_per_task, len(task.examples))
        wording = choose(1 + len(task.paraphrases), self._seed, "paraphrase", epoch, task.name, begin)
        return _Chosen(index, wording, [self._row(epoch, index, at) for at in range(begin, end)])

    def _chunk(self, position: int) -> TaskChunk:
        chosen = self._chosen(position)
        task = self._tasks[chosen.task]
        examples = tuple(task.examples[row] for row in chosen.rows)
        references = tuple(reference_of(example, self._seed) for example in examples)
        return TaskChunk(task, chosen.paraphrase, examples, references)


class _Chosen(NamedTuple):
    """A chunk before it is read: number of its task, wording of the instruction, and which examples."""

    task: int
    paraphrase: int
    rows: list[int]


def reference_of(example: Example, seed: int) -> int:
    """Which reference is the example's training target: the same in every epoch, so that stored logits fit it."""
    return choose(len(example.references), seed, "reference", example.id)


def fingerprint(tasks: Sequence[Task]) -> str:
    """Hex SHA-256 of tasks: names, wordings, examples, order; indexed examples know their own and stay unread."""
    digest = hashlib.sha256()
    for task in tasks:
        wording = (task.name, task.definition, task.paraphrases, task.positives, task.negatives)
        digest.update(repr((*wording, task.category, task.source)).encode())
        indexed = getattr(task.examples, "fingerprint", None)
        if indexed is not None:
            digest.update(indexed.encode())
            continue
        for example in task.examples:
            digest.update(repr(example).encode())
    return digest.hexdigest()


def evaluation_batches(
    tasks: Sequence[Task], collator: Collator, batch_examples: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This rank's share of all examples, task by task under their definitions, with the first references.

    No example of another rank is read. Every rank gets the same number of batches. Where examples do not suffice for
    that, a rank repeats some with labels all -100 and no `example_ids`: it takes part in collective operations and
    counts nothing.

    Args:
        tasks: at least one.
        collator: makes the tensors.
        batch_examples: examples in a batch at the most.
        rank, world_size: the share.

    Raises:
        UserError: there are no examples.
    """
    ends = np.cumsum([len(task.examples) for task in tasks])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise UserError("there is nothing to evaluate", "check the split file of the group")

    def chunk(place: int) -> TaskChunk:
        number = int(np.searchsorted(ends, place, side="right"))
        task = tasks[number]
        return TaskChunk(task, 0, (task.examples[place - int(ends[number]) + len(task.examples)],), (0,))

    per_rank = -(-total // (batch_examples * world_size))
    parts = per_rank * world_size
    cuts = [number * total // parts for number in range(parts + 1)]
    batches = []
    for number in range(rank * per_rank, (rank + 1) * per_rank):
        part = range(cuts[number], cuts[number + 1])
        batch = collator([chunk(place) for place in part or range(1)])
        if not part:
            batch.labels.fill_(IGNORED)
            batch.example_ids = []
        batches.append(batch)
    return batches
