"""Super-NaturalInstructions as rows of one example each: task_name, definition, inputs, targets, id.

This is the form of hf://datasets/Muennighoff/natural-instructions: ``train/*.jsonl`` and ``test/*.jsonl`` of the
default split's English tasks, without categories, demonstrations and languages: what asks for those is refused where
tasks are chosen. Rows are read in one stream and gathered by task.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tagi_ds.data.examples import UNCATEGORISED, Example
from tagi_ds.data.fields import is_scalar, is_unicode, texts
from tagi_ds.data.remote import open_file
from tagi_ds.data.task_index import WHOLE_FILE, MalformedRow, RawTask, row_of

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
HELD_CHARACTERS = 64_000_000
"""Tasks of mixed files are handed out in parts of so many characters together, so that memory stays bounded."""
_FIELDS = ("task_name", "definition", "inputs", "targets", "id")

Row = tuple[int, Any]
"""Number in the file, and the row's fields, or a text that says what is wrong with it."""


def scan(address: str, paths: list[str]) -> Iterator[RawTask]:
    """The tasks of files of rows; a task may come in several parts.

    Args:
        address: of the collection.
        paths: of its files, relative.

    Raises:
        UserError: the address cannot be read.
    """
    owners: dict[str, str] = {}
    gathered: dict[str, _Gathered] = {}
    for path in paths:
        group = _group(path)
        lost: list[MalformedRow] = []
        for number, row in _rows(address, path):
            name = row.get("task_name") if isinstance(row, dict) else None
            if not isinstance(name, str) or not name.strip():
                lost.append(MalformedRow(path, number, row if isinstance(row, str) else "lacks its task_name"))
                continue
            name = name.strip()
            # The same task's training and test rows are two tasks: no run may mix them unasked.
            name = name if owners.setdefault(name, group) == group else f"{name}.{group}"
            gathered.setdefault(name, _Gathered(name, path, group)).add(path, number, row)
        if lost:
            yield _unowned(path, group, lost)
        if sum(task.characters for task in gathered.values()) > HELD_CHARACTERS:
            yield from (task.task() for task in gathered.values())
            gathered.clear()
    yield from (task.task() for task in gathered.values())


@dataclass
class _Gathered:
    """The rows of one task so far."""

    name: str
    file: str
    group: str
    definition: str = ""
    characters: int = 0
    examples: list[Example] = field(default_factory=list)
    malformed: list[MalformedRow] = field(default_factory=list)

    def add(self, path: str, number: int, row: dict[str, Any]) -> None:
        definition, given, targets = (row.get(name) for name in ("definition", "inputs", "targets"))
        references = tuple(texts(targets))
        identity = str(row.get("id") or f"{self.name}-{number}")
        if not is_scalar(given) or not references or not isinstance(definition, str) or not definition.strip():
            self.malformed.append(MalformedRow(path, number, "lacks its definition, its inputs or its targets"))
            return
        given = str(given)
        if not is_unicode(identity, definition, given, *references):
            self.malformed.append(MalformedRow(path, number, "holds text that is not Unicode"))
            return
        self.definition = self.definition or definition
        self.characters += len(given) + sum(map(len, references))
        last = self.examples[-1] if self.examples else None
        if last is not None and (last.id, last.input) == (identity, given):
            # Several acceptable outputs stand in rows that follow each other.
            references = tuple(dict.fromkeys((*last.references, *references)))
            self.examples.pop()
        self.examples.append(Example(identity, given, references))

    def task(self) -> RawTask:
        digest = hashlib.sha256(repr(self.examples).encode()).hexdigest()
        examples, malformed = tuple(self.examples), tuple(self.malformed)
        return RawTask(
            self.name,
            self.definition,
            UNCATEGORISED,
            self.name,
            "sni",
            (),
            (),
            (),
            (),
            self.file,
            digest,
            examples,
            malformed,
            self.group,
        )


def _unowned(path: str, group: str, lost: list[MalformedRow]) -> RawTask:
    """Rows that name no task stand under their file's name, so that they are counted."""
    return RawTask(path, "", "", path, "sni", (), (), (), (), path, "", (), tuple(lost), group)


def _group(path: str) -> str:
    """The folder that a file lies in, or where it lies in none (or in `data`) its name's beginning."""
    folder, _, name = path.rpartition("/")
    folder = folder.rsplit("/", 1)[-1]
    return folder if folder not in ("", "data") else name.split(".")[0].split("-")[0]


def _rows(address: str, path: str) -> Iterator[Row]:
    try:
        with open_file(address, path) as handle:
            if path.endswith(".parquet"):
                yield from _parquet(handle)
            else:
                yield from _lines(gzip.GzipFile(fileobj=handle) if path.endswith(".gz") else handle)
    except FileNotFoundError:
        yield WHOLE_FILE, "is missing"
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        yield row_of(error), f"cannot be read to its end: {error}"


def _lines(handle: Any) -> Iterator[Row]:
    for number, line in enumerate(handle):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"is not JSON: {error}"
            continue
        yield number, row if isinstance(row, dict) else "is not an object"


def _parquet(handle: Any) -> Iterator[Row]:
    file = pq.ParquetFile(handle)
    missing = [name for name in _FIELDS[:4] if name not in file.schema_arrow.names]
    if missing:
        yield WHOLE_FILE, f"lacks the columns {', '.join(missing)}"
        return
    number = 0
    for batch in file.iter_batches(columns=[name for name in _FIELDS if name in file.schema_arrow.names]):
        for row in batch.to_pylist():
            yield number, row
            number += 1
