"""Names the rank that does not arrive where the others wait.

A collective operation that one rank does not join ends, at best, with every other rank saying that it timed out. Here
a thread of each rank publishes, through the store that the process group was made with, how many collective operations
its rank has begun, at which step and in which line. A rank is waited for when it has begun fewer operations in a group
than another rank of that group, and the other has begun none since `engine.timeout_s`.

Rank 0's watch ends the run, too, when a rank gives no sign of life any more, and the others' when rank 0 does not. What
ends one rank ends all (`tagi_ds.engine.ending`), also those whose main threads are blocked.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tagi_ds.engine.ending import LOST_PEER, LOST_STATUS, Ending, speak
from tagi_ds.engine.signs import Sign, complaint, line_of, lost, sides

HUNG_STATUS = 1
_LONGEST_BEAT_S = 0.5
_LONGEST_END_S = 5.0
_SILENT_S = 60.0
_SILENT_SHARE = 1 / 30
"""Of `engine.timeout_s`, where that is longer."""
_LOOKS = 12
"""Within the silence that is taken for death, so often it is looked for signs."""
_STORE_GONE_S = 30.0
"""After the end of rank 0, whose process keeps the store, the others' own errors have so long to appear."""


class Watch:
    """Watches the ranks of a run from a thread of this one.

    Args:
        rank, world_size: of this process.
        store: of the process group.
        timeout_s: seconds after which a rank is waited for no longer.

    Attributes:
        silent_s: seconds without a sign of life after which a process is taken for dead. A library that keeps the
            interpreter to itself, or a machine that swaps, is silent for seconds, not for a minute.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.beat_s = min(_LONGEST_BEAT_S, timeout_s / 10)
        self.silent_s = min(timeout_s, max(_SILENT_S, timeout_s * _SILENT_SHARE))
        # A connection of its own: the main thread may be held up in the other.
        self._store: Any = store.clone()  # type: ignore[attr-defined]
        self.ending = Ending(rank, world_size, self._store)
        self._place, self._beat = "start", 0
        self._seen: tuple[str, dict[str, int]] = ("", {})
        self._moved_at = time.monotonic()
        self._judged_at: float | None = None
        self._looked_at, self._lives = self._moved_at, dict[int, tuple[int, float]]()
        self._operation_timeout, self._granted = operation_timeout(timeout_s), set[str]()
        self._unlimited = False
        self._main = threading.main_thread().ident
        self._ended, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tagi_ds watch", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Notes where in the run this rank is."""
        self._place = place
        self._wake.set()

    @contextlib.contextmanager
    def unlimited(self) -> Iterator[None]:
        """Within it this rank is neither waited for nor waits, however long it takes."""
        self._unlimited = True
        try:
            yield
        finally:
            self._moved_at, self._unlimited = time.monotonic(), False

    def stop(self) -> None:
        """Ends the watch, and waits for its thread: it must not be in the store when that goes."""
        self._ended.set()
        self._wake.set()
        self._thread.join(_LONGEST_END_S)

    def silent(self) -> list[int]:
        """Ranks whose processes have given no sign of life for some beats; [0] where rank 0's store is gone."""
        try:
            before = self._signs()
            time.sleep(self._pause_s)
            return [rank for rank, sign in self._signs().items() if sign.beat == before[rank].beat]
        except (RuntimeError, KeyError):
            return [0]

    def place_of(self, rank: int) -> str:
        """Where a rank was when it last gave a sign."""
        try:
            return self._signs()[rank].place
        except (RuntimeError, KeyError):
            return "unknown"

    @property
    def _pause_s(self) -> float:
        """When an operation has failed, a process without a sign for so long is taken to have ended."""
        return max(2.0, 3 * self.beat_s)

    def _run(self) -> None:
        while True:
            self._wake.wait(self.beat_s)
            self._wake.clear()
            if self._ended.is_set():
                break
            try:
                self._grant_time()
                self._publish()
                end = self.ending.declared()
                if end is not None and end.rank != self.rank:
                    self.ending.follow(end)
                self._look_for_signs()
                if self._unlimited or time.monotonic() - self._moved_at < self.timeout_s:
                    self._judged_at = None
                else:
                    self._judge()
            except dist.DistNetworkError:
                return self._store_is_gone()
            except RuntimeError:
                # The store took too long to answer; it is asked again.
                continue
        with contextlib.suppress(RuntimeError):
            self._publish(left=True)

    def _grant_time(self) -> None:
        """Gives every group the default group's timeout: those that DeepSpeed makes have torch's, 10 minutes on CUDA.

        An operation would otherwise be aborted before the watch has named the rank that is missing.
        """
        for group, name in groups():
            if name not in self._granted:
                dist.distributed_c10d._set_pg_timeout(self._operation_timeout, group)
                self._granted.add(name)

    def _publish(self, left: bool = False) -> None:
        self._beat += 1
        begun = begun_operations()
        if (self._place, begun) != self._seen:
            self._seen, self._moved_at = (self._place, begun), time.monotonic()
        idle = 0.0 if self._unlimited else time.monotonic() - self._moved_at
        line = line_of(sys._current_frames().get(self._main or 0))
        sign = Sign(self._beat, self._place, line, begun, idle, left)
        self._store.set(_key(self.rank), json.dumps(asdict(sign)))

    def _signs(self, ranks: Iterable[int] | None = None) -> dict[int, Sign]:
        """The last sign of each of these ranks (all) that has given one."""
        keys = {rank: _key(rank) for rank in (range(self.world_size) if ranks is None else ranks)}
        there = [rank for rank, key in keys.items() if self._store.check([key])]
        return {rank: Sign(**json.loads(self._store.get(keys[rank]))) for rank in there}

    def _judge(self) -> None:
        signs = self._signs()
        waiting, late = sides(signs)
        if not late or max(signs[rank].idle_s for rank in waiting) < self.timeout_s:
            return
        self._judged_at = self._judged_at or time.monotonic()
        # The first of those that wait speaks for all; the others go on giving signs: they are late, not gone.
        if self.rank == min(waiting) or time.monotonic() - self._judged_at > 2 * self._pause_s:
            silent = set(self.silent()) - {self.rank}
            text = complaint(signs, waiting, late, silent, self.timeout_s)
            self.ending.declare(HUNG_STATUS, text, lost=silent)

    def _look_for_signs(self) -> None:
        """Ends the run where a process is dead: rank 0 looks at all, and the others at rank 0."""
        every, passed = self.silent_s / _LOOKS, time.monotonic() - self._looked_at
        if passed < every:
            return
        self._looked_at = time.monotonic()
        signs = self._signs(None if self.rank == 0 else [0])
        for rank, sign in signs.items():
            beat, silent_s = self._lives.get(rank, (0, 0.0))
            # A process that was itself asleep for long (a suspended job) has not listened all the while.
            silent_s = silent_s + min(passed, 2 * every) if sign.beat == beat and not sign.left else 0.0
            self._lives[rank] = (sign.beat, silent_s)
        dead = [rank for rank, (_, silent_s) in self._lives.items() if silent_s >= self.silent_s and rank != self.rank]
        if dead:
            self.ending.declare(LOST_STATUS, LOST_PEER.format(lost(dead, [signs[r].place for r in dead])), lost=dead)

    def _store_is_gone(self) -> None:
        if self._ended.wait(_STORE_GONE_S):
            return
        # No error has ended this process by then: its main thread waits for rank 0 in vain.
        if self.rank == 1:
            speak(self.rank, LOST_PEER.format("rank 0"))
        os._exit(LOST_STATUS)


def operation_timeout(timeout_s: float) -> timedelta:
    """Of a collective operation; the watch comes first: it names the rank that is missing."""
    return timedelta(seconds=1.5 * timeout_s + 10)


def groups() -> list[tuple[Any, str]]:
    """The process groups that this process is in, with their names."""
    # torch enters a group here after its backends and its place among the groups.
    return [(group, str(name)) for group, name in list(dist.distributed_c10d._world.pg_names.items())]


def begun_operations() -> dict[str, int]:
    """Collective operations that this process has begun, by the name of the group."""
    return {name: int(group._get_sequence_number_for_group()) for group, name in groups()}


def _key(rank: int) -> str:
    return f"tagi_ds/watch/{rank}"
