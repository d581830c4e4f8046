"""Which tasks and rows of an index a run reads: language, number, seed, and the policy for what is malformed."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tagi_ds.config import DataConfig
from tagi_ds.data import sni
from tagi_ds.data.examples import Task
from tagi_ds.data.p3_rows import ranks
from tagi_ds.data.p3_splits import evaluation_name
from tagi_ds.data.remote import PREPARE, join
from tagi_ds.data.task_index import WHOLE_FILE, MalformedRow, TaskIndex, TaskRecord
from tagi_ds.engine.distributed import is_main
from tagi_ds.errors import UserError

LOGGED = 20
"""So many malformed rows and files of a split are named, and so many tasks in other languages; all are counted."""
_MEND = f"mend the file or fetch it again ({PREPARE}), or leave out what is malformed: --data.malformed skip"

Rows = Callable[[TaskIndex, TaskRecord], Sequence[int]]
"""Which of a task's rows are read, ascending."""


def every() -> Rows:
    """All rows."""
    return lambda _, record: range(record.examples)


def first(most: int) -> Rows:
    """The first `most` rows."""
    return lambda _, record: range(min(most, record.examples))


def drawn(most: int, seed: int) -> Rows:
    """At most `most` rows, drawn by seed and task."""
    return lambda _, record: choose_rows(record.examples, most, seed, record.name)


def alike(most: int) -> Rows:
    """P3: at most `most` rows, drawn by the data set alone: the same instances under each of its templates.

    A data set's rows may be sorted, so that the first ones would be of one kind. Instances are told by their number
    among the published rows, with which their ids end; so one that is malformed under a template shifts no other.
    """

    def rows(index: TaskIndex, record: TaskRecord) -> Sequence[int]:
        if record.examples <= most:
            return range(record.examples)
        numbers = np.array([int(identity.rpartition("/")[2]) for identity in index.ids(record.name)])
        lots = ranks(0, int(numbers.max()) + 1, 0, evaluation_name(record.name, record.source))[numbers]
        return np.sort(np.argpartition(lots, most)[:most]).tolist()  # type: ignore[no-any-return]

    return rows


@dataclass
class Selection:
    """Chooses tasks and rows of an index for a run; counts what is left out as malformed or in another language.

    Attributes:
        config: language and policy.
        index: of the collection.
        split: what names the tasks, for messages.
        rows: which of a task's rows are read.
    """

    config: DataConfig
    index: TaskIndex
    split: str
    rows: Rows
    _rows_left_out: int = 0
    _files_left_out: int = 0
    _malformed: dict[str, int] = field(default_factory=dict)
    _gone: list[str] = field(default_factory=list)
    _cut: dict[str, int] = field(default_factory=dict)
    _named: list[MalformedRow] = field(default_factory=list)
    _foreign: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def left_out(self) -> int:
        """Malformed rows, and malformed files of which nothing can be read, that `tasks` left out."""
        return self._rows_left_out + self._files_left_out

    @property
    def omitted(self) -> dict[str, Any]:
        """What the tasks chosen so far are without, JSON-able; what there is nothing of is not in it.

        ``malformed``: task -> rows and files of it that cannot be read; ``gone``: tasks of which nothing can be read;
        ``other_languages``: tasks; ``cut``: task -> rows that can be read, where fewer were chosen.
        """
        found = {"malformed": self._malformed, "gone": self._gone, "other_languages": list(self._foreign)}
        return {name: entries for name, entries in {**found, "cut": self._cut}.items() if entries}

    def tasks(self, names: Sequence[str]) -> list[Task]:
        """The tasks of these names that are of the wanted language and can be read.

        Raises:
            UserError: there is none, one is malformed and the policy is `error`, or the instruction is to have examples
                and no task has any.
        """
        chosen = []
        for name in names:
            record = self._record(name)
            if record is None:
                continue
            if self.config.english_only and not sni.is_english(record.languages):
                self._foreign[name] = record.languages
                continue
            if record.malformed and not self._tolerates(record):
                continue
            rows = self.rows(self.index, record)
            if len(rows) < record.examples:
                self._cut[name] = record.examples
            chosen.append(self.index.task(name, rows))
        if not chosen and self._foreign:
            raise UserError(
                f"no task of split {Path(self.split).stem} in {self.index.facts['address']} is English",
                "choose another split or --data.english_only false",
            )
        if not chosen:
            raise UserError(f"no task of {self.split} can be read", "fetch the data again, or choose another split")
        self._require_demonstrations(chosen)
        self._say(len(names), any(self.index.record(task.name).languages for task in chosen))
        return chosen

    def _require_demonstrations(self, tasks: Sequence[Task]) -> None:
        """Tasks may have fewer than are wanted, as in the published setting; if all have none, it is another one."""
        if self.config.prompt == "plain" or self.index.facts["collection"] == "p3":
            return
        for kind in ("positives", "negatives"):
            wanted = getattr(self.config, kind)
            if wanted and not any(getattr(task, kind) for task in tasks):
                raise UserError(
                    f"data.{kind} is {wanted}, and none of the {len(tasks)} tasks of {self.split} has such an example",
                    f"set data.{kind} 0, or name a checkout of natural-instructions (tasks/*.json) as data.sni_dir",
                )

    def _record(self, name: str) -> TaskRecord | None:
        """A task's record, or None where its file is missing or malformed and the policy is to skip it."""
        if name not in self.index:
            path = join(self.index.facts["address"], f"tasks/{name}.json")
            if self.config.malformed == "error":
                raise UserError(
                    f"{self.split} names {name}, but {path} is missing",
                    "fetch the task file, or take its name out of the split",
                )
            self._count(name, [MalformedRow(f"tasks/{name}.json", WHOLE_FILE, "is missing")], 1)
            self._gone.append(name)
            return None
        record = self.index.record(name)
        if record.is_broken and self.config.malformed == "skip":
            self._count(name, record.malformed_rows, record.malformed)
            self._gone.append(name)
            return None
        if record.is_broken:
            raise malformed_error(self.index.facts["address"], record.malformed_rows[0], record.malformed)
        return record

    def _tolerates(self, record: TaskRecord) -> bool:
        """Counts a task's malformed rows; False where none of its rows is left."""
        if self.config.malformed == "error":
            raise malformed_error(self.index.facts["address"], record.malformed_rows[0], record.malformed)
        self._count(record.name, record.malformed_rows, record.malformed)
        if not record.examples:
            self._gone.append(record.name)
        return record.examples > 0

    def _count(self, name: str, rows: Sequence[MalformedRow], count: int) -> None:
        """Counts `count` malformed rows of a task, of which `rows` are the first."""
        self._malformed[name] = count
        files = sum(row.row == WHOLE_FILE for row in rows)
        self._files_left_out += files
        self._rows_left_out += count - files
        self._named += rows[: LOGGED - len(self._named)]

    def _say(self, total: int, languages_known: bool) -> None:
        """Says, once, which of the split's `total` tasks and their rows are left out, or that languages are unknown."""
        if not is_main():
            return
        if self.left_out:
            address = self.index.facts["address"]
            lines = [f"  {_describe(address, row)}" for row in self._named]
            if self.left_out > len(lines):
                lines.append(f"  ... `python -m tagi_ds.data validate {address}` lists all")
            head = f"data.malformed skip: left out {self._rows_left_out} rows and {self._files_left_out} files"
            _say_once("\n".join([f"{head} of {self.split}:", *lines]))
        if self._foreign:
            named = [f"{name} ({', '.join(dict.fromkeys(spoken))})" for name, spoken in self._foreign.items()]
            rest = [f"and {len(named) - LOGGED} more"] if len(named) > LOGGED else []
            head = f"data.english_only: left out {len(named)} of {total} tasks of {self.split}"
            _say_once(f"{head}: {', '.join(named[:LOGGED] + rest)}")
        if self.config.english_only and not languages_known:
            _say_once(f"data.english_only: no task of {self.split} names its language; all are taken as English")


def choose_rows(size: int, limit: int, seed: int, name: str) -> Sequence[int]:
    """Which of a task's rows a run reads, in file order."""
    if size <= limit:
        return range(size)
    return sorted(random.Random(f"{seed}/{name}").sample(range(size), limit))


def malformed_error(address: str, row: MalformedRow, count: int) -> UserError:
    """What the policy `error` says of a task's first malformed row, of `count`."""
    others = f" (and {count - 1} more like it in this task)" if count > 1 else ""
    return UserError(f"{_describe(address, row)}{others}", _MEND)


def _describe(address: str, row: MalformedRow) -> str:
    path = join(address, row.file)
    if row.row < 0:
        return f"{path} {row.reason}"
    return f"{path}: {'instance' if path.endswith('.json') else 'row'} {row.row} {row.reason}"


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
