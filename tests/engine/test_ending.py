"""What ends one rank ends all of them, with one status: also those that are blocked where they would not notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_ranks

BLOCKED = Path(__file__).with_name("blocked.py")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_those_that_are_blocked_with_its_status(failing: int) -> None:
    results = run_ranks(BLOCKED, 2, [str(failing), "error"], check=False, patience=30)
    assert results.statuses == [2, 2], results.text
    assert results.text.count("error: the memory does not suffice") == 1
    assert "has ended" not in results.text


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_is_killed_ends_those_that_are_blocked(failing: int) -> None:
    # Rank 0 takes the store along; of another rank the signs of life stop.
    results = run_ranks(BLOCKED, 2, [str(failing), "killed", "4"], check=False, patience=40)
    assert results.statuses[failing] == -9
    assert results.statuses[1 - failing] == 1, results.text
    assert f"error: rank {failing}" in results.outputs[1 - failing]
    assert "of this run has ended" in results.outputs[1 - failing]


def test_a_rank_that_leaves_as_it_should_is_not_taken_for_dead() -> None:
    assert run_ranks(BLOCKED, 2, ["1", "leaves", "2"]).statuses == [0, 0]


def test_every_group_waits_as_long_as_the_run_says() -> None:
    run_ranks(Path(__file__).with_name("granted.py"), 2, ["zero3"])
