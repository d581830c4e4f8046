"""Wrong labels on purpose, for studies of how training bears them (noisy labels are where distillation should pay)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import overload

from tagi_ds.data.examples import Example, Task
from tagi_ds.data.order import choose

_GRAIN = 1_000_000


def with_label_noise(tasks: Sequence[Task], share: float, seed: int) -> list[Task]:
    """The same tasks with the references of some examples replaced by those of another example of the same task.

    So a wrong label is a plausible answer to the task. Which examples are chosen, and whose references they get,
    depends on the seed and their ids; with a larger share those of a smaller one are among them. A task of one
    example stays as it is; where the other example has the same answer, the label stays right.

    Args:
        tasks: the training tasks.
        share: of the examples, 0 to 1.
        seed: of the run.
    """
    if not share:
        return list(tasks)
    return [dataclasses.replace(task, examples=NoisyExamples(task.examples, share, seed)) for task in tasks]


class NoisyExamples(Sequence[Example]):
    """A task's examples, some with another one's references; read when they are asked for.

    Args:
        clean, share, seed: as of :func:`with_label_noise`.
    """

    def __init__(self, clean: Sequence[Example], share: float, seed: int) -> None:
        self._clean, self._share, self._seed = clean, share, seed

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the content, from the clean examples' own where they know it."""
        known = getattr(self._clean, "fingerprint", None) or repr(list(self._clean))
        return hashlib.sha256(f"{known}/{self._share}/{self._seed}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._clean)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[index] for index in range(len(self))[at]]
        example = self._clean[at]
        if len(self) < 2 or choose(_GRAIN, self._seed, "label noise", example.id) >= self._share * _GRAIN:
            return example
        step = 1 + choose(len(self) - 1, self._seed, "wrong label", example.id)
        return dataclasses.replace(example, references=self._clean[(at + step) % len(self)].references)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoisyExamples) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)
