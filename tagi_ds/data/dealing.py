"""Dealing a global batch to ranks and micro-batches by length.

Rows of a micro-batch are padded to its longest, and ranks wait for the slowest of them. Chunks are therefore sorted by
length and cut into consecutive blocks of about equal cost rather than equal number: long ones meet in small
micro-batches, short ones in large ones. Equal numbers would save padding too, but no time where each rank has one
micro-batch: all others would wait for the one with the longest rows (docs/log.md has the figures).

What a global batch holds is not touched, and losses are normalised by its counts, so dealing changes no curve beyond
rounding. Everything is whole numbers: each rank computes the dealing for itself, and all must come to the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

LARGEST_SHARE = 2
"""Chunks of a micro-batch at the most, as a multiple of the equal share: each brings a task's adapters with it, whose
memory does not depend on lengths. Without a bound nothing more was saved."""
_INSTRUCTION, _INPUT, _TARGET = 1, 2, 3
"""Cost of a position. Instructions go through the frozen encoder forward alone, inputs also backward; targets further
through cross-attention and the head."""
_PRECISION = 6
"""Bits to which the least bound on a micro-batch's cost is sought."""

_Row = Sequence[int]
"""Of a chunk: its examples, and the padded lengths of its instruction, longest input and longest target."""


def deal(lengths: np.ndarray, ranks: int, micro_batches: int, multiple: int = 8) -> list[list[list[int]]]:
    """Deals the chunks of a global batch.

    The costliest micro-batches come first, and those that all ranks have at the same time are neighbours in length.
    By the lengths that are given, the time until the last rank is through is never more than with equal numbers in
    the batch's order, which are dealt where that is no slower.

    Args:
        lengths: (chunks, 4) integers: examples, tokens of the instruction (0: none), of the longest input, of the
            longest target.
        ranks, micro_batches: of each rank; their product divides the chunks.
        multiple: to which lengths are padded.

    Returns:
        rank -> micro-batch -> places in the global batch, ascending, at least one; each place is somewhere once.
    """
    parts, chunks = ranks * micro_batches, len(lengths)
    share = chunks // parts
    rounded = -(-lengths[:, 1:] // multiple) * multiple
    padded = np.column_stack([lengths[:, 0], rounded]).tolist()
    in_order = [list(range(start, start + share)) for start in range(0, chunks, share)]
    if parts == 1:
        return [in_order]
    order = sorted(range(chunks), key=lambda place: (-_cost(padded[place : place + 1]), place))
    ends = _balanced([padded[place] for place in order], parts, share)
    starts = [0, *ends[:-1]]
    by_length = [sorted(order[start:end]) for start, end in zip(starts, ends, strict=True)]
    plain = [in_order[rank * micro_batches : (rank + 1) * micro_batches] for rank in range(ranks)]
    sorted_out = [by_length[rank::ranks] for rank in range(ranks)]
    return min((plain, sorted_out), key=lambda dealt: step_cost(padded, dealt))


def step_cost(rows: Sequence[_Row], dealt: Sequence[Sequence[Sequence[int]]]) -> int:
    """Cost of a dealing, in weighted positions: for each round of micro-batches the costliest rank's.

    Args:
        rows: one a chunk.
        dealt: what `deal` returns.
    """
    rounds = zip(*dealt, strict=True)
    return sum(max(_cost([rows[place] for place in part]) for part in parts) for parts in rounds)


def _cost(rows: Sequence[_Row]) -> int:
    """Weighted positions of one micro-batch."""
    examples = sum(row[0] for row in rows)
    instruction, given, target = (max(row[kind] for row in rows) for kind in (1, 2, 3))
    return len(rows) * _INSTRUCTION * instruction + examples * (_INPUT * given + _TARGET * target)


def _balanced(rows: Sequence[_Row], parts: int, share: int) -> list[int]:
    """Ends of exactly `parts` consecutive blocks whose costliest one costs about as little as it can."""
    least = max(_cost(rows[at : at + 1]) for at in range(len(rows))) - 1
    enough = max(_cost(rows[start : start + share]) for start in range(0, len(rows), share))
    ends = _filled(rows, enough, parts, share * LARGEST_SHARE)
    assert ends is not None, "blocks of the equal share are within the bound"
    while enough - least > max(1, enough >> _PRECISION):
        bound = (least + enough) // 2
        found = _filled(rows, bound, parts, share * LARGEST_SHARE)
        if found is None:
            least = bound
        else:
            enough, ends = bound, found
    while len(ends) < parts:
        ends = sorted([*ends, _middle_of_the_costliest(rows, ends)])
    return ends


def _filled(rows: Sequence[_Row], bound: int, parts: int, most: int) -> list[int] | None:
    """Ends of blocks filled one after the other up to a cost and a number; None where more than `parts` are needed."""
    ends: list[int] = []
    start = examples = instruction = given = target = 0
    for at, (count, *lengths) in enumerate(rows):
        wider = max(instruction, lengths[0]), max(given, lengths[1]), max(target, lengths[2])
        cost = (at + 1 - start) * _INSTRUCTION * wider[0]
        cost += (examples + count) * (_INPUT * wider[1] + _TARGET * wider[2])
        if at > start and (cost > bound or at - start == most):
            ends.append(at)
            if len(ends) == parts:
                return None
            start, examples, wider = at, 0, (lengths[0], lengths[1], lengths[2])
        examples += count
        instruction, given, target = wider
    return [*ends, len(rows)]


def _middle_of_the_costliest(rows: Sequence[_Row], ends: Sequence[int]) -> int:
    """Where the costliest block that has more than one row is halved."""
    blocks = [block for block in _blocks(ends) if block[1] - block[0] > 1]
    start, end = max(blocks, key=lambda block: _cost(rows[block[0] : block[1]]))
    return (start + end) // 2


def _blocks(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip([0, *ends[:-1]], ends, strict=True)
