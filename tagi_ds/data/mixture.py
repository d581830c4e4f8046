"""The training order over tasks, and the batches of an evaluation.

The order is computed from (seed, position): nothing is replayed when a run resumes, and the global batch of a step
is the same for every number of ranks and micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tagi_ds.data.collate import IGNORED, Collator, TaskChunk
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.order import Share, check_state, choose, permutation
from tagi_ds.errors import UserError


class TaskMixture:
    """Deals out examples task by task.

    In every epoch each task's examples are permuted and cut into chunks of `examples_per_task` (the last may be
    smaller), and the chunks of all tasks are permuted. A global batch is `tasks_per_batch` consecutive chunks of
    that endless sequence.

    Args:
        tasks: the training tasks.
        collator: makes the tensors.
        seed: of the order, of the wording of a chunk's instruction, and of an example's reference.
        tasks_per_batch: chunks in a global batch; a multiple of world_size * accumulation.
        examples_per_task: examples in a chunk.
        rank, world_size, accumulation: which share of the global batch `next_step` returns.

    Raises:
        UserError: no tasks, or a global batch that cannot be dealt evenly.
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
    ) -> None:
        if not tasks or examples_per_task < 1:
            raise UserError("there is nothing to train on", "check the training split and data.examples_per_task")
        self._tasks = list(tasks)
        self._collator = collator
        self._seed = seed
        self._tasks_per_batch = tasks_per_batch
        self._examples_per_task = examples_per_task
        self._share = Share(tasks_per_batch, rank, world_size, accumulation)
        counts = [-(-len(task.examples) // examples_per_task) for task in self._tasks]
        self._ends = np.cumsum(counts)
        self._fingerprint = fingerprint(self._tasks)
        self._step = 0
        # A batch may straddle two epochs; the permutations of older ones are never asked for again.
        self._chunk_order = lru_cache(maxsize=2)(lambda epoch: permutation(self.chunks, seed, "chunks", epoch))
        self._example_order = lru_cache(maxsize=4 * len(tasks))(self._permuted)

    @property
    def chunks(self) -> int:
        """Chunks in an epoch."""
        return int(self._ends[-1])

    @property
    def step(self) -> int:
        """Global batches dealt out so far."""
        return self._step

    @property
    def epoch(self) -> float:
        """Epochs dealt out so far, with the begun one's share."""
        return self._step * self._tasks_per_batch / self.chunks

    def global_batch(self, step: int) -> list[TaskChunk]:
        """The chunks of any step's global batch, before dealing."""
        first = step * self._tasks_per_batch
        return [self._chunk(position) for position in range(first, first + self._tasks_per_batch)]

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        first = self._step * self._tasks_per_batch
        micro_batches = self._share.of(range(first, first + self._tasks_per_batch))
        batches = [self._collator([self._chunk(position) for position in part]) for part in micro_batches]
        self._step += 1
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position at once.

        Raises:
            UserError: the state was taken over other tasks, another seed or another global batch.
        """
        check_state(state, self._identity())
        self._step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self._fingerprint,
            "seed": self._seed,
            "tasks_per_batch": self._tasks_per_batch,
            "examples_per_task": self._examples_per_task,
        }

    def _permuted(self, epoch: int, task: int) -> np.ndarray:
        return permutation(len(self._tasks[task].examples), self._seed, "examples", epoch, self._tasks[task].name)

    def _chunk(self, position: int) -> TaskChunk:
        epoch, offset = divmod(position, self.chunks)
        chunk = int(self._chunk_order(epoch)[offset])
        index = int(np.searchsorted(self._ends, chunk, side="right"))
        task = self._tasks[index]
        begin = (chunk - (int(self._ends[index - 1]) if index else 0)) * self._examples_per_task
        chosen = self._example_order(epoch, index)[begin : begin + self._examples_per_task]
        examples = tuple(task.examples[int(i)] for i in chosen)
        return TaskChunk(
            task,
            choose(1 + len(task.paraphrases), self._seed, "paraphrase", epoch, task.name, begin),
            examples,
            tuple(reference_of(example, self._seed) for example in examples),
        )


def reference_of(example: Example, seed: int) -> int:
    """Which reference is the example's training target: the same in every epoch, so that stored logits fit it."""
    return choose(len(example.references), seed, "reference", example.id)


def fingerprint(tasks: Sequence[Task]) -> str:
    """Hex SHA-256 of the tasks' names, wordings, examples and order."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr((task.name, task.definition, task.paraphrases, task.positives, task.category)).encode())
        for example in task.examples:
            digest.update(repr((example.id, example.input, example.references)).encode())
    return digest.hexdigest()


def evaluation_batches(
    tasks: Sequence[Task], collator: Collator, batch_examples: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This rank's share of all examples, task by task under their definitions, with the first references.

    Every rank gets the same number of batches. Where examples do not suffice for that, a rank repeats some with
    labels all -100 and no `example_ids`: it takes part in collective operations and counts nothing.

    Args:
        tasks: at least one.
        collator: makes the tensors.
        batch_examples: examples in a batch at the most.
        rank, world_size: the share.

    Raises:
        UserError: there are no examples.
    """
    pairs = [(task, example) for task in tasks for example in task.examples]
    if not pairs:
        raise UserError("there is nothing to evaluate", "check the split file of the group")
    per_rank = -(-len(pairs) // (batch_examples * world_size))
    parts = per_rank * world_size
    cuts = [number * len(pairs) // parts for number in range(parts + 1)]
    batches = []
    for number in range(rank * per_rank, (rank + 1) * per_rank):
        part = pairs[cuts[number] : cuts[number + 1]]
        batch = collator([TaskChunk(task, 0, (example,), (0,)) for task, example in part or pairs[:1]])
        if not part:
            batch.labels.fill_(IGNORED)
            batch.example_ids = []
        batches.append(batch)
    return batches
