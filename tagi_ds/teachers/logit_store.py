"""The logit store: the teacher's distribution at every training target, k entries and the tail's mass a token.

Columnar Arrow shards, written by ranks in parallel and memory-mapped by readers. At k = 12 a token takes
12 · (int32 id + float16 log-probability) + an int32 label + a float32 tail = 80 bytes, beside the example's id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tagi_ds.errors import UserError
from tagi_ds.files import sha256_of, whole_file
from tagi_ds.losses import StoredDistributions
from tagi_ds.teachers.binding import damaged_files, read_manifest, require_fit, write_manifest

FORMAT = "tagi_ds logit store 1"
COMMAND = "launchers/store_logits.py"
COLUMNS = ("labels", "ids", "log_probs", "tail")
StoreDtype = Literal["float16", "float32"]


def schema_of(dtype: StoreDtype) -> pa.Schema:
    """The columns of a shard; `dtype` is that of the log-probabilities."""
    return pa.schema(
        [
            ("example_id", pa.string()),
            ("labels", pa.list_(pa.int32())),
            ("ids", pa.list_(pa.int32())),
            ("log_probs", pa.list_(pa.float16() if dtype == "float16" else pa.float32())),
            ("tail", pa.list_(pa.float32())),
        ]
    )


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens of each distribution.

    Args:
        logits: (..., V).
        k: entries kept; V when larger.
        temperature: T of the softmax.

    Returns:
        ids (..., k) int64, log-probabilities (..., k), mass of the tail (...,).
    """
    log_probs = (logits.float() / temperature).log_softmax(-1)
    best, ids = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    if best.shape[-1] == logits.shape[-1]:
        return ids, best, torch.zeros_like(best[..., 0])
    # Summed over the tail's own tokens: one minus the listed mass would cancel.
    tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1).exp()
    return ids, best, tail


def write_shard(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: str = "",
    dtype: StoreDtype = "float16",
    flops: int = 0,
) -> None:
    """Writes one shard, whole or not at all; equal arguments give equal bytes.

    Args:
        path: of the shard.
        rows: of :func:`rows_of`.
        settings: what the rows depend on, for :func:`is_whole`.
        dtype: of the log-probabilities.
        flops: what computing the rows took.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema_of(dtype))
    facts = {"settings": settings, "content": _content(table), "flops": str(flops)}
    table = table.replace_schema_metadata(facts)
    with whole_file(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def is_whole(path: Path, settings: str) -> bool:
    """Whether a shard is there, was written under these settings, and is as it was written."""
    try:
        table = _open(path)
        facts = table.schema.metadata or {}
        return facts.get(b"settings") == settings.encode() and facts.get(b"content") == _content(table).encode()
    except (UserError, pa.ArrowException):
        return False


def rows_of(
    example_ids: Sequence[str],
    labels: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail: Tensor,
    dtype: StoreDtype = "float16",
) -> Iterator[dict[str, Any]]:
    """One row an example from padded tensors (N, T), (N, T, k), (N, T, k), (N, T); padding is dropped."""
    kept = torch.float16 if dtype == "float16" else torch.float32
    labels, ids, log_probs, tail = (tensor.cpu() for tensor in (labels, ids, log_probs, tail))
    for row, example in enumerate(example_ids):
        real = labels[row] != -100
        yield {
            "example_id": example,
            "labels": labels[row][real].to(torch.int32).numpy(),
            "ids": ids[row][real].to(torch.int32).flatten().numpy(),
            "log_probs": log_probs[row][real].to(kept).flatten().numpy(),
            "tail": tail[row][real].float().numpy(),
        }


def finish(folder: Path, shards: Sequence[Path], header: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest, which makes the store complete; returns it."""
    tokens = examples = size = flops = 0
    table = {}
    for path in shards:
        columns = _open(path)
        tokens += len(columns["labels"].combine_chunks().flatten())
        examples += columns.num_rows
        size += path.stat().st_size
        flops += int((columns.schema.metadata or {}).get(b"flops", 0))
        table[path.name] = {"sha256": sha256_of(path), "examples": columns.num_rows}
    figures = {
        "examples": examples,
        "tokens": tokens,
        "bytes_per_token": round(size / max(tokens, 1), 2),
        "flops": flops,
    }
    manifest = {"format": FORMAT, **header, **figures, "shards": table}
    write_manifest(folder, manifest)
    return manifest


def checksums(manifest: Mapping[str, Any]) -> dict[str, str]:
    """File name -> hex SHA-256, for all shards that a manifest lists."""
    return {name: entry["sha256"] for name, entry in manifest["shards"].items()}


class LogitStore:
    """Reads a finished store by example id.

    Args:
        folder: the store.
        binding: fields that must agree with the run's: dataset, tokenizer, prompt, temperature.

    Raises:
        UserError: unfinished, damaged, or bound to something else.
    """

    def __init__(self, folder: Path, binding: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, FORMAT, COMMAND)
        require_fit(folder, self.manifest["binding"], binding or {}, COMMAND)
        self.k: int = self.manifest["k"]
        self.temperature: float = self.manifest["temperature"]
        self._tables: list[pa.Table] = []
        self._where: dict[str, tuple[int, int]] = {}
        for path in damaged_files(folder, checksums(self.manifest)):
            raise UserError(f"{path} is missing or damaged", f"delete it and run {COMMAND} again")
        for name in self.manifest["shards"]:
            table = _open(folder / name).combine_chunks()
            for row, example in enumerate(table["example_id"].to_pylist()):
                self._where[example] = (len(self._tables), row)
            self._tables.append(table)

    def __contains__(self, example_id: str) -> bool:
        return example_id in self._where

    def __len__(self) -> int:
        return len(self._where)

    def read(self, example_ids: Sequence[str], labels: Tensor) -> StoredDistributions:
        """The distributions of N examples, padded to `labels` (N, T).

        Raises:
            UserError: the stored targets are not those of `labels`: another reference, tokenizer or truncation.
        """
        n, t = labels.shape
        ids = np.full((n, t, self.k), -1, dtype=np.int64)
        log_probs = np.full((n, t, self.k), -np.inf, dtype=np.float32)
        tail = np.zeros((n, t), dtype=np.float32)
        present = np.zeros(n, dtype=bool)
        for row, example in enumerate(example_ids):
            if example not in self._where:
                continue
            shard, index = self._where[example]
            table = self._tables[shard]
            column = {name: table[name][index].values.to_numpy(zero_copy_only=False) for name in COLUMNS}
            length = len(column["labels"])
            target = labels[row][labels[row] != -100].cpu().numpy()
            if not np.array_equal(column["labels"], target):
                raise UserError(
                    f"the store {self.folder} holds another target for example {example}",
                    f"make the store for this run's data and tokenizer with {COMMAND}",
                )
            k = len(column["ids"]) // max(length, 1)
            ids[row, :length, :k] = column["ids"].reshape(length, k)
            log_probs[row, :length, :k] = column["log_probs"].reshape(length, k)
            tail[row, :length] = column["tail"]
            present[row] = True
        arrays = (ids, log_probs, tail, present)
        return StoredDistributions(*(torch.from_numpy(array).to(labels.device) for array in arrays))


def _open(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged or missing: {error}", f"delete it and run {COMMAND} again") from error


def _content(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for batch in table.combine_chunks().to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()
