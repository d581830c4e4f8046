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
_CHUNK = 32
"""Cost of a chunk whatever its lengths: its task's adapter is generated. That is much of a small model's step, and
little of a large one's."""
_WORTH = 16
"""The part of a step that dealing by length must save: lengths are estimates, and those of like texts say little."""
_PRECISION = 6
"""Bits to which the least bound on a micro-batch's cost is sought."""

_Row = Sequence[int]
"""Of a chunk: its examples, and the lengths of its instruction, longest input and longest target."""


def deal(lengths: np.ndarray, ranks: int, micro_batches: int, multiple: int = 8) -> list[list[list[int]]]:
    """Deals the chunks of a global batch.

    The costliest micro-batches come first, and those that all ranks have at the same time are neighbours in length.
    By the lengths that are given, the time until the last rank is through (`step_cost`) is never more than with equal
    parts in the batch's order, which are dealt where the others would save little.

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
    in_order = [list(range(start, start + share)) for start in range(0, chunks, share)]
    plain = [in_order[rank * micro_batches : (rank + 1) * micro_batches] for rank in range(ranks)]
    if parts == 1:
        return plain
    rows = _rows(lengths, multiple)
    order = sorted(range(chunks), key=lambda place: (-_cost([rows[place]]), place))
    ends = _balanced([rows[place] for place in order], parts, share)
    by_length = [sorted(order[start:end]) for start, end in _blocks(ends)]
    dealt = [by_length[rank::ranks] for rank in range(ranks)]
    before, after = _step_cost(rows, plain), _step_cost(rows, dealt)
    return dealt if before - after > before // _WORTH else plain


def step_cost(lengths: np.ndarray, dealt: Sequence[Sequence[Sequence[int]]], multiple: int = 8) -> int:
    """Cost of a dealing, in weighted positions: for each round of micro-batches the costliest rank's.

    Args:
        lengths, multiple: as of `deal`.
        dealt: what it returns.
    """
    return _step_cost(_rows(lengths, multiple), dealt)


def _rows(lengths: np.ndarray, multiple: int) -> list[list[int]]:
    """Lengths with the padding up to the multiple that is to be expected; an estimate that is rounded up would often be
    a whole multiple beside the truth."""
    counts, tokens = lengths[:, :1], lengths[:, 1:]
    rows: list[list[int]] = np.hstack([counts, np.where(tokens > 0, tokens + multiple // 2, 0)]).tolist()
    return rows


def _step_cost(rows: Sequence[_Row], dealt: Sequence[Sequence[Sequence[int]]]) -> int:
    rounds = zip(*dealt, strict=True)
    return sum(max(_cost([rows[place] for place in part]) for part in parts) for parts in rounds)


def _cost(rows: Sequence[_Row]) -> int:
    """Weighted positions of one micro-batch."""
    longest = [max(row[kind] for row in rows) for kind in (1, 2, 3)]
    return _weighed(len(rows), sum(row[0] for row in rows), *longest)


def _weighed(chunks: int, examples: int, instruction: int, given: int, target: int) -> int:
    return chunks * (_CHUNK + _INSTRUCTION * instruction) + examples * (_INPUT * given + _TARGET * target)


def _balanced(rows: Sequence[_Row], parts: int, share: int) -> list[int]:
    """Ends of exactly `parts` consecutive blocks whose costliest one costs about as little as it can."""
    least = max(_cost([row]) for row in rows) - 1
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
        cost = _weighed(at + 1 - start, examples + count, *wider)
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
