"""What the ranks of a run publish of themselves, and what can be read from it."""

from __future__ import annotations

import site
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_LIBRARIES = ("<", *site.getsitepackages(), sysconfig.get_paths()["stdlib"])
_OWN = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Sign:
    """What a rank publishes of itself.

    Attributes:
        beat: grows for as long as the process lives.
        place: where in the run it is, e.g. `step 7`.
        line: the innermost line of its main thread outside of libraries.
        begun: collective operations begun, by the group's name.
        idle_s: seconds since it has begun one or come to another place.
        left: it has ended as it should.
    """

    beat: int
    place: str
    line: str
    begun: dict[str, int]
    idle_s: float
    left: bool = False


def sides(signs: Mapping[int, Sign]) -> tuple[list[int], list[int]]:
    """The ranks that wait for others, and those that they wait for.

    A rank that is late in one group because it waits in another is not to blame.
    """
    furthest: dict[str, int] = {}
    for sign in signs.values():
        for group, begun in sign.begun.items():
            furthest[group] = max(furthest.get(group, 0), begun)
    late = {r for r, s in signs.items() if any(begun < furthest[group] for group, begun in s.begun.items())}
    waiting = {
        rank
        for rank, sign in signs.items()
        for group, begun in sign.begun.items()
        if any(begun > other.begun.get(group, begun) for other in signs.values())
    }
    return sorted(waiting), sorted(late - waiting or late)


def complaint(
    signs: Mapping[int, Sign], waiting: Sequence[int], late: Sequence[int], silent: set[int], timeout_s: float
) -> str:
    """The message that ends a run whose ranks wait in vain."""
    told = "; ".join(
        f"rank {rank} did not arrive: it "
        + ("has ended or does not answer, last seen" if rank in silent else "is")
        + f" at {signs[rank].place}, {signs[rank].line}"
        for rank in late
    )
    first = signs[waiting[0]]
    return (
        f"error: {told}; {named(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for it at {first.place}, "
        f"{first.line}, for more than {timeout_s:g} s\n"
        f"  mend: see what {named(late)} printed, and its machine; where it is merely slow raise engine.timeout_s; "
        "the same command goes on from the last checkpoint"
    )


def named(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 1 and 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(str(rank) for rank in ranks[:-1])} and {ranks[-1]}"


def lost(ranks: Sequence[int], places: Iterable[str]) -> str:
    """`rank 3 (last seen at step 7)`."""
    return f"{named(ranks)} (last seen at {', '.join(sorted(set(places)))})"


def line_of(frame: FrameType | None) -> str:
    """The innermost line of a stack that is not a library's, as `file.py:12 (function)`."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_OWN) or not code.co_filename.startswith(_LIBRARIES):
            return f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return "an unknown line"
