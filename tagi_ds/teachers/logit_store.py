"""The logit store: the teacher's distribution at every training target, k entries and the tail's mass a token.

Columnar Arrow shards, written by ranks in parallel and memory-mapped by readers. At k = 12 a token takes
12 · (int32 id + float16 log-probability) + a float32 tail = 76 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tagi_ds.errors import UserError
from tagi_ds.files import sha256_of, whole_file, write_json
from tagi_ds.losses import StoredDistributions
from tagi_ds.teachers.binding import read_manifest, require_fit

FORMAT = "tagi_ds logit store 1"
COMMAND = "launchers/store_logits.py"
SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("labels", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float16())),
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


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows (the schema's columns, lists flattened token by token) as one shard, whole or not at all."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    with whole_file(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)


def rows_of(
    example_ids: Sequence[str], labels: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor
) -> Iterator[dict[str, Any]]:
    """One row an example from padded tensors (N, T), (N, T, k), (N, T, k), (N, T); padding is dropped."""
    for row, example in enumerate(example_ids):
        real = labels[row] != -100
        yield {
            "example_id": example,
            "labels": labels[row][real].to(torch.int32).numpy(),
            "ids": ids[row][real].to(torch.int32).flatten().numpy(),
            "log_probs": log_probs[row][real].to(torch.float16).flatten().numpy(),
            "tail": tail[row][real].float().numpy(),
        }


def finish(folder: Path, shards: Sequence[Path], header: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest, which makes the store complete; returns it."""
    tokens = examples = size = 0
    table = {}
    for path in shards:
        columns = _open(path)
        tokens += len(columns["labels"].combine_chunks().flatten())
        examples += columns.num_rows
        size += path.stat().st_size
        table[path.name] = {"sha256": sha256_of(path), "examples": columns.num_rows}
    figures = {"examples": examples, "tokens": tokens, "bytes_per_token": round(size / max(tokens, 1), 2)}
    manifest = {"format": FORMAT, **header, **figures, "shards": table}
    write_json(folder / "manifest.json", manifest)
    return manifest


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
        for name, entry in self.manifest["shards"].items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != entry["sha256"]:
                raise UserError(f"{path} is missing or damaged", f"delete it and run {COMMAND} again")
            table = _open(path).combine_chunks()
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
            column = {name: table[name][index].values.to_numpy(zero_copy_only=False) for name in SCHEMA.names[1:]}
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
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is damaged or missing: {error}", f"delete it and run {COMMAND} again") from error
