"""Intervals and the paired comparison against counting by hand and against theory."""

import itertools
import random

import numpy as np
import pytest

from tagi_ds.evaluation.metrics import average
from tagi_ds.evaluation.statistics import EXACT, interval, paired


def test_the_interval_is_that_of_the_mean_over_tasks() -> None:
    rng = random.Random(0)
    scores = [rng.gauss(50, 10) for _ in range(100)]
    units = {str(at): (score, 5.0) for at, score in enumerate(scores)}
    low, high = interval(units)
    mean = sum(scores) / 100
    error = (sum((score - mean) ** 2 for score in scores) / 99) ** 0.5 / 10
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3)
    assert interval(units) == (low, high)
    assert interval({"a": (30.0, 7.0)}) == (30, 30)


def test_the_interval_weighs_tasks_by_their_examples() -> None:
    per_task = {"big": {"rouge_l": 100.0, "examples": 99}, "small": {"rouge_l": 0.0, "examples": 1}}
    # Drawn twice from two tasks: both big (100), both small (0), or one of each (99).
    units = {name: (task["rouge_l"], task["examples"]) for name, task in per_task.items()}
    assert interval(units, resamples=500) == (0, 100)
    assert average({key: {**task, "exact_match": 0.0} for key, task in per_task.items()})["rouge_l"] == 99


def _units(scores: list[float], weights: list[float] | None = None) -> dict[str, tuple[float, float]]:
    weights = weights or [1.0] * len(scores)
    return {f"t{at}": pair for at, pair in enumerate(zip(scores, weights, strict=True))}


def test_the_p_value_counts_every_sign_flip() -> None:
    first, second, weights = [3.0, 5.0, 1.0, 8.0, 2.0], [1.0, 6.0, 0.0, 2.0, 2.0], [1.0, 2.0, 1.0, 4.0, 3.0]
    found = paired(_units(first, weights), _units(second, weights))
    shares = [(a - b) * w / sum(weights) for a, b, w in zip(first, second, weights, strict=True)]
    flips = list(itertools.product((1, -1), repeat=5))
    sums = [sum(sign * share for sign, share in zip(signs, shares, strict=True)) for signs in flips]
    extreme = [abs(flipped) >= abs(sum(shares)) - 1e-12 for flipped in sums]
    assert found["p_value"] == sum(extreme) / 32
    assert found["difference"] == pytest.approx(sum(shares))
    assert found["tasks"] == 5
    low, high = found["interval"]
    assert low <= found["difference"] <= high
    back = paired(_units(second, weights), _units(first, weights))
    assert (back["difference"], back["p_value"]) == (-found["difference"], found["p_value"])


def test_equal_results_differ_by_nothing() -> None:
    same = _units([1.0, 2.0, 3.0])
    assert paired(same, same) | {"test": ""} == {
        "difference": 0.0,
        "interval": [0.0, 0.0],
        "p_value": 1.0,
        "tasks": 3,
        "test": "",
    }


@pytest.mark.parametrize("count", [EXACT, 40])
def test_by_chance_small_p_values_are_as_rare_as_they_say(count: int) -> None:
    rng = np.random.default_rng(1)
    values = []
    for _ in range(60):
        scores = rng.normal(50, 10, size=(2, count))
        values.append(paired(_units(scores[0].tolist()), _units(scores[1].tolist()))["p_value"])
    assert sum(value <= 0.05 for value in values) <= 9  # 3 expected; more than 9 in one of 1,000 cases
    assert 0.3 < sum(values) / len(values) < 0.7


def test_a_steady_difference_is_found_and_the_interval_excludes_zero() -> None:
    rng = random.Random(0)
    first = [rng.gauss(50, 10) for _ in range(40)]
    second = [score - 2 + rng.gauss(0, 1) for score in first]
    found = paired(_units(first), _units(second))
    assert found["p_value"] < 0.001
    assert found["interval"][0] > 0
    unpaired = interval(_units(first))
    assert unpaired[1] - unpaired[0] > 2 * (found["interval"][1] - found["interval"][0]), "pairing takes out the tasks"


@pytest.mark.parametrize("other", [_units([1.0]), _units([1.0, 2.0], [1.0, 3.0])])
def test_other_tasks_or_sizes_are_refused(other: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="same tasks"):
        paired(_units([1.0, 2.0]), other)
