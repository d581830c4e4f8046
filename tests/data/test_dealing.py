from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ds.data.dealing import LARGEST_SHARE, deal, step_cost

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
"""Ranks, micro-batches, equal share."""
MULTIPLE = 8


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, int, np.ndarray]:
    ranks, micro_batches, share = draw(SHAPES)
    row = st.tuples(st.integers(1, 3), st.integers(0, 300), st.integers(1, 900), st.integers(1, 120))
    count = ranks * micro_batches * share
    return ranks, micro_batches, share, np.array(draw(st.lists(row, min_size=count, max_size=count)))


def padded(lengths: np.ndarray, multiple: int = MULTIPLE) -> list[list[int]]:
    return [[row[0], *(-(-length // multiple) * multiple for length in row[1:])] for row in lengths.tolist()]


def in_order(ranks: int, micro_batches: int, share: int) -> list[list[list[int]]]:
    parts = np.arange(ranks * micro_batches * share).reshape(ranks, micro_batches, share)
    found: list[list[list[int]]] = parts.tolist()
    return found


def positions(rows: list[list[int]], dealt: list[list[list[int]]]) -> int:
    """Positions of all micro-batches, padding among them."""
    total = 0
    for part in (part for rank in dealt for part in rank):
        examples, instruction, given, target = np.array([rows[place] for place in part]).T
        total += len(part) * instruction.max() + examples.sum() * (given.max() + target.max())
    return int(total)


@given(batches())
@settings(max_examples=150, deadline=None)
def test_every_chunk_is_dealt_once_and_no_micro_batch_is_empty_or_large(
    batch: tuple[int, int, int, np.ndarray],
) -> None:
    ranks, micro_batches, share, lengths = batch
    dealt = deal(lengths, ranks, micro_batches, MULTIPLE)
    assert [len(rank) for rank in dealt] == [micro_batches] * ranks
    parts = [part for rank in dealt for part in rank]
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    for part in parts:
        assert part == sorted(part)
        assert 1 <= len(part) <= LARGEST_SHARE * share


@given(batches())
@settings(max_examples=150, deadline=None)
def test_a_step_is_never_slower_than_with_equal_parts_in_order(batch: tuple[int, int, int, np.ndarray]) -> None:
    ranks, micro_batches, share, lengths = batch
    dealt = deal(lengths, ranks, micro_batches, MULTIPLE)
    plain = in_order(ranks, micro_batches, share)
    assert step_cost(lengths, dealt, MULTIPLE) <= step_cost(lengths, plain, MULTIPLE)


@given(batches())
@settings(max_examples=60, deadline=None)
def test_every_rank_computes_the_same(batch: tuple[int, int, int, np.ndarray]) -> None:
    ranks, micro_batches, _, lengths = batch
    dealt = deal(lengths, ranks, micro_batches, MULTIPLE)
    assert dealt == deal(lengths.astype(np.int32).copy(), ranks, micro_batches, MULTIPLE)


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "share", "waiting", "padding"),
    [(1, 2, 8, 0.85, 0.85), (1, 8, 8, 0.7, 0.7), (8, 1, 8, 0.65, 0.7), (4, 4, 2, 0.75, 0.95), (8, 2, 1, 0.85, 1.0)],
)
def test_positions_and_waiting_of_long_tailed_lengths(
    ranks: int, micro_batches: int, share: int, waiting: float, padding: float
) -> None:
    """Of 40 global batches together, relative to equal parts in order, by the bounds of each case."""
    random = np.random.default_rng(0)
    cost, area = np.zeros(2), np.zeros(2)
    for _ in range(40):
        count = ranks * micro_batches * share
        tails = random.lognormal([3.5, 4.5, 1.5], [0.5, 0.8, 0.7], (count, 3)).astype(int) + 1
        lengths = np.column_stack([np.ones(count, dtype=int), tails])
        rows, both = padded(lengths), (deal(lengths, ranks, micro_batches), in_order(ranks, micro_batches, share))
        cost += [step_cost(lengths, dealt) for dealt in both]
        area += [positions(rows, dealt) for dealt in both]
    assert cost[0] <= waiting * cost[1]
    assert area[0] <= padding * area[1]


def test_long_texts_meet_in_a_small_micro_batch_at_the_same_time_on_every_rank() -> None:
    given = [30, 900, 20, 40, 800, 25, 35, 30]
    lengths = np.array([(1, 10, length, 5) for length in given])
    dealt = deal(lengths, 2, 2)
    assert [rank[0] for rank in dealt] == [[1], [4]]
    assert sorted(len(rank[1]) for rank in dealt) == [2, 4]


def test_lengths_that_are_all_alike_are_dealt_in_order() -> None:
    lengths = np.array([(1, 12, 5 + place % 3, 5) for place in range(32)])
    assert deal(lengths, 2, 2) == in_order(2, 2, 8)


def test_one_process_with_one_micro_batch_keeps_the_order() -> None:
    lengths = np.array([(1, 3, length, 2) for length in (5, 900, 7)])
    assert deal(lengths, 1, 1) == [[[0, 1, 2]]]
