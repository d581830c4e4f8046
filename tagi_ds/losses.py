"""The alignment terms, as sums; whoever trains divides them by global counts.

L = L_pred + λ1·KL(teacher || student) + λ2·MSE(teacher's adapter, generated adapter)   (paper, section 3.4)

L_pred and the KL are read off the same logits, in :mod:`tagi_ds.reading` and :mod:`tagi_ds.divergence`.

Sums rather than means, so that neither the world size, nor accumulation, nor the grouping by task changes the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tagi_ds.model.adapter import LowRank

IGNORE = -100
"""Label of positions where nothing is to be predicted."""


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


def alignment_share(form: str, sites: Mapping[str, LowRank], teacher: Mapping[str, LowRank]) -> float:
    """Share that some sites have in the mean over all of the teacher's: by entries for `mse`, by sites for `product`.

    The errors of disjoint sites, each times its share, add up to the error of all.
    """
    if form == "product":
        return len(sites) / len(teacher)

    def entries(factors: Mapping[str, LowRank]) -> int:
        return sum(a[0].numel() + b[0].numel() for a, b in factors.values())

    return entries(sites) / entries(teacher)


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
