"""The list of work: who gets an item, dead claims, damaged claims, and workers that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ds.errors import UserError
from tagi_ds.teachers import work_list
from tagi_ds.teachers.work_list import WorkList
from tests.distributed import ROOT

LONG = 600.0
GONE = 2**22 + 1
"""A process id that Linux never gives."""


def claim_of(work: WorkList, item: str, **changes: object) -> Path:
    """A claim as this process writes it, with changes, and nobody to look after it."""
    path = work.folder / f"{item}.1.claim"
    assert work_list._create(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def work(tmp_path: Path) -> WorkList:
    return WorkList(tmp_path / "work", LONG)


def test_an_item_is_held_by_one_and_then_free_again(work: WorkList) -> None:
    other = WorkList(work.folder, LONG)
    with work.hold("a") as mine, other.hold("a") as theirs, other.hold("b") as another:
        assert (mine, theirs, another) == (True, False, True)
    with other.hold("a") as theirs:
        assert theirs
    assert not list(work.folder.iterdir())


def test_items_are_done_once_in_order_and_marked(work: WorkList) -> None:
    items = ["a", "b", "c"]
    work.finish("b", {"seconds": 1.5})
    done = []
    for item in work.take(items):
        done.append(item)
        assert len(list(work.folder.glob("*.claim"))) == 1
        work.finish(item, {})
    assert done == ["a", "c"]
    assert list(work.take(items)) == []
    assert work.record("b") == {"seconds": 1.5}
    assert work.finished(items) == 3
    work.reopen("b")
    assert [work.finish(item, {}) or item for item in work.take(items)] == ["b"]
    assert work.record("b") == {}


def test_an_error_gives_the_item_back(work: WorkList) -> None:
    def fail() -> None:
        with contextlib.closing(work.take(["a"])) as turns:
            for _ in turns:
                raise UserError("disk full", "free space")

    with pytest.raises(UserError):
        fail()
    assert not list(work.folder.glob("*.claim"))


def test_an_item_that_was_taken_and_left_open_is_a_mistake(work: WorkList) -> None:
    turns = work.take(["a"])
    next(turns)
    with pytest.raises(RuntimeError, match="not finished"):
        next(turns)


@pytest.mark.parametrize(
    "changes, seconds, alive",
    [
        ({}, 0, True),
        ({}, LONG + 60, False),  # held up, however alive its process is
        ({"pid": GONE}, 0, False),
        ({"started": "7"}, 0, False),  # another process has got its id
        ({"machine": "elsewhere", "pid": GONE}, 0, True),
        ({"machine": "elsewhere", "pid": GONE}, LONG + 60, False),
    ],
)
def test_a_claim_is_dead_without_its_process_or_a_sign_of_life(
    changes: dict[str, object], seconds: float, alive: bool, work: WorkList
) -> None:
    path = claim_of(work, "a", **changes)
    age(path, seconds)
    with work.hold("a") as held:
        assert held is not alive
        assert path.exists(), "nobody takes another's claim away while it matters"
    assert path.exists() is alive


def test_the_clock_is_the_folders(work: WorkList, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is an hour ahead does not take a live claim for dead."""
    claim_of(work, "a", machine="elsewhere")
    ahead = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: ahead)
    with work.hold("a") as held:
        assert not held


def test_an_owner_gives_signs_of_life(tmp_path: Path) -> None:
    work = WorkList(tmp_path, 0.2)
    with work.hold("a") as held:
        assert held
        (path,) = tmp_path.glob("*.claim")
        age(path, 100.0)
        before = path.stat().st_mtime
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_many_takers_of_a_dead_claim_one_gets_it(work: WorkList) -> None:
    for turn in range(20):
        claim_of(work, f"item{turn}", pid=GONE)
        start, until, got = threading.Barrier(4), threading.Event(), []

        def take(item: str, start: threading.Barrier, until: threading.Event, got: list[bool]) -> None:
            mine = WorkList(work.folder, LONG)
            start.wait()
            with mine.hold(item) as held:
                got.append(held)
                if held:
                    until.wait(20)

        takers = [threading.Thread(target=take, args=(f"item{turn}", start, until, got)) for _ in range(4)]
        for taker in takers:
            taker.start()
        deadline = time.monotonic() + 20
        while len(got) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        until.set()
        for taker in takers:
            taker.join()
        assert sorted(got) == [False, False, False, True]


CLAIM_DAMAGE = ("truncated", "flipped", "swapped", "removed", "garbage")


def damage(kind: str, folder: Path, draw: random.Random) -> None:
    path, other = draw.sample(sorted(folder.glob("*.claim")), 2)
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "flipped":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "swapped":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "removed":
        path.unlink()
    else:
        path.write_bytes(draw.randbytes(40))


@contextlib.contextmanager
def folder_of_claims() -> Iterator[Path]:
    """Items a (held by a live process), b (by a dead one), c (held elsewhere, long silent) and d (open)."""
    with tempfile.TemporaryDirectory() as name:
        work = WorkList(Path(name), 1.0)
        claim_of(work, "a")
        claim_of(work, "b", pid=GONE)
        age(claim_of(work, "c", machine="elsewhere"), 60)
        yield work.folder


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CLAIM_DAMAGE), st.integers(0, 10_000))
def test_damaged_claims_lose_no_item_and_finish_none(kind: str, seed: int) -> None:
    with folder_of_claims() as folder:
        damage(kind, folder, random.Random(seed))
        # The live owner falls silent, so that in the end everything is there to be done.
        for claim in folder.glob("*.claim"):
            age(claim, 60)
        work, done = WorkList(folder, 1.0), []
        for item in work.take(["a", "b", "c", "d"]):
            done.append(item)
            work.finish(item, {})
        assert sorted(done) == ["a", "b", "c", "d"]
        work.sweep(["a", "b", "c", "d"])
        assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json", "c.json", "d.json"]


def test_sweeping_keeps_what_is_in_use(work: WorkList) -> None:
    work.finish("old-3f", {})
    work.finish("a", {})
    claim_of(work, "old-3f", pid=GONE)
    with work.hold("b"):
        work.sweep(["a", "b"])
        assert sorted(path.name for path in work.folder.iterdir()) == ["a.json", "b.1.claim"]


def test_sweeping_leaves_alone_what_others_are_writing(work: WorkList) -> None:
    work.finish("a", {})
    others = {".now.ab12", ".writable.ab12", ".b.json.7-ab12.part", ".a.json.7-ab12.part"}
    for name in others:
        (work.folder / name).write_bytes(b"")
    work.sweep(["a", "b"])
    assert {path.name for path in work.folder.iterdir()} == {"a.json", *others}


def test_a_probe_of_the_clock_that_is_tidied_away_is_no_error(work: WorkList, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_of(work, "a", machine="elsewhere")
    fstat, gone = os.fstat, []

    def tidy(handle: int) -> os.stat_result:
        for probe in work.folder.glob(".now.*"):
            probe.unlink()
            gone.append(probe)
        return fstat(handle)

    monkeypatch.setattr(work_list.os, "fstat", tidy)
    with work.hold("a") as held:
        assert not held
    assert len(gone) == 1


def test_a_round_looks_at_the_clock_once(work: WorkList, monkeypatch: pytest.MonkeyPatch) -> None:
    items = ["a", "b", "c", "d"]
    for item in items:
        claim_of(work, item, machine="elsewhere")
    looks, rounds, look = [], [], work._now

    def finish_one(seconds: float) -> None:
        rounds.append(len(looks))
        work.finish(items[len(rounds) - 1], {})

    monkeypatch.setattr(work, "_now", lambda: looks.append(1) or look())
    monkeypatch.setattr(work_list.time, "sleep", finish_one)
    assert list(work.take(items)) == []
    assert rounds == [1, 2, 3, 4]


_WORKER = """
import sys, time
from pathlib import Path
from tagi_ds.teachers.work_list import WorkList
folder, name = Path(sys.argv[1]), sys.argv[2]
work = WorkList(folder / "work", 600)
for item in work.take([f"item{n:02d}" for n in range(12)]):
    with (folder / "log").open("a") as log:
        log.write(f"{item} {name}\\n")
    time.sleep(0.05)
    work.finish(item, {"by": name})
"""


def start_worker(folder: Path, name: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", _WORKER, str(folder), name], env=environment)


def test_workers_share_the_list_and_take_over_what_a_killed_one_held(tmp_path: Path) -> None:
    first = start_worker(tmp_path, "killed")
    log, deadline = tmp_path / "log", time.monotonic() + 60
    while not log.is_file() or log.read_text().count("\n") < 2:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.kill()
    first.wait()
    (held,) = (path.name.split(".")[0] for path in (tmp_path / "work").glob("*.claim"))
    workers = [start_worker(tmp_path, name) for name in ("x", "y", "z")]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    items = [item for item, _ in lines]
    assert sorted(set(items)) == [f"item{n:02d}" for n in range(12)]
    # Only what the killed one held was begun twice.
    assert sorted(items) == sorted([*set(items), held])
    assert {name for item, name in lines if item == held} > {"killed"}
    assert not list((tmp_path / "work").glob("*.claim"))
