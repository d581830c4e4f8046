"""A list of work shared by processes that know of each other through one folder alone: ranks, jobs, machines.

An item is *finished* when its record ``<item>.json`` is there, *claimed* while a claim ``<item>.<generation>.claim``
is alive, and *open* otherwise. A claim is a file created with ``O_EXCL``, which one process alone can do, on network
file systems too (advisory locks are not to be trusted there). Its owner touches it as a sign of life. A dead claim is
never renamed or removed by others: whoever takes the item over creates the claim of the next generation, which again
one process alone can do, so two takers that both saw the dead claim do not both get the item.

Claims save work; they do not guard it. Should an owner that was held up come back after its item was taken over, two
processes finish the item, and that must do no harm: the work must give the same bytes whoever does it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable, read_json, write_json

WORK_FOLDER = "work"
"""Of a run folder: where its list is."""
_CLAIM = ".claim"
_BEATS = 10
"""Signs of life an owner gives within the time after which it counts as dead."""
_LONGEST_BEAT_S = 60.0
_LONGEST_POLL_S = 5.0


class WorkList:
    """One process's view of the list.

    Args:
        folder: of the list, shared by all processes; made where it is missing.
        timeout_s: seconds without a sign of life after which a claim is dead.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        ensure_writable(folder)

    def take(
        self, items: Sequence[str], is_finished: Callable[[str], bool] | None = None
    ) -> Generator[str, None, None]:
        """Yields, one after the other, the items that this process is to do; ends when all are finished, by whomever.

        The caller finishes an item before it asks for the next. While others hold what is left this waits, and takes
        over what they leave. Close it (``contextlib.closing``) so that an error gives the claim back at once.

        Args:
            items: names that can be files'.
            is_finished: another sign that an item is finished; default its record.
        """
        finished = is_finished or self.is_finished
        left = list(items)
        while left := [item for item in left if not finished(item)]:
            # One look at the clock serves all claims of a round: to each it is a file made and removed on the server.
            now = functools.cache(self._now)
            for item in left:
                with self.hold(item, now) as held:
                    # Looked at again: it may have been finished between the look and the claim.
                    if not held or finished(item):
                        continue
                    yield item
                    if not finished(item):
                        raise RuntimeError(f"{item} was taken and not finished")
                break
            else:
                time.sleep(min(_LONGEST_POLL_S, self.timeout_s / _BEATS))

    @contextlib.contextmanager
    def hold(self, item: str, now: Callable[[], float] | None = None) -> Iterator[bool]:
        """Whether this process got the item; if so it is the owner, and gives signs of life, until the block's end.

        Args:
            item: its name.
            now: the folder's clock; None: looked at where it is needed. An earlier look takes no live claim for dead.
        """
        claims = self._claims(item)
        if claims and self._is_alive(claims[max(claims)], now or self._now):
            yield False
            return
        generation = max(claims, default=0) + 1
        claim = self.folder / f"{item}.{generation}{_CLAIM}"
        if not _create(claim):
            yield False
            return
        done = threading.Event()
        heart = threading.Thread(target=self._beat, args=(claim, done), daemon=True)
        heart.start()
        try:
            yield True
        finally:
            done.set()
            heart.join()
            # One's own claim goes last: a look in between must not see a dead one on top.
            for path in (*claims.values(), claim):
                path.unlink(missing_ok=True)

    def finish(self, item: str, record: Mapping[str, Any]) -> None:
        """Marks an item as finished; `record` is JSON-able."""
        write_json(self.folder / f"{item}.json", dict(record))

    def reopen(self, item: str) -> None:
        """Takes the mark back, where what an item left is damaged or gone."""
        (self.folder / f"{item}.json").unlink(missing_ok=True)

    def is_finished(self, item: str) -> bool:
        """Whether the item's record is there."""
        return (self.folder / f"{item}.json").is_file()

    def record(self, item: str) -> dict[str, Any]:
        """What :meth:`finish` was given; empty where the record is missing or damaged."""
        with contextlib.suppress(UserError):
            content = read_json(self.folder / f"{item}.json")
            if isinstance(content, dict):
                return content
        return {}

    def finished(self, items: Sequence[str]) -> int:
        """How many of the items are finished."""
        return sum(map(self.is_finished, items))

    def sweep(self, items: Sequence[str]) -> None:
        """Removes records and claims that belong to none of the items, and dead claims on finished ones.

        Everything else in the folder is left alone: it may be what another process is writing at this moment.
        """
        kept, now = set(items), functools.cache(self._now)
        for path in self.folder.glob("*.json"):
            if path.stem not in kept:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(f"*{_CLAIM}"):
            item = path.name.rsplit(".", 2)[0]
            if item not in kept or (self.is_finished(item) and not self._is_alive(path, now)):
                path.unlink(missing_ok=True)

    def _claims(self, item: str) -> dict[int, Path]:
        """Generation -> claim."""
        found = {}
        for path in self.folder.glob(f"{item}.*{_CLAIM}"):
            generation = path.name.removeprefix(f"{item}.").removesuffix(_CLAIM)
            if generation.isdecimal():
                found[int(generation)] = path
        return found

    def _is_alive(self, claim: Path, now: Callable[[], float]) -> bool:
        try:
            touched = claim.stat().st_mtime
            owner = json.loads(claim.read_bytes())
            machine, pid, started = owner["machine"], int(owner["pid"]), owner["started"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            # Damaged, or not written to its end yet: its age alone speaks.
            machine, pid, started = None, 0, None
        if machine == _machine() and _started(pid) != started:
            return False
        return now() - touched <= self.timeout_s

    def _now(self) -> float:
        """The time by the clock that stamps the claims, which is the file server's and not this machine's."""
        probe = self.folder / f".now.{secrets.token_hex(8)}"
        handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            return os.fstat(handle).st_mtime
        finally:
            os.close(handle)
            # Somebody may have tidied it away.
            probe.unlink(missing_ok=True)

    def _beat(self, claim: Path, done: threading.Event) -> None:
        while not done.wait(min(_LONGEST_BEAT_S, self.timeout_s / _BEATS)):
            # A file system that is away for a while must not end the work; a claim that is gone has nothing to tell.
            with contextlib.suppress(OSError):
                os.utime(claim)


@dataclass(frozen=True)
class Claim:
    """Somebody's claim on an item, as another process sees it.

    Attributes:
        item, owner: what is claimed, and by whom (process and host); an empty owner where the claim cannot be read.
        silent_s: seconds since its last sign of life, by this machine's clock.
        gone: its process was one of this machine's and is no more.
    """

    item: str
    owner: str
    silent_s: float
    gone: bool

    def __str__(self) -> str:
        state = "which is gone; the next start takes it over" if self.gone else f"heard of {self.silent_s:.0f} s ago"
        return f"{self.item} is claimed by {self.owner or 'an unknown process'}, {state}"


def claims_in(folder: Path) -> Iterator[Claim]:
    """The claims on a list's items, without becoming part of it; nothing is written."""
    for path in sorted(folder.glob(f"*{_CLAIM}")):
        owner, gone = "", False
        with contextlib.suppress(FileNotFoundError):
            silent = max(0.0, time.time() - path.stat().st_mtime)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(path.read_bytes())
                job = f" of job {content['job']}" if content["job"] else ""
                owner = f"process {int(content['pid'])}{job} on {content['machine'].split('/')[0]}"
                gone = content["machine"] == _machine() and _started(int(content["pid"])) != content["started"]
            yield Claim(path.name.rsplit(".", 2)[0], owner, silent, gone)


def _create(claim: Path) -> bool:
    """Creates a claim; False where somebody was faster."""
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        pid = os.getpid()
        job = os.environ.get("SLURM_JOB_ID")
        json.dump({"machine": _machine(), "pid": pid, "started": _started(pid), "job": job}, file)
    return True


def _machine() -> str:
    """What two processes share that can see each other's ids: host name, boot, and on Linux the name space of ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine began, so that a later one with its id is not taken for it; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    # A zombie has ended; its parent has not asked yet.
    return None if fields[0] in "ZX" else fields[19]
