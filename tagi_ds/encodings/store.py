"""The files of encoded instructions: memory-mapped safetensors under a manifest that says whose they are.

A folder with ``manifest.json`` and ``encodings-*.safetensors``, each of which holds one tensor (tokens, d), the
encodings of some instructions one behind the other without padding, in the type in which the run computes. An
instruction is found by its token ids: equal ids have equal encodings, whichever task or wording they are of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tagi_ds.data.collate import PAD_MULTIPLE
from tagi_ds.errors import UserError
from tagi_ds.files import whole_file
from tagi_ds.teachers.binding import content_checksum, read_manifest, require_fit, write_manifest

FORMAT = "tagi_ds instruction encodings 1"
COMMAND = "launchers/finetune.py"
TENSOR, HEADER = "encodings", "tagi_ds"
BATCH_TOKENS = 8192
"""Tokens, padding included, of the instructions that are encoded together and lie in one file."""
LEAST_SHARE = 0.75
"""Of the longest of them, what each of the others has at least: padding is encoded too."""


def key_of(ids: np.ndarray) -> str:
    """Hex digest of an instruction's token ids (length,)."""
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Shard:
    """Instructions that are encoded together, the longest first.

    Attributes:
        name: of their file, which tells their token ids and all that the encodings depend on.
        rows: token ids (length,) each.
    """

    name: str
    rows: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(map(len, self.rows))


def plan_shards(instructions: Iterable[np.ndarray], binding: Mapping[str, Any]) -> list[Shard]:
    """Distinct instructions in groups of like lengths, the longest first: memory that does not suffice shows at once.

    Neither processes nor the order of the tasks matter, so that the files' bytes do not depend on them either.

    Args:
        instructions: token ids (length,) each; equal ones are one.
        binding: what the encodings depend on beside their ids.
    """
    found = {key_of(ids): ids for ids in instructions}
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    groups: list[list[tuple[str, np.ndarray]]] = []
    for key, ids in ordered:
        longest = len(groups[-1][0][1]) if groups else 0
        width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
        if not groups or (len(groups[-1]) + 1) * width > BATCH_TOKENS or len(ids) < LEAST_SHARE * longest:
            groups.append([])
        groups[-1].append((key, ids))
    bound = content_checksum(binding)
    return [
        Shard(
            f"encodings-{content_checksum({'binding': bound, 'keys': [key for key, _ in group]})[:24]}.safetensors",
            tuple(ids for _, ids in group),
        )
        for group in groups
    ]


def write_shard(path: Path, shard: Shard, encoded: Tensor) -> None:
    """Writes a shard's file, whole or not at all.

    Args:
        path: the file.
        shard: its instructions.
        encoded: (U, S, d), a row each, padded behind its tokens.

    Raises:
        UserError: it cannot be written.
    """
    parts = [row[: len(ids)] for row, ids in zip(encoded, shard.rows, strict=True)]
    tensor = torch.cat(parts).contiguous().cpu()
    with whole_file(path) as aside:
        aside.write_bytes(save({TENSOR: tensor}, {HEADER: json.dumps({"content": _content(path.name, tensor)})}))


def is_whole(path: Path) -> bool:
    """Whether a shard's file is there as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[HEADER])["content"]
            return bool(content == _content(path.name, file.get_tensor(TENSOR)))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return False


def _content(name: str, tensor: Tensor) -> str:
    # With the name: another shard's file in this one's place is not whole either.
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def finish(folder: Path, shards: Sequence[Shard], binding: Mapping[str, Any], flops: int) -> None:
    """Writes the manifest, which makes the cache complete, and removes what it does not name.

    Args:
        folder: the cache.
        shards: all of it, each whole.
        binding: what it is bound to.
        flops: what building it took.
    """
    table = {
        shard.name: {
            "size": (folder / shard.name).stat().st_size,
            "rows": [[key_of(ids), len(ids)] for ids in shard.rows],
        }
        for shard in shards
    }
    write_manifest(folder, {"format": FORMAT, "binding": dict(binding), "flops": flops, "shards": table})
    # What killed builders and an earlier cache left.
    for path in [*folder.glob(".*.part"), *folder.glob("encodings-*")]:
        if path.name not in table:
            path.unlink(missing_ok=True)


class EncodingStore:
    """Reads a finished cache; of the mapped files only what is asked for comes into memory.

    Args:
        folder: the cache, whose files were looked through before (:func:`is_whole`).
        binding: what it must be bound to.

    Raises:
        UserError: unfinished, bound to something else, or a file is missing or of another size.
    """

    def __init__(self, folder: Path, binding: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, FORMAT, COMMAND)
        require_fit(folder, self.manifest["binding"], binding, COMMAND)
        self._places: dict[str, tuple[str, int, int]] = {}
        for name, entry in self.manifest["shards"].items():
            path, at = folder / name, 0
            if not path.is_file() or path.stat().st_size != entry["size"]:
                raise _damaged(path)
            for key, length in entry["rows"]:
                self._places[key] = name, at, length
                at += length
        self._files: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry["size"] for entry in self.manifest["shards"].values())

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The encodings (U, S, d) of instructions, zeros behind each one's tokens.

        Args:
            ids, mask: (U, S) int64 on the CPU, padded right.

        Raises:
            UserError: one is not in the cache.
        """
        rows = [self._row(row[: int(length)].numpy()) for row, length in zip(ids, mask.sum(1), strict=True)]
        padded = rows[0].new_zeros((*ids.shape, rows[0].shape[-1]))
        for to, row in zip(padded, rows, strict=True):
            to[: len(row)] = row
        return padded

    def _row(self, ids: np.ndarray) -> Tensor:
        place = self._places.get(key_of(ids))
        if place is None:
            raise UserError(
                f"{self.folder} lacks an instruction of {len(ids)} tokens that begins {ids[:8].tolist()}",
                "set engine.instruction_cache off, which encodes it in the step",
            )
        name, at, length = place
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt").get_slice(TENSOR)
            except (OSError, SafetensorError) as error:
                raise _damaged(self.folder / name) from error
        row: Tensor = self._files[name][at : at + length]
        return row


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is missing or damaged", f"run {COMMAND} again, which makes it anew")
