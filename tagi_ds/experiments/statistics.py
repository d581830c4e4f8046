"""Means and intervals over seeds and tasks together, both being drawn from many.

A score x_st of seed s on task t is taken as a mean plus a seed's effect, a task's, and what is left. With S seeds and T
tasks the grand mean's variance is s²(seed means) / S + s²(task means) / T - s²(rest) / (S T): the first two each hold
what is left once, so it is taken off once. The interval is Student's, with Satterthwaite's degrees of freedom; five
seeds are too few for a bootstrap over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tagi_ds.evaluation.statistics import Units

_LEVEL = 0.975
"""Of the upper end of a two-sided 95 % interval."""
_NOTHING = 1e-20
"""A variance of percentages that is rounding alone."""


def mean_of(results: Sequence[Units]) -> float:
    """The average over seeds of each result's weighted average over tasks."""
    scores, weights = _table(results)
    return float((scores @ weights).mean())


def seeds_and_tasks_interval(results: Sequence[Units]) -> tuple[float, float]:
    """95 % interval of :func:`mean_of` for other seeds and other tasks; (nan, nan) for a single score.

    Of one seed it is for other tasks alone, and of one task for other seeds alone.

    Args:
        results: one a seed, all of the same tasks: task -> (score, weight in the average).

    Raises:
        ValueError: the results are not of the same tasks.
    """
    mean, variance, freedom = _estimate(results)
    if math.isnan(variance):
        return math.nan, math.nan
    if variance < _NOTHING:
        return mean, mean
    half = student_quantile(freedom) * math.sqrt(variance)
    return mean - half, mean + half


def seeds_and_tasks_p_value(results: Sequence[Units]) -> float:
    """Two-sided p-value of a true :func:`mean_of` of 0 for other seeds and other tasks; nan for a single seed.

    Args:
        results: differences of two methods, one a seed: task -> (difference, weight in the average).

    Raises:
        ValueError: the results are not of the same tasks.
    """
    if len(results) == 1:
        return math.nan
    mean, variance, freedom = _estimate(results)
    if variance < _NOTHING:
        return 1.0 if mean**2 < _NOTHING else 0.0
    return max(0.0, 2 * (1 - _student_below(abs(mean) / math.sqrt(variance), freedom)))


def differences(first: Sequence[Units], second: Sequence[Units]) -> list[Units]:
    """First minus second, seed by seed and task by task.

    Raises:
        ValueError: the results are not of the same tasks.
    """
    found: list[Units] = []
    for mine, other in zip(first, second, strict=True):
        _table([mine, other])
        found.append({name: (score - other[name][0], weight) for name, (score, weight) in mine.items()})
    return found


def _estimate(results: Sequence[Units]) -> tuple[float, float, float]:
    """Grand mean, its variance for other seeds and tasks (nan: of a single score), degrees of freedom."""
    scores, weights = _table(results)
    seeds, tasks = scores.shape
    mean = float((scores @ weights).mean())
    if seeds == tasks == 1:
        return mean, math.nan, math.nan
    # The weighted mean of independent terms of variance v has the variance v times the sum of squared weights.
    shares = float((weights**2).sum())
    of_seeds = float((scores @ weights).var(ddof=1)) / seeds if seeds > 1 else 0.0
    of_tasks = float(scores.mean(axis=0).var(ddof=1)) * shares if tasks > 1 else 0.0
    rest = 0.0
    if seeds > 1 and tasks > 1:
        left = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
        rest = float((left**2).sum()) / ((seeds - 1) * (tasks - 1)) * shares / seeds
    # An estimate: where the rest is all there is, it may come out above the sum.
    variance = max(of_seeds + of_tasks - rest, of_seeds, of_tasks)
    spread = of_seeds**2 / max(1, seeds - 1) + of_tasks**2 / max(1, tasks - 1)
    return mean, variance, variance**2 / spread if spread > 0 else math.nan


def over_seeds(results: Sequence[Units]) -> Units:
    """Each task's average over the seeds, for a paired test over tasks."""
    scores, _ = _table(results)
    return {
        name: (float(score), results[0][name][1]) for name, score in zip(results[0], scores.mean(axis=0), strict=True)
    }


def student_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t with any number of degrees of freedom above 0, to about 1e-6."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, freedom) < _LEVEL else (low, middle)
    return high


def _student_below(x: float, freedom: float) -> float:
    """P(t <= x) for x >= 0: the density integrated over the angle atan(t / sqrt(freedom)), where it is smooth."""
    angles = np.linspace(0.0, math.atan(x / math.sqrt(freedom)), 2001)
    values = np.cos(angles) ** (freedom - 1)
    simpson = values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum()
    area = simpson * (angles[1] - angles[0]) / 3
    logarithm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    return 0.5 + area * math.exp(logarithm)


def _table(results: Sequence[Units]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (seeds, tasks) and the tasks' shares of the average."""
    names = list(results[0])
    weights = {name: weight for name, (_, weight) in results[0].items()}
    if any({name: weight for name, (_, weight) in units.items()} != weights for units in results):
        raise ValueError("the seeds were not evaluated on the same tasks and examples")
    scores = np.array([[units[name][0] for name in names] for units in results], dtype=float)
    shares = np.array([weights[name] for name in names], dtype=float)
    return scores, shares / shares.sum()
