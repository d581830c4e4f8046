"""The naive form of the losses: logits of all positions and tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from tagi_ds.data.examples import Batch
from tagi_ds.divergence import Distributions
from tagi_ds.engine.objective import Term
from tagi_ds.losses import IGNORE
from tagi_ds.model.head import Figures
from tagi_ds.objectives import TagiObjective


class WholeLogits(TagiObjective):
    """The objective of training, its figures taken from logits (N, T, V)."""

    @classmethod
    def of(cls, objective: TagiObjective) -> WholeLogits:
        """The naive form of an objective."""
        return cls(
            objective.config,
            objective.scaling,
            objective.temperature,
            objective.teacher_scaling,
            objective.mean_square,
            objective.online,
        )

    def __call__(self, model: Callable[..., Any], batch: Batch) -> dict[str, Term]:
        """The terms of one micro-batch."""
        output = model(**self.inputs(batch))
        teacher = self._distributions(batch) if self.config.kl > 0 else None
        figures = whole_figures(output.logits, batch.labels, teacher, self.temperature)
        return self.terms(figures, batch, self.alignment_errors(output.state.adapters, batch))


def whole_figures(logits: Tensor, labels: Tensor, teacher: Distributions | None, temperature: float) -> Figures:
    """What :class:`tagi_ds.reading.TargetReader` takes from the same logits (N, T, V)."""
    counts = labels != IGNORE
    label = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    divergence = None
    if teacher is not None:
        everywhere = temperature**2 * teacher.divergence(logits, temperature)
        divergence = everywhere.masked_fill(~(counts & teacher.present[:, None]), 0.0)
    return Figures(label, divergence, (logits.argmax(-1) == labels) & counts)
