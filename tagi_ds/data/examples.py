"""The words of the data layer: a task, its examples, and a batch grouped by task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One instance of a task.

    Attributes:
        id: unique over the data set; the key of the logit store.
        input: the bare input, without the instruction.
        references: acceptable outputs, at least one.
    """

    id: str
    input: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One task: what the instruction says, and its instances.

    Attributes:
        name: unique over the data set (SNI: the file's stem).
        definition: the instruction's wording.
        paraphrases: further wordings of the definition, possibly none.
        category: the unit of a category teacher.
        positives: demonstrations (input, output) that may be part of the instruction.
        examples: the instances.
    """

    name: str
    definition: str
    category: str
    examples: tuple[Example, ...]
    paraphrases: tuple[str, ...] = ()
    positives: tuple[tuple[str, str], ...] = ()


@dataclass
class Batch:
    """N examples of U tasks, N >= U; token ids are padded right with 0, labels with -100.

    Attributes:
        input_ids, attention_mask: (N, L) int64: the bare input, or instruction + input for concatenating models.
        labels: (N, T) int64.
        instruction_ids, instruction_attention_mask: (U, S) int64, or None for concatenating models.
        task_index: (N,) int64: which of the U instructions an example has.
        example_ids: N ids, for the logit store.
        tasks: U task names; units: U teacher units (category or task name), for the parameter store.
        teacher: tensors that a store attached (see tagi_ds.teachers.distillation).
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

        return Batch(**{key: move(value) for key, value in vars(self).items()})
