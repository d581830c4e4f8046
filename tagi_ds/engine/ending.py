"""Ends all ranks of a run together and with one status when one of them fails.

A rank whose peer has gone stays in NCCL's kernel, or is aborted by torch's own watchdog: the status of the run would
then say nothing of the cause. So the rank that fails declares its status in the store before it goes. Each rank's watch
(`tagi_ds.engine.watch`), which runs beside a blocked main thread, reads it, and all leave at the same moment, before
one of them sees that another's connections have closed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch.distributed as dist

LOST_STATUS = 1
LOST_PEER = (
    "error: {} of this run has ended or does not answer\n"
    "  mend: what that process printed says why; the same command then goes on"
)
_TURN_S = 3.0
"""The same error usually stops rank 0 too, which then speaks for all; so long it is waited for."""
_HEARD_S = 5.0
"""Within it every rank that lives has read the declaration, some beats of its watch."""
_FINISHED_S = 30.0
"""Within it ranks that were told to stop have done so."""
_LEAVE_S = 0.5
_ASK_S = 0.05
_DECLARED, _SPOKEN, _HEARD, _FINISHED, _LEAVE = (
    f"tagi_ds/end/{name}" for name in ("declared", "spoken", "heard", "finished", "leave")
)


@dataclass(frozen=True)
class End:
    """What the first rank that fails declares."""

    rank: int
    status: int


class Ending:
    """The end of a run, as this rank takes part in it.

    Args:
        rank, world_size: of this process.
        store: a connection that no thread waits in for long.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store) -> None:
        self.rank, self.world_size = rank, world_size
        self._store: Any = store

    def declared(self) -> End | None:
        """What some rank has declared.

        Raises:
            RuntimeError: the store is gone.
        """
        if not self._store.check([_DECLARED]):
            return None
        return End(**json.loads(self._store.get(_DECLARED)))

    def declare(self, status: int, text: str, lost: Collection[int] = (), finishing: bool = False) -> NoReturn:
        """Ends this rank by an error of its own, and all others with it.

        The first rank to declare speaks, unless rank 0 has failed likewise: then rank 0 does.

        Args:
            text: for stderr.
            lost: ranks that are known to be gone; nobody waits for them.
            finishing: the others are on their way out themselves, and are given time for that.
        """
        try:
            mine = json.dumps(asdict(End(self.rank, status)))
            first = End(**json.loads(self._store.compare_set(_DECLARED, "", mine)))
            if first.rank == self.rank:
                self._lead(status, text, lost, finishing)
            if self.rank == 0 and first.status == status:
                self._store.set(_SPOKEN, "")
                speak(self.rank, text)
            self._store.add(_FINISHED, 1)
            self._leave_together(status)
        except RuntimeError:
            # Rank 0, which keeps the store, is gone: each speaks for itself, and the launcher ends the others.
            time.sleep(_TURN_S)
            speak(self.rank, text)
            os._exit(status)

    def follow(self, end: End) -> NoReturn:
        """Ends this rank, from its watch, with the status that another has declared."""
        try:
            self._store.add(_HEARD, 1)
            self._leave_together(end.status)
        except RuntimeError:
            os._exit(end.status)

    def _lead(self, status: int, text: str, lost: Collection[int], finishing: bool) -> NoReturn:
        others = self.world_size - 1 - len(lost)
        if self.rank == 0 or 0 in lost or not _within(_TURN_S, lambda: self._store.check([_SPOKEN])):
            speak(self.rank, text)
        key, wait_s = (_FINISHED, _FINISHED_S) if finishing else (_HEARD, _HEARD_S)
        _within(wait_s, lambda: self._store.add(key, 0) >= others)
        self._store.set(_LEAVE, "")
        self._leave_together(status)

    def _leave_together(self, status: int) -> NoReturn:
        _within(_TURN_S + _FINISHED_S + _HEARD_S, lambda: self._store.check([_LEAVE]))
        # Nobody asks the store any more when rank 0 takes it along.
        time.sleep(_LEAVE_S)
        os._exit(status)


def speak(rank: int, text: str) -> None:
    """Prints the line with which a rank ends."""
    if text:
        print(f"[rank {rank}] {text}" if rank else text, file=sys.stderr, flush=True)


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Waits until something holds; False where it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(_ASK_S)
    return True
