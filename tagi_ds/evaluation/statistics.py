"""How sure a score is: intervals, and the paired comparison of two results.

Examples of one task rise and fall together, so tasks are the unit of chance everywhere here. What is not covered is the
chance of the training's seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

RESAMPLES = 2000
"""Resamples of a bootstrap."""
FLIPS = 20_000
"""Random sign flips of a permutation test with more than EXACT units."""
EXACT = 13
"""Units up to which every one of the 2^n sign flips is counted."""
TEST = "paired sign-flip permutation over tasks, two-sided"
"""What `p_value` is, as results files say it."""

Units = Mapping[str, tuple[float, float]]
"""Name of a unit of chance (a task; of P3 a data set) -> (score, weight in the average)."""


def interval(units: Units, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the weighted average of `units` when they are drawn anew (percentile bootstrap)."""
    scores, weights = np.array(list(units.values()), dtype=float).T
    drawn = np.random.default_rng(seed).integers(len(scores), size=(resamples, len(scores)))
    means = (scores * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired(first: Units, second: Units) -> dict[str, Any]:
    """Compares two results on the same units.

    Under the hypothesis that neither is better, a unit's difference is as likely to have the other sign: the p-value
    is the share of sign flips whose average difference is at least as large as the observed one. With up to EXACT units
    all flips are counted; beyond, FLIPS random ones and the observed one.

    Returns:
        {"difference": first - second, "interval": [low, high] of it (bootstrap over units), "p_value", "tasks",
        "test"}.

    Raises:
        ValueError: the units or their weights differ.
    """
    if {name: weight for name, (_, weight) in first.items()} != {name: weight for name, (_, weight) in second.items()}:
        raise ValueError("the two results are not of the same tasks and examples")
    differences = {name: (first[name][0] - second[name][0], weight) for name, (_, weight) in first.items()}
    values, weights = np.array(list(differences.values()), dtype=float).T
    shares = values * weights / weights.sum()
    observed = shares.sum()
    low, high = interval(differences)
    return {
        "difference": float(observed),
        "interval": [low, high],
        "p_value": _p_value(shares, abs(observed)),
        "tasks": len(shares),
        "test": TEST,
    }


def _p_value(shares: np.ndarray, observed: float) -> float:
    exact = len(shares) <= EXACT
    if exact:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(shares))))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(FLIPS, len(shares)))
    # Equal sums differ in their last digits with the order of their terms.
    extreme = int((np.abs(signs @ shares) >= observed - 1e-9).sum())
    return extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
