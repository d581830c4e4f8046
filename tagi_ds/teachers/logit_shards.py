"""The logit store's shards: one columnar Arrow file each, written whole and memory-mapped by readers.

`topk` keeps k entries and the tail's mass: at k = 12 a token of a vocabulary below 65,536 takes 12 · (uint16 id +
float16 log-probability) + a uint16 label + a float32 tail = 54 bytes. `sampled` keeps the distinct draws, 5 bytes each.
Beside them stand the example's id and a few numbers an example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import Tensor

from tagi_ds.errors import UserError
from tagi_ds.files import whole_file
from tagi_ds.teachers.logit_entries import IGNORED, Entries

COMMAND = "launchers/store_logits.py"
StoreDtype = Literal["float16", "float32"]
Method = Literal["topk", "sampled"]


@dataclass(frozen=True)
class Layout:
    """The columns of a shard.

    Attributes:
        method: see :mod:`tagi_ds.teachers.logit_entries`.
        dtype: of the log-probabilities.
        vocabulary: tokens that may be stored.
        draws: of `sampled`, a token.
    """

    method: Method = "topk"
    dtype: StoreDtype = "float16"
    vocabulary: int = 65_536
    draws: int = 50

    @property
    def schema(self) -> pa.Schema:
        """One row an example; lists run over its target tokens, or over their entries one token after the other."""
        token = pa.uint16() if self.vocabulary <= 65_536 else pa.int32()
        kept = pa.float16() if self.dtype == "float16" else pa.float32()
        columns = {"labels": token, "ids": token, "log_probs": kept}
        if self.method == "topk":
            columns["tail"] = pa.float32()
        else:
            count = pa.uint8() if self.draws <= 255 else pa.uint16()
            columns |= {"sizes": count, "counts": count}
        return pa.schema(
            [("key", pa.uint64()), ("example_id", pa.string()), *((name, pa.list_(of)) for name, of in columns.items())]
        )


def rows_of(
    example_ids: Sequence[str], labels: Tensor, entries: Entries, layout: Layout = Layout()
) -> Iterator[dict[str, Any]]:
    """One row an example from padded labels (N, T) and their entries; padding is dropped."""
    kept = np.float16 if layout.dtype == "float16" else np.float32
    targets = labels.cpu().numpy()
    ids, log_probs = entries.ids.cpu().numpy(), entries.log_probs.float().cpu().numpy().astype(kept)
    for row, example in enumerate(example_ids):
        real = targets[row] != IGNORED
        known = ids[row, real] >= 0
        values = {
            "key": key_of(example),
            "example_id": example,
            "labels": targets[row, real],
            "ids": ids[row, real][known],
            "log_probs": log_probs[row, real][known],
        }
        if entries.counts is not None:
            values |= {"sizes": known.sum(-1), "counts": entries.counts[row].cpu().numpy()[real][known]}
        if entries.tail is not None:
            values["tail"] = entries.tail[row].float().cpu().numpy()[real]
        yield values


def write_shard(
    path: Path, rows: Iterable[Mapping[str, Any]], settings: str = "", layout: Layout = Layout(), flops: int = 0
) -> None:
    """Writes one shard, whole or not at all; equal arguments give equal bytes.

    Args:
        path: of the shard.
        rows: of :func:`rows_of`, under the same layout.
        settings: what the rows depend on, for :func:`is_whole`.
        layout: the columns.
        flops: what computing the rows took.
    """
    table = _table(list(rows), layout.schema)
    table = table.replace_schema_metadata({"settings": settings, "content": _content(table), "flops": str(flops)})
    with whole_file(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        values = [row[field.name] for row in rows]
        if pa.types.is_list(field.type):
            offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
            flat = np.concatenate(values).astype(field.type.value_type.to_pandas_dtype())
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, field.type.value_type)))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def is_whole(path: Path, settings: str) -> bool:
    """Whether a shard is there, was written under these settings, and is as it was written."""
    return _facts(path).get(b"settings") == settings.encode()


def is_intact(path: Path) -> bool:
    """Whether a shard is as it was written, under whatever settings."""
    return bool(_facts(path))


def _facts(path: Path) -> dict[bytes, bytes]:
    """A shard's metadata; empty where it is missing or its content is not the one that was written."""
    try:
        table = open_shard(path)
        facts: dict[bytes, bytes] = table.schema.metadata or {}
        return facts if facts.get(b"content") == _content(table).encode() else {}
    except (UserError, pa.ArrowException):
        return {}


class Shard:
    """One memory-mapped file as plain arrays; a page is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._table = open_shard(path)
        batch = self._table.to_batches()[0]
        # Through DLPack: Arrow's own `to_numpy` imports pandas, a third of a second at the start of every run.
        self.keys: np.ndarray = np.from_dlpack(batch["key"])
        self._names = batch["example_id"]
        self._lists = {
            field.name: (np.from_dlpack(batch[field.name].offsets), np.from_dlpack(batch[field.name].values))
            for field in self._table.schema
            if pa.types.is_list(field.type)
        }

    def name(self, index: int) -> str:
        """Id of an example."""
        name: str = self._names[index].as_py()
        return name

    def has(self, name: str) -> bool:
        """Whether there is such a column of lists."""
        return name in self._lists

    def column(self, name: str, index: int) -> np.ndarray:
        """One example's list in a column."""
        offsets, values = self._lists[name]
        column: np.ndarray = values[offsets[index] : offsets[index + 1]]
        return column


def key_of(example: str) -> int:
    """What an example id is found by: 64 bits of its digest."""
    return int.from_bytes(hashlib.blake2b(example.encode(), digest_size=8).digest(), "little")


def open_shard(path: Path) -> pa.Table:
    """A shard's table over the mapped file; nothing but its structure is read or checked.

    Raises:
        UserError: missing, or no Arrow file.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged or missing: {error}", f"delete it and run {COMMAND} again") from error


def _content(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for batch in table.combine_chunks().to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()
