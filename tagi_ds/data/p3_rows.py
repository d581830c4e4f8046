"""Rows of P3's files, jsonl or parquet: a seeded choice of them, read as a stream.

Which rows are chosen depends on the seed, the template and the row's number alone: every number has a random rank, and
the lowest ranks win. So one pass suffices where the number of rows is not known, jsonl and parquet give the same rows,
and asking for more rows keeps those that were chosen.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tagi_ds.data.remote import FoundFile, open_file
from tagi_ds.data.task_index import MalformedRow, row_of

JSON_ENDINGS = (".jsonl", ".jsonl.gz")
PARQUET_ENDING = ".parquet"
ENDINGS = (*JSON_ENDINGS, PARQUET_ENDING)
"""Endings of the files that hold rows."""
COLUMNS = ("inputs_pretokenized", "targets_pretokenized", "answer_choices", "idx", "is_correct")
"""What is read of a row; the published token ids are those of another tokenizer."""
_BATCH = 1024


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        file: its path.
        number: in that file, from 0.
        ordinal: over the files of its split, from 0.
        content: its columns, or why it cannot be read.
    """

    file: str
    number: int
    ordinal: int
    content: dict[str, Any] | str


def ranks(first: int, count: int, seed: int, template: str) -> np.ndarray:
    """Random ranks (count,) uint64 of `count` rows from number `first` on: splitmix64 of seed, template and number."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{template}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


class Choice:
    """The `most` of a stream's items with the lowest ranks, kept while they go by."""

    def __init__(self, most: int, seed: int, template: str) -> None:
        self._most, self._seed, self._template = most, seed, template
        self._kept: list[tuple[int, int, Any]] = []
        self._ranks: list[int] = []
        self._seen = 0

    def offer(self, item: Any) -> None:
        """The next item; it is kept if its rank is among the lowest so far."""
        at = self._seen % _BATCH
        if at == 0:
            self._ranks = ranks(self._seen, _BATCH, self._seed, self._template).tolist()
        entry = (-self._ranks[at], self._seen, item)
        if len(self._kept) < self._most:
            heapq.heappush(self._kept, entry)
        elif entry[0] > self._kept[0][0]:
            heapq.heapreplace(self._kept, entry)
        self._seen += 1

    def items(self) -> list[Any]:
        """What was kept, in the order in which it came."""
        return [item for _, _, item in sorted(self._kept, key=lambda entry: entry[1])]


def chosen_numbers(count: int, most: int, seed: int, template: str) -> np.ndarray:
    """Numbers, ascending, of the at most `most` chosen among `count` rows."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.argpartition(ranks(0, count, seed, template), most)[:most])


def read_rows(address: str, files: Sequence[FoundFile], broken: list[MalformedRow]) -> Iterator[Row]:
    """All rows of the files; a file that cannot be read to its end is noted in `broken`."""
    ordinal = 0
    for file in files:
        with _noting(file, broken), open_file(address, file.path) as handle:
            source = _parquet(handle) if file.path.endswith(PARQUET_ENDING) else _json(handle, file.path)
            for number, content in source:
                yield Row(file.path, number, ordinal, _parsed(content))
                ordinal += 1


def choose_rows(
    address: str, files: Sequence[FoundFile], most: int, seed: int, template: str, broken: list[MalformedRow]
) -> Iterator[Row]:
    """At most `most` rows, chosen by seed and template, in file order."""
    if all(file.path.endswith(PARQUET_ENDING) for file in files):
        yield from _chosen_parquet(address, files, most, seed, template, broken)
        return
    choice = Choice(most, seed, template)
    ordinal = 0
    for file in files:
        with _noting(file, broken), open_file(address, file.path) as handle:
            source = _parquet(handle) if file.path.endswith(PARQUET_ENDING) else _json(handle, file.path)
            for number, content in source:
                choice.offer((file.path, number, ordinal, content))
                ordinal += 1
    for path, number, place, content in choice.items():
        yield Row(path, number, place, _parsed(content))


def _chosen_parquet(
    address: str, files: Sequence[FoundFile], most: int, seed: int, template: str, broken: list[MalformedRow]
) -> Iterator[Row]:
    """The same choice from the footers' row counts: row groups without a chosen row are never read."""
    counts = []
    for file in files:
        counts.append(0)
        with _noting(file, broken), open_file(address, file.path) as handle:
            counts[-1] = pq.ParquetFile(handle).metadata.num_rows
    chosen = chosen_numbers(sum(counts), most, seed, template)
    start = 0
    for file, count in zip(files, counts, strict=True):
        mine = chosen[(chosen >= start) & (chosen < start + count)] - start
        if len(mine):
            with _noting(file, broken), open_file(address, file.path) as handle:
                for number, content in _parquet(handle, mine):
                    yield Row(file.path, number, start + number, content)
        start += count


def _parquet(handle: IO[bytes], wanted: np.ndarray | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, columns) of the rows of a parquet file, or of those with the wanted numbers (ascending)."""
    file = pq.ParquetFile(handle)
    columns = [name for name in COLUMNS if name in file.schema_arrow.names]
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if wanted is None or ((wanted >= start) & (wanted < end)).any():
            at = start
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                numbers = np.arange(at, at + batch.num_rows)
                if wanted is not None:
                    numbers = wanted[(wanted >= at) & (wanted < at + batch.num_rows)]
                taken = batch.take(pa.array(numbers - at)) if len(numbers) < batch.num_rows else batch
                yield from zip(numbers.tolist(), taken.to_pylist(), strict=True)
                at += batch.num_rows
        start = end


def _json(handle: IO[bytes], path: str) -> Iterator[tuple[int, bytes]]:
    """(line, bytes) of the lines that hold anything."""
    for number, line in enumerate(gzip.GzipFile(fileobj=handle) if path.endswith(".gz") else handle):
        if line.strip():
            yield number, line


def _parsed(content: bytes | dict[str, Any]) -> dict[str, Any] | str:
    if isinstance(content, dict):
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    return value if isinstance(value, dict) else "it is no JSON object"


class _noting:  # noqa: N801 - reads as the verb that it is
    """Notes a file that cannot be read (further) among the malformed, and goes on behind it."""

    def __init__(self, file: FoundFile, broken: list[MalformedRow]) -> None:
        self._file, self._broken = file, broken

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, OSError | EOFError | zlib.error | pa.ArrowException):
            return False
        reason = str(error).strip().splitlines() or [type(error).__name__]
        self._broken.append(MalformedRow(self._file.path, row_of(error), f"it cannot be read to its end: {reason[0]}"))
        return True
