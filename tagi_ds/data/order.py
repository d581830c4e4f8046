"""What every mixture shares: seeded choices without state, and the share of a rank in a global batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from tagi_ds.data.dealing import deal
from tagi_ds.errors import UserError
from tagi_ds.processes import check_dealing

Item = TypeVar("Item")
_WORD = 2**64 - 1


def permutation(size: int, *key: object) -> np.ndarray:
    """A permutation of range(size) that depends on the key alone."""
    return generator(*key).permutation(size)


def ascending(order: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The same order of tasks, in which each task's slots come in ascending order.

    Args:
        order: a permutation of the slots; task i owns the slots from ends[i - 1] (or 0) to ends[i].
    """
    owners = np.searchsorted(ends, order, side="right")
    out = np.empty_like(order)
    # Sorted by owner, a stable sort lists the positions of each task's slots one after the other.
    out[np.argsort(owners, kind="stable")] = np.arange(len(order), dtype=order.dtype)
    return out


def permuted(position: int, size: int, *key: object) -> int:
    """Where a permutation of range(size) sends `position`, without any array: for what is too long for one.

    A Feistel network over the next even power of two, walked until it comes back below `size` (Black and Rogaway,
    2002): four steps at the most on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for round_key in _round_keys(*key):
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        value = left << half | right
        if value < size:
            return value


@lru_cache(maxsize=64)
def _round_keys(*key: object) -> tuple[int, ...]:
    digest = hashlib.sha512("/".join(map(str, key)).encode()).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8))


def _mixed(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


def generator(*key: object) -> np.random.Generator:
    """Random numbers that depend on the key alone, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def choose(options: int, *key: object) -> int:
    """One of range(options), by the key alone."""
    if options == 1:
        return 0
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % options


class Share:
    """What one rank has of a global batch, micro-batch by micro-batch: equal slices, or parts by length.

    The global batch does not depend on the numbers of ranks and micro-batches; only the dealing does.

    Raises:
        UserError: the global batch cannot be dealt evenly.
    """

    def __init__(self, tasks_per_batch: int, rank: int, world_size: int, accumulation: int) -> None:
        check_dealing(tasks_per_batch, world_size, accumulation)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.parts = world_size * accumulation
        self._size = tasks_per_batch // self.parts
        self._rank, self._world_size, self._accumulation = rank, world_size, accumulation

    def of(self, batch: Sequence[Item]) -> list[Sequence[Item]]:
        """This rank's micro-batches of a global batch: slices in its order."""
        starts = [(self._rank * self._accumulation + micro) * self._size for micro in range(self._accumulation)]
        return [batch[start : start + self._size] for start in starts]

    def by_length(self, batch: Sequence[Item], lengths: np.ndarray, multiple: int) -> list[Sequence[Item]]:
        """This rank's micro-batches of a global batch as :func:`tagi_ds.data.dealing.deal` deals it."""
        dealt = deal(lengths, self._world_size, self._accumulation, multiple)[self._rank]
        return [[batch[place] for place in places] for places in dealt]


def check_state(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuses a data state that belongs to other data or another order.

    Raises:
        UserError: a field of the state that must be equal differs; the text names it.
    """
    for name, value in own.items():
        if state.get(name) != value:
            raise UserError(
                f"the checkpoint's data position was taken with {name} = {state.get(name)}, this run has {value}",
                "resume with the data and settings of the interrupted run, or start another output folder",
            )
