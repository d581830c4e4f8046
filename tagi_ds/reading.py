"""What training takes from logits: labels' likelihoods, divergences from a teacher, and what is predicted right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tagi_ds.divergence import Distributions, FullDistributions, Listed, softened
from tagi_ds.losses import IGNORE
from tagi_ds.model.head import Chunk, Pull


class TargetReader:
    """Reads the logits of target positions (:class:`tagi_ds.model.head.Reader`): the label's figure, the teacher's.

    Labels and a store's distributions at temperature 1 are read off one softmax, a teacher at another temperature off a
    second one.

    Args:
        labels: (N, T), -100 where nothing is to be predicted.
        teacher: its distributions at the same positions, if any; examples that it lacks have a divergence of 0.
        temperature: T, of the teacher and of the student. The divergence is times T², which keeps the gradient's size
            independent of it.
    """

    def __init__(self, labels: Tensor, teacher: Distributions | None = None, temperature: float = 1.0) -> None:
        self.shape = labels.shape
        self.positions = (labels.flatten() != IGNORE).nonzero().flatten()
        self.labels = labels.flatten()[self.positions]
        self.temperature = temperature
        self._full = teacher if isinstance(teacher, FullDistributions) else None
        self.sparse = self._full is None
        # Temperature and factor of each list.
        self._lists: list[tuple[Listed, float, float]] = []
        if teacher is None or isinstance(teacher, FullDistributions):
            self._lists = [(Listed.of_labels(self.labels), 1.0, 1.0)]
        elif temperature == 1.0:
            self._lists = [(teacher.listed(self.positions).with_labels(self.labels), 1.0, 1.0)]
        else:
            stored = teacher.listed(self.positions).joined(self.labels)
            self._lists = [(Listed.of_labels(self.labels), 1.0, 1.0), (stored, temperature, temperature**2)]
        # Alone, a list may write over the logits.
        self._alone = self.sparse and len(self._lists) == 1

    def read(self, logits: Tensor, part: slice) -> Chunk:
        """See `Reader`."""
        right = logits.argmax(-1) == self.labels[part]
        # Made wider in a copy, which one list alone may write over as it may over the logits themselves.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values: list[Tensor] = []
        others: list[Tensor] = []
        kept: list[Tensor] = []
        if self._full is not None:
            teacher = self._full.rows(self.positions[part])
            divergence = self.temperature**2 * teacher.divergence(logits, self.temperature)
            values.append(divergence.masked_fill(~teacher.present, 0.0)[None])
        for listed, temperature, factor in reversed(self._lists):
            rows = listed.rows(part)
            split = rows.split(wide if self._alone else softened(wide, temperature))
            values.insert(0, factor * rows.divergence(split.log_listed, split.log_rest))
            others.insert(0, split.others)
            kept[:0] = [split.log_listed, split.log_rest]
        return Chunk(torch.cat(values), right, others, kept)

    def pull(self, kept: Sequence[Tensor], part: slice, grads: Tensor) -> Pull:
        """See `Reader`; without the part of a whole distribution's teacher."""
        factors, places, numbers, first = [], [], [], 0
        for number, (listed, temperature, factor) in enumerate(self._lists):
            rows = listed.rows(part)
            mine = grads[first : first + len(rows.tail)] * (factor / temperature)
            first += len(rows.tail)
            at_rest, at_listed = rows.pull(kept[2 * number], kept[2 * number + 1], mine)
            factors.append(at_rest)
            places.append(rows.places)
            numbers.append(at_listed)
        return Pull(factors, torch.cat(places, -1), torch.cat(numbers, -1))

    def gradient(self, logits: Tensor, part: slice, grads: Tensor) -> Tensor:
        """See `Reader`."""
        chunk = self.read(logits, part)
        factors, places, numbers = self.pull(chunk.kept, part, grads)
        gradient = chunk.others[0].mul_(factors[0][:, None])
        for factor, others in zip(factors[1:], chunk.others[1:], strict=True):
            gradient.addcmul_(factor[:, None], others)
        gradient.scatter_add_(-1, places, numbers)
        if self._full is not None:
            teacher = self._full.rows(self.positions[part])
            scale = (grads[-1] * self.temperature**2).masked_fill(~teacher.present, 0.0)
            gradient.addcmul_(scale[:, None], teacher.gradient(logits, self.temperature))
        return gradient
