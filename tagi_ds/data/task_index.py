"""The one-time index of finite task collections: tasks' facts, and their examples in a memory-mapped Arrow file.

Opening an index reads the facts alone, so that start-up and memory grow with the number of tasks and not with the
number of examples. `datasets` keeps Arrow files too, but concatenated over tasks and behind a cache of its own
fingerprints; what is wanted here is one record batch a task, opened by its number.

An index folder holds ``examples.arrow`` (one record batch for each part of a task), ``tasks.jsonl`` (a line for each
task) and ``manifest.json``, and is a pure function of the data that were read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from tagi_ds.data.examples import Demonstration, Example, Extent, Task
from tagi_ds.errors import UserError
from tagi_ds.files import read_json

FORMAT, VERSION = "tagi_ds task index", 2
EXAMPLES, TASKS, MANIFEST = "examples.arrow", "tasks.jsonl", "manifest.json"
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input": pa.large_string(),
        "references": pa.list_(pa.large_string()),
        "choices": pa.list_(pa.large_string()),
        "rendered": pa.large_string(),
    }
)
WHOLE_FILE = -1
"""`MalformedRow.row` where nothing of a file can be read."""
UNREADABLE = -2
"""`MalformedRow.row` where the system refuses a file, whatever it holds: no index is made of that."""

_READ_AHEAD = 256


@dataclass(frozen=True)
class MalformedRow:
    """A row that cannot be read.

    Attributes:
        file: relative path or address.
        row: counted from 0 (SNI: the instance, jsonl: the line, parquet: the row), WHOLE_FILE or UNREADABLE.
        reason: what follows the file's or the row's name in a sentence: `lacks its input`.
    """

    file: str
    row: int
    reason: str


def row_of(error: BaseException) -> int:
    """UNREADABLE where the system refused a file (its error has a number); WHOLE_FILE where the content is broken."""
    return WHOLE_FILE if getattr(error, "errno", None) is None else UNREADABLE


@dataclass(frozen=True)
class RawTask:
    """A task as its file says, before any selection.

    A task with more examples than should be held at once may come in several parts of the same name: the first one's
    facts count, examples and malformed rows are joined.

    Attributes:
        name: unique over the collection.
        definition: the instruction's wording; empty where the file is malformed as a whole.
        category, source, collection, paraphrases, positives, negatives: as in Task.
        languages: of input and output as the task's own fields say; empty where they are missing.
        file: relative path or address that the examples came from.
        digest: hex SHA-256 of what was read.
        examples: in file order.
        malformed: rows left out.
        group: p3: split (train, validation, test, ...) of the rows; sni: the hub's folder, empty for a checkout.
    """

    name: str
    definition: str
    category: str
    source: str
    collection: str
    paraphrases: tuple[str, ...]
    positives: tuple[Demonstration, ...]
    negatives: tuple[Demonstration, ...]
    languages: tuple[str, ...]
    file: str
    digest: str
    examples: tuple[Example, ...]
    malformed: tuple[MalformedRow, ...]
    group: str = ""


@dataclass(frozen=True)
class TaskRecord:
    """What the index knows of a task beside its examples.

    Attributes:
        name, definition, category, source, collection, paraphrases, positives, negatives, languages, file, group:
            as in RawTask.
        digest: hex SHA-256 over the examples as they stand in the index.
        examples: their number.
        malformed: number of rows left out.
        malformed_rows: the first of them.
        batches: (number of the record batch, its rows) for every part.
    """

    name: str
    definition: str
    category: str
    source: str
    collection: str
    paraphrases: tuple[str, ...]
    positives: tuple[Demonstration, ...]
    negatives: tuple[Demonstration, ...]
    languages: tuple[str, ...]
    file: str
    group: str
    digest: str
    examples: int
    malformed: int
    malformed_rows: tuple[MalformedRow, ...]
    batches: tuple[tuple[int, int], ...]

    @property
    def is_broken(self) -> bool:
        """Whether nothing of the task's file could be read."""
        return not self.definition

    def to_json(self) -> str:
        """One line; ASCII, so that no reader can split it elsewhere."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> TaskRecord:
        """What `to_json` wrote."""
        facts = json.loads(line)
        for name, kind in (
            ("positives", Demonstration),
            ("negatives", Demonstration),
            ("malformed_rows", MalformedRow),
        ):
            facts[name] = tuple(kind(**entry) for entry in facts[name])
        for name in ("paraphrases", "languages"):
            facts[name] = tuple(facts[name])
        facts["batches"] = tuple((number, rows) for number, rows in facts["batches"])
        return cls(**facts)


class TaskIndex:
    """An index on disk. Opening it reads the tasks' facts; examples are read from the map when they are asked for.

    Args:
        folder: of the index.

    Attributes:
        folder: as given.
        facts: what the builder was told.
        names: of all tasks, in the order in which they were read.

    Raises:
        UserError: missing, of another format, truncated or altered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = _read_manifest(folder)
        self.facts: dict[str, Any] = manifest["facts"]
        try:
            text = (folder / TASKS).read_bytes()
            if hashlib.sha256(text).hexdigest() != manifest["tasks_sha256"]:
                raise _damaged(folder, f"{TASKS} is not as it was written")
            records = map(TaskRecord.from_json, text.decode("ascii").splitlines())
            self._records = {record.name: record for record in records}
            # Reading a batch is pointing into the map: threads would gain nothing, and do not survive a fork.
            options = pa.ipc.IpcReadOptions(use_threads=False)
            self._reader = pa.ipc.open_file(pa.memory_map(str(folder / EXAMPLES)), options=options)
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise _damaged(folder, str(error)) from error
        self.names = tuple(self._records)
        self._batch = lru_cache(maxsize=1024)(self._reader.get_batch)

    def __reduce__(self) -> tuple[type[TaskIndex], tuple[Path]]:
        """To another process travels the folder's name."""
        return TaskIndex, (self.folder,)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def record(self, name: str) -> TaskRecord:
        """A task's facts.

        Raises:
            KeyError: there is no such task.
        """
        return self._records[name]

    def task(self, name: str, rows: Sequence[int] | None = None) -> Task:
        """A task with all its examples, or with those of `rows` in their order.

        Raises:
            KeyError: there is no such task.
        """
        record = self._records[name]
        return Task(
            name=record.name,
            definition=record.definition,
            category=record.category,
            examples=ExampleRows(self, record, range(record.examples) if rows is None else rows),
            paraphrases=record.paraphrases,
            positives=record.positives,
            negatives=record.negatives,
            source=record.source,
            collection=record.collection,
        )

    def ids(self, name: str) -> list[str]:
        """The ids of a task's examples, in their order; their texts are not read.

        Raises:
            KeyError: there is no such task.
        """
        batches = self._records[name].batches
        return [identity for number, _ in batches for identity in self.batch(number).column("id").to_pylist()]

    def batch(self, number: int) -> pa.RecordBatch:
        """The record batch of one part of a task, in the map."""
        return self._batch(number)

    def verify(self) -> None:
        """Reads everything and compares it with what was recorded when it was written.

        Raises:
            UserError: a task's examples have changed.
        """
        for name, record in self._records.items():
            digest = hashlib.sha256()
            for number, _ in record.batches:
                update_digest(digest, _examples_of(self.batch(number)))
            if record.batches and digest.hexdigest() != record.digest:
                raise _damaged(self.folder, f"the examples of {name} are not as they were written")


class ExampleRows(Sequence[Example]):
    """Examples of one task, read from the index when they are asked for.

    Args:
        index: where they are.
        record: of their task.
        rows: which, in this order; numbers below `record.examples`.
    """

    def __init__(self, index: TaskIndex, record: TaskRecord, rows: Sequence[int]) -> None:
        self._index, self._record = index, record
        # Four bytes a row, and none where all are meant.
        self._rows = rows if isinstance(rows, range) else np.asarray(rows, dtype=np.int32)
        self._ends = np.cumsum([count for _, count in record.batches])

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 that depends on the examples' content and order, without reading them."""
        rows = np.asarray(self._rows, dtype="<i4").tobytes()
        return hashlib.sha256(self._record.digest.encode() + rows).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> ExampleRows: ...
    def __getitem__(self, at: int | slice) -> Example | ExampleRows:
        if isinstance(at, slice):
            return ExampleRows(self._index, self._record, self._rows[at])  # type: ignore[arg-type]
        batch, inside = self._place(at)
        return _examples_of(batch.slice(inside, 1))[0]

    def extent(self, at: int) -> Extent:
        """Lengths of an example's texts, from the map's offsets: no text is read."""
        batch, inside = self._place(at)
        given, rendered = (batch.column(name)[inside].as_buffer() for name in ("input", "rendered"))
        references = [reference.as_buffer().size for reference in batch.column("references")[inside]]
        return Extent(given.size, rendered.size if rendered else 0, sum(references) // len(references))

    def _place(self, at: int) -> tuple[pa.RecordBatch, int]:
        """A record batch of the index and the row in it."""
        row = int(self._rows[at])
        part = int(np.searchsorted(self._ends, row, side="right"))
        number, count = self._record.batches[part]
        return self._index.batch(number), row - (int(self._ends[part]) - count)

    def __iter__(self) -> Iterator[Example]:
        for first in range(0, len(self), _READ_AHEAD):
            rows = np.asarray(self._rows[first : first + _READ_AHEAD])
            parts = np.searchsorted(self._ends, rows, side="right")
            for start in np.flatnonzero(np.diff(parts, prepend=-1)):
                stop = start + int(np.argmin(np.append(parts[start:], -1) == parts[start]))
                number, count = self._record.batches[int(parts[start])]
                inside = rows[start:stop] - (int(self._ends[int(parts[start])]) - count)
                yield from _examples_of(self._index.batch(number).take(pa.array(inside)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExampleRows) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def update_digest(digest: Any, examples: Sequence[Example]) -> None:
    """Adds examples to a task's digest."""
    for example in examples:
        fields = (example.id, example.input, example.references, example.choices, example.rendered)
        digest.update(repr(fields).encode("utf-8"))


def _examples_of(batch: pa.RecordBatch) -> list[Example]:
    columns = [column.to_pylist() for column in batch.columns]
    return [
        Example(identity, given, tuple(references), tuple(choices), rendered)
        for identity, given, references, choices, rendered in zip(*columns, strict=True)
    ]


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is no index of tasks", "choose another --data.index_dir")
    if manifest.get("version") != VERSION:
        raise _damaged(folder, f"it is of version {manifest.get('version')}, this program reads {VERSION}")
    for name, size in manifest["sizes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise _damaged(folder, f"{name} has {found} of {size} bytes")
    return manifest


def _damaged(folder: Path, how: str) -> UserError:
    return UserError(f"the index {folder} cannot be used: {how}", "delete that folder; the next run builds it again")
