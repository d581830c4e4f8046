"""Means and intervals over seeds and tasks, against closed forms and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ds.evaluation.statistics import Units
from tagi_ds.experiments.statistics import (
    differences,
    mean_of,
    over_seeds,
    seeds_and_tasks_interval,
    seeds_and_tasks_p_value,
    student_quantile,
)


def units(scores: list[float], weights: list[float] | None = None) -> Units:
    weights = weights or [1.0] * len(scores)
    return {f"t{number}": pair for number, pair in enumerate(zip(scores, weights, strict=True))}


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062047), (2, 4.3026527), (4, 2.7764451), (30, 2.0422725), (1e5, 1.9599877)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=2e-6)


def test_one_seed_is_students_interval_over_tasks() -> None:
    scores = [10.0, 20.0, 40.0, 70.0, 60.0]
    half = 2.7764451 * np.std(scores, ddof=1) / math.sqrt(5)
    assert mean_of([units(scores)]) == pytest.approx(40.0)
    assert seeds_and_tasks_interval([units(scores)]) == pytest.approx((40.0 - half, 40.0 + half))


def test_one_task_is_students_interval_over_seeds() -> None:
    results = [units([score]) for score in (10.0, 20.0, 60.0)]
    half = 4.3026527 * np.std([10.0, 20.0, 60.0], ddof=1) / math.sqrt(3)
    assert seeds_and_tasks_interval(results) == pytest.approx((30.0 - half, 30.0 + half))


def test_effects_of_seeds_and_tasks_alone_add_their_variances() -> None:
    seeds, tasks = np.array([0.0, 3.0, 6.0]), np.array([10.0, 20.0, 60.0, 30.0])
    results = [units(list(tasks + seed)) for seed in seeds]
    a, b = seeds.var(ddof=1) / 3, tasks.var(ddof=1) / 4
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 3)
    half = student_quantile(freedom) * math.sqrt(a + b)
    assert seeds_and_tasks_interval(results) == pytest.approx((33.0 - half, 33.0 + half))


def test_scores_that_are_all_alike_have_no_width_and_a_single_one_has_none() -> None:
    assert seeds_and_tasks_interval([units([50.0, 50.0])] * 3) == (50.0, 50.0)
    assert all(map(math.isnan, seeds_and_tasks_interval([units([50.0])])))


def test_p_values_are_those_of_the_tables_and_of_the_interval() -> None:
    # Student's t of four degrees of freedom: 2.1318 has 5 % above it, 3.7469 1 %.
    for quantile, expected in ((2.1318468, 0.1), (3.7469474, 0.02), (0.0, 1.0)):
        scores = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
        shift = quantile * scores.std(ddof=1) / math.sqrt(5)
        for sign in (1, -1):
            seeds = [units([sign * (score + shift)]) for score in scores]
            assert seeds_and_tasks_p_value(seeds) == pytest.approx(expected, abs=1e-6)
    assert seeds_and_tasks_p_value([units([1e9, 1e9 + 1])] * 2) >= 0
    assert math.isnan(seeds_and_tasks_p_value([units([3.0, 4.0])])), "one seed"
    assert seeds_and_tasks_p_value([units([3.0, 3.0])] * 2) == 0.0
    assert seeds_and_tasks_p_value([units([0.0, 0.0])] * 2) == 1.0


def test_a_backbone_that_both_share_leaves_their_difference() -> None:
    rng = np.random.default_rng(1)
    shared, tasks = rng.normal(0, 20, (4, 1)), rng.normal(0, 20, (1, 6))
    own = rng.normal(0, 1, (4, 6))
    first, second = ([units(list(row)) for row in 50 + shared + tasks + own + gain] for gain in (0, 5))
    apart = differences(second, first)
    assert seeds_and_tasks_interval(apart) == pytest.approx((5.0, 5.0))
    apart = differences(first, [units(list(row)) for row in 50 + shared + tasks])
    expected = [{name: (value, 1.0) for name, value in zip(apart[0], row, strict=True)} for row in own]
    assert seeds_and_tasks_interval(apart) == pytest.approx(seeds_and_tasks_interval(expected))
    with pytest.raises(ValueError, match="same tasks"):
        differences([units([1.0, 2.0])], [units([1.0])])


def test_a_difference_that_is_none_is_found_in_one_of_twenty() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(300):
        scores = rng.normal(0, 3, (5, 1)) + rng.normal(0, 6, (1, 40)) + rng.normal(0, 8, (5, 40))
        found += seeds_and_tasks_p_value([units(list(row)) for row in scores]) < 0.05
    assert 0.015 <= found / 300 <= 0.09


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        scores = 50 + rng.normal(0, 3, (5, 1)) + rng.normal(0, 12, (1, 40)) + rng.normal(0, 8, (5, 40))
        low, high = seeds_and_tasks_interval([units(list(row)) for row in scores])
        hits += low <= 50 <= high
    assert 0.91 <= hits / 300 <= 0.985


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(1, 20), min_size=3, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_means_are_weighted_and_lie_within_their_interval(table: list[list[float]], weights: list[int]) -> None:
    results = [units(row, [float(weight) for weight in weights]) for row in table]
    expected = np.average(np.array(table), axis=1, weights=weights).mean()
    assert mean_of(results) == pytest.approx(expected)
    low, high = seeds_and_tasks_interval(results)
    assert low - 1e-9 <= expected <= high + 1e-9
    averaged = over_seeds(results)
    assert [score for score, _ in averaged.values()] == pytest.approx(list(np.mean(table, axis=0)))
    assert [weight for _, weight in averaged.values()] == weights


def test_seeds_on_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="same tasks"):
        mean_of([units([1.0, 2.0]), units([1.0])])
