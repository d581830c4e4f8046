"""The words of the data layer: a task, its examples, and a batch grouped by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tagi_ds.config import Unit
from tagi_ds.runs import runs_of


@dataclass(frozen=True)
class Example:
    """One instance of a task.

    Attributes:
        id: unique over the data set; the key of the logit store.
        input: the bare input, without the instruction.
        references: acceptable outputs, at least one.
        choices: the answers among which rank classification chooses; empty for open answers.
        rendered: the whole prompt as published, where it is more than instruction + input (P3); what a
            concatenating model reads.
    """

    id: str
    input: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    rendered: str | None = None


class Extent(NamedTuple):
    """How long an example's texts are, in bytes of UTF-8: known of an indexed one without reading it.

    Attributes:
        input: of the bare input.
        rendered: of the whole prompt as published; 0 where there is none.
        reference: of the references, their mean rounded down.
    """

    input: int
    rendered: int
    reference: int


def extent_of(examples: Sequence[Example], at: int) -> Extent:
    """The extent of one of some examples, from an index where they lie in one."""
    known: Callable[[int], Extent] | None = getattr(examples, "extent", None)
    if known is not None:
        return known(at)
    example = examples[at]
    references = sum(len(reference.encode()) for reference in example.references) // len(example.references)
    return Extent(len(example.input.encode()), len((example.rendered or "").encode()), references)


@dataclass(frozen=True)
class Demonstration:
    """A worked example in an instruction, right or wrong, with the reason if one is given (it may be empty)."""

    input: str
    output: str
    explanation: str | None = None


@dataclass(frozen=True)
class Task:
    """One task: what the instruction says, and its instances.

    Attributes:
        name: unique over the data set (SNI: the file's stem).
        definition: the instruction's wording.
        category: the unit of a category teacher.
        examples: the instances; a sequence that reads them from the index when they are asked for.
        paraphrases: further wordings of the definition, possibly none.
        positives, negatives: demonstrations that may be part of the instruction.
        source: the data set that the task was made from (P3: `anli`; SNI: its first `Source`).
        collection: `sni` or `p3`.
    """

    name: str
    definition: str
    category: str
    examples: Sequence[Example]
    paraphrases: tuple[str, ...] = ()
    positives: tuple[Demonstration, ...] = ()
    negatives: tuple[Demonstration, ...] = ()
    source: str = ""
    collection: str = "sni"


UNCATEGORISED = "Uncategorised"
"""Category of a task of SNI whose data name none."""


def without_categories(tasks: Sequence[Task]) -> bool:
    """Whether none of several tasks of SNI names its category: nothing can then be done by category."""
    found = [task.category for task in tasks if task.collection == "sni"]
    return len(found) > 1 and set(found) == {UNCATEGORISED}


def unit_of(task: Task, unit: Unit) -> str:
    """Name of the teacher unit that a task belongs to."""
    return {"category": task.category, "task": task.name, "source": task.source}[unit]


COUNTS = (
    "truncated_instruction",
    "truncated_input",
    "truncated_target",
    "fewer_demonstrations",
    "too_short",
    "malformed",
    "undistilled",
    "unaligned",
)
"""What a batch reports of its making: texts cut, instructions (or inputs that hold them) without
some of their demonstrations for want of room, documents passed over as too short, rows passed over as malformed,
examples without the distribution and without the teacher's adapter that the loss asks for."""


@dataclass
class Batch:
    """N examples of U tasks, N >= U; token ids are padded right with 0, labels with -100.

    Attributes:
        input_ids, attention_mask: (N, L) int64: the bare input, or instruction + input for concatenating models.
        labels: (N, T) int64.
        instruction_ids, instruction_attention_mask: (U, S) int64, or None for concatenating models.
        instruction_encoding: (U, S, d), the encoder's output for them where it is kept (see tagi_ds.encodings).
        task_index: (N,) int64: which of the U instructions an example has.
        example_ids: N ids, for the logit store.
        tasks: U task names; units: U teacher units (category or task name), for the parameter store.
        teacher: tensors that a store attached (see tagi_ds.teachers.distillation).
        counts: some of COUNTS, for the metrics.
        runs: (R,) int64: `task_index` by runs of examples, see :func:`tagi_ds.runs.runs_of`; None: each of the U
            instructions has one run, in their order. Found while the batch is on the CPU, so that no step waits for it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    instruction_ids: Tensor | None = None
    instruction_attention_mask: Tensor | None = None
    task_index: Tensor | None = None
    example_ids: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    teacher: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    instruction_encoding: Tensor | None = None
    runs: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        index, instructions = self.task_index, self.instruction_ids
        if index is None or index.device.type != "cpu" or instructions is None:
            self.runs = index
            return
        found = runs_of(index)
        self.runs = None if torch.equal(found, torch.arange(len(instructions))) else found

    @property
    def target_tokens(self) -> int:
        """Target tokens that count in the loss."""
        return int((self.labels != -100).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            if isinstance(value, tuple):
                moved = [move(item) for item in value]
                # A named tuple stays one: losses read what stores attach by its fields.
                return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
            return value

        moved = {key: move(value) for key, value in vars(self).items()}
        runs = moved.pop("runs")
        batch = Batch(**moved)
        batch.runs = runs
        return batch
