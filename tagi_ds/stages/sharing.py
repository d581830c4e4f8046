"""Work that several jobs of one stage divide among themselves, every item by all ranks of one job together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tagi_ds.engine.distributed import broadcast_object, main_first
from tagi_ds.launch import Stage
from tagi_ds.teachers.work_list import WORK_FOLDER, WorkList


def items_of_this_job(stage: Stage, items: Sequence[str], is_there: Callable[[str], bool]) -> Iterator[str]:
    """Yields the items that this job is to do, the same on all of its ranks; ends when all are done, by whomever.

    The caller finishes an item before it asks for the next. Close it (``contextlib.closing``), so that an error gives
    the item back at once.

    Args:
        stage: the running one.
        items: names that can be files'.
        is_there: whether what an item leaves is there; without it the record that it was done does not count.
    """
    work = WorkList(stage.run_dir / WORK_FOLDER, stage.config.teachers.claim_timeout_s)
    with contextlib.closing(work.take(items, lambda item: work.is_finished(item) and is_there(item))) as turns:
        while True:
            told: list[str | None] = []
            # However long the other jobs take, no collective operation waits for it.
            main_first(lambda told=told: told.append(next(turns, None)))  # type: ignore[misc]
            item = broadcast_object(told[0] if told else None)
            if item is None:
                return
            yield item
            if stage.ranks.is_main:
                work.finish(item, {})


def agreed(stage: Stage, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `decide` says in the first job of the run folder that asks, on all ranks of all jobs and after restarts.

    Args:
        stage: the running one.
        name: of the question, as an item's.
        decide: called on rank 0; JSON-able.
    """
    work = WorkList(stage.run_dir / WORK_FOLDER, stage.config.teachers.claim_timeout_s)
    told: list[dict[str, Any]] = []

    def ask() -> None:
        with contextlib.closing(work.take([name])) as turns:
            for item in turns:
                work.finish(item, decide())
        told.append(work.record(name))

    main_first(ask)
    # From rank 0, and not from the folder: another node may not see the new file yet.
    answer: dict[str, Any] = broadcast_object(told[0] if told else None)
    return answer


def traces_of(folder: Path) -> list[list[str | int]]:
    """Names, sizes and times of a folder's files: what differs when it is written anew."""
    if not folder.is_dir():
        return []
    found = [(str(path.relative_to(folder)), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]
