"""What teachers of a bank are worth: losses over their own examples, looks at their validation shares, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.mixture import reference_of
from tagi_ds.evaluation.metrics import rouge_l
from tagi_ds.losses import IGNORE
from tagi_ds.model.head import Figures
from tagi_ds.reading import TargetReader
from tagi_ds.runs import runs_of
from tagi_ds.teachers.bank import TeacherBank
from tagi_ds.teachers.units import Unit

ANSWERED = 64
"""Validation examples of a unit, at the most, whose answers are generated for ROUGE-L."""

Row = tuple[int, Task, Example]
"""Number of a teacher, and one of its examples."""
Item = TypeVar("Item")


class Score(NamedTuple):
    """Validation loss in nats a token, and share of targets predicted whole."""

    loss: float
    exact: float


class Sums(NamedTuple):
    """(T,) each: negative log-likelihood in nats, target tokens, exact targets, targets; 0 for absent teachers."""

    nll: Tensor
    tokens: Tensor
    exact: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Asked:
    """A batch of N examples, and whose they are.

    Attributes:
        batch: on the bank's device.
        index: (N,) int64, each example's teacher.
        runs: (R,) int64, each run's teacher; None: all T of them in order (:class:`tagi_ds.model.adapter.TaskState`).
    """

    batch: Batch
    index: Tensor
    runs: Tensor | None


class Scorer:
    """Measures the teachers of a bank.

    Args:
        bank: T teachers.
        units: what each of them learns.
        collator: of the form ``input_only``.
        batch: examples measured together.
        seed: of the choice among an example's references.
    """

    def __init__(self, bank: TeacherBank, units: Sequence[Unit], collator: Collator, batch: int, seed: int) -> None:
        self.bank, self.units, self.collator, self.batch, self.seed = bank, units, collator, batch, seed

    def backward(self, rows: Sequence[Row]) -> None:
        """Adds the gradient of every teacher's loss, its mean over its own rows' target tokens.

        Batch by batch, of which none outlives its own backward pass; each token counts for what it is of all of its
        teacher's tokens, so that the batches' size changes nothing but the rounding.
        """
        parts = [self._collate(part) for part in self._parts(rows)]
        tokens = torch.stack([self._per_teacher(part.index, _real(part.batch).sum(1)) for part in parts]).sum(0)
        for part in parts:
            (self._sums(part).nll / tokens.clamp(min=1)).sum().backward()

    def _sums(self, asked: _Asked) -> Sums:
        """Each teacher's sums over its own examples, with gradients."""
        batch, index = asked.batch, asked.index
        reader = TargetReader(batch.labels)
        figures: Figures = self.bank(batch.input_ids, batch.attention_mask, batch.labels, asked.runs, reader)
        nll = figures.label.sum(1)
        real = _real(batch)
        # Under teacher forcing a target is predicted whole just where greedy decoding would write it.
        exact = (figures.right | ~real).all(1)
        columns = (nll, real.sum(1), exact, torch.ones_like(exact))
        return Sums(*(self._per_teacher(index, column) for column in columns))

    def _per_teacher(self, index: Tensor, column: Tensor) -> Tensor:
        """(T,) float32, the sum of a figure (N,) over each teacher's examples."""
        zeros = torch.zeros(len(self.units), dtype=torch.float32, device=index.device)
        return zeros.index_add(0, index, column.float())

    @torch.no_grad()
    def look(self, teachers: Sequence[int]) -> list[Score]:
        """The validation scores of some teachers, in their order."""
        if not teachers:
            return []
        places = [(i, place) for i in teachers for place in range(len(self.units[i].validation))]
        parts = [self._sums(self._collate(self._rows(part))) for part in self._parts(places)]
        nll, tokens, exact, targets = (torch.stack(column).sum(0).tolist() for column in zip(*parts, strict=True))
        return [Score(nll[i] / tokens[i], exact[i] / targets[i]) for i in teachers]

    @torch.no_grad()
    def rouge_l(self) -> list[float]:
        """Each teacher's mean ROUGE-L (0 to 1, best reference) over greedy answers to its first validation inputs."""
        places = [(i, at) for i, unit in enumerate(self.units) for at in range(min(ANSWERED, len(unit.validation)))]
        scores: list[list[float]] = [[] for _ in self.units]
        for part in self._parts(places):
            rows = self._rows(part)
            asked, longest = self._collate(rows), self.collator.config.max_target_tokens
            answers = self.bank.answer(asked.batch.input_ids, asked.batch.attention_mask, asked.runs, longest).cpu()
            texts = self.collator.tokenizer.batch_decode(answers, skip_special_tokens=True)
            for (i, _, example), text in zip(rows, texts, strict=True):
                scores[i].append(rouge_l(text, example.references))
        return [sum(values) / len(values) for values in scores]

    def _parts(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        return [items[at : at + self.batch] for at in range(0, len(items), self.batch)]

    def _rows(self, places: Sequence[tuple[int, int]]) -> list[Row]:
        return [(i, *self.units[i].validation[place]) for i, place in places]

    def _collate(self, rows: Sequence[Row]) -> _Asked:
        chunks = [TaskChunk(task, 0, (example,), (reference_of(example, self.seed),)) for _, task, example in rows]
        device = self.bank.b[0].device
        index = torch.tensor([teacher for teacher, _, _ in rows])
        # Every teacher's examples follow each other: its factors are read by runs, without a copy for each example.
        runs = runs_of(index)
        everyone = runs.tolist() == list(range(len(self.units)))
        return _Asked(self.collator(chunks).to(device), index.to(device), None if everyone else runs.to(device))


def _real(batch: Batch) -> Tensor:
    """(N, T) bool, where there is a target token."""
    return batch.labels != IGNORE
