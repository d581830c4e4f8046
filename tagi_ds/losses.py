"""The three losses, as sums; whoever trains divides them by global counts.

L = L_pred + λ1·KL(teacher || student) + λ2·MSE(teacher's adapter, generated adapter)   (paper, section 3.4)

Sums rather than means, so that neither the world size, nor accumulation, nor the grouping by task changes the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tagi_ds.model.adapter import LowRank

IGNORE = -100
"""Label of positions where nothing is to be predicted."""


class StoredDistributions(NamedTuple):
    """A teacher's distribution at every target position: its k likeliest tokens; the tail is one bucket.

    Attributes:
        ids: (N, T, k) int64; entries beyond the stored k have id -1.
        log_probs: (N, T, k) float32, at the store's temperature.
        tail: (N, T) float32, the mass of all other tokens.
        present: (N,) bool, which examples the store has.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    present: Tensor


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_pred: the summed negative log-likelihood of the target tokens, in nats.

    Args:
        logits: (N, T, V).
        labels: (N, T), -100 where nothing counts.
    """
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def kl_full(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ over target tokens of T²·KL(teacher || student) on whole vocabularies, in nats.

    Args:
        student, teacher: (N, T, V) logits.
        labels: (N, T); positions with -100 (padding) do not count.
        temperature: T. The factor T² keeps the gradient's size independent of it.
    """
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * divergence.masked_fill(labels == IGNORE, 0.0).sum()


def kl_stored(student: Tensor, teacher: StoredDistributions, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ over target tokens of T²·KL(teacher || student) over the stored entries and a remainder bucket, in nats.

    Lumping the tail into one bucket never overstates the divergence and is exact when the store holds the whole
    vocabulary.

    Args:
        student: (N, T, V) logits.
        teacher: what the store holds for these positions.
        labels: (N, T); positions with -100 (padding) and examples that the store lacks do not count.
        temperature: T, of the store and of the student.
    """
    log_q_all = (student.float() / temperature).log_softmax(-1)
    known = teacher.ids >= 0
    log_q = log_q_all.gather(-1, teacher.ids.clamp(min=0)).masked_fill(~known, -torch.inf)
    log_p = teacher.log_probs.float().masked_fill(~known, -torch.inf)
    p = log_p.exp()
    divergence = torch.where(known, p * (log_p - log_q), 0.0).sum(-1)
    # The student's tail is summed over the tokens themselves: 1 - Σq would cancel where the tail is small.
    listed = torch.zeros_like(log_q_all, dtype=torch.bool).scatter(-1, teacher.ids.clamp(min=0), known)
    log_q_rest = log_q_all.masked_fill(listed, -torch.inf).logsumexp(-1)
    tail = teacher.tail > 0
    log_q_rest = torch.where(tail, log_q_rest, 0.0)
    log_p_rest = torch.where(tail, teacher.tail, 1.0).log()
    divergence = divergence + teacher.tail * (log_p_rest - log_q_rest)
    counted = (labels != IGNORE) & teacher.present[:, None]
    return temperature**2 * divergence.masked_fill(~counted, 0.0).sum()


def factor_mse(
    generated: Mapping[str, LowRank],
    teacher: Mapping[str, LowRank],
    scaling: float,
    teacher_scaling: float,
    square: Mapping[str, float] | None = None,
) -> Tensor:
    """The paper's alignment: mean squared error over all entries of (A, scaling·B), for each task.

    Meaningful only between adapters of one gauge: (A, B) and (M·A, B·M⁻¹) are the same update.

    Args:
        generated: site -> factors of the U tasks.
        teacher: the same sites; a missing site is a KeyError.
        scaling, teacher_scaling: LoRA's alpha / r of either side, folded into B.
        square: unused, for one signature with :func:`product_mse`.

    Returns:
        (U,) float32.
    """
    errors, entries = torch.zeros(()), 0
    for site, target in teacher.items():
        a, b = generated[site]
        difference_a = a.float() - target.a.float()
        difference_b = scaling * b.float() - teacher_scaling * target.b.float()
        errors = errors.to(a.device) + difference_a.square().sum((1, 2)) + difference_b.square().sum((1, 2))
        entries += a[0].numel() + b[0].numel()
    return errors / max(entries, 1)


def product_mse(
    generated: Mapping[str, LowRank],
    teacher: Mapping[str, LowRank],
    scaling: float,
    teacher_scaling: float,
    square: Mapping[str, float] | None = None,
) -> Tensor:
    """Gauge-free alignment: the squared error of ΔW = scaling·B·A per site over the teachers' mean square, averaged.

    ‖BA - B'A'‖² = ⟨BᵀB, AAᵀ⟩ - 2⟨BᵀB', AA'ᵀ⟩ + ⟨B'ᵀB', A'A'ᵀ⟩, so only r x r matrices are formed. The cancellation
    leaves about 1e-6·‖ΔW‖² in fp32.

    Args:
        generated: site -> factors of the U tasks.
        teacher: the same sites; a missing site is a KeyError.
        scaling, teacher_scaling: LoRA's alpha / r of either side.
        square: site -> mean ‖ΔW‖² of the store's teachers; without it the batch's own mean.

    Returns:
        (U,) float32: 1 for a generated adapter of zero against an average teacher.
    """
    errors = []
    for site, target in teacher.items():
        a, b = (factor.float() for factor in generated[site])
        other_a, other_b = target.a.float(), target.b.float() * (teacher_scaling / scaling)

        def inner(b1: Tensor, b2: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
            return (torch.matmul(b1.mT, b2) * torch.matmul(a1, a2.mT)).sum((1, 2))

        own = inner(other_b, other_b, other_a, other_a)
        error = inner(b, b, a, a) - 2 * inner(b, other_b, a, other_a) + own
        size = square[site] / scaling**2 if square is not None else own.mean()
        errors.append(error.clamp(min=0.0) / (size + 1e-12))
    return torch.stack(errors).mean(0)


ALIGNMENTS = {"mse": factor_mse, "product": product_mse}


def alignment_weight(error: Tensor, weight: float | str) -> Tensor:
    """λ2 for each task: a constant, or the paper's sigmoid(stop_gradient(MSE)).

    The sigmoid is taken per task rather than over a batch, so that the loss does not depend on how tasks are grouped
    into micro-batches or dealt over ranks.

    Args:
        error: (U,).
        weight: a number or ``sigmoid``.
    """
    if weight == "sigmoid":
        return torch.sigmoid(error.detach())
    return torch.full_like(error, float(weight))
