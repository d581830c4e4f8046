"""Building the cache of encoded instructions, all ranks together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tagi_ds.data.collate import pad_ids
from tagi_ds.encodings.store import COMMAND, FORMAT, Shard, finish, is_whole, write_shard
from tagi_ds.engine.disk import together
from tagi_ds.engine.distributed import at, broadcast_object, is_main, main_first
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.engine.progress import Progress
from tagi_ds.engine.strategy import Strategy
from tagi_ds.errors import UserError
from tagi_ds.teachers.binding import read_manifest


def build(
    folder: Path,
    shards: Sequence[Shard],
    binding: Mapping[str, Any],
    strategy: Strategy,
    width: int,
    say: Callable[[str], None],
) -> None:
    """Makes the cache complete, or finds that it is; called on all ranks.

    What is there and whole stays, so that a killed build goes on. A cache of something else is made anew: it is
    derived from what the run has at hand, in less time than a user takes to read a refusal.

    Args:
        folder: of the cache, which every rank sees.
        shards: all that it is to hold.
        binding: what it depends on.
        strategy: prepared; its encoder encodes.
        width: d.
        say: a line of text from rank 0.

    Raises:
        UserError: the disk has no room for it, or a file cannot be written; on every rank.
    """
    found: dict[str, Any] = {}

    def look() -> None:
        found.update(_take_stock(folder, shards, binding, say))
        _require_room(folder, [shard for shard in shards if shard.name in found["left"]], strategy.dtype, width, say)

    main_first(look)
    found = broadcast_object(found)
    left = [shard for shard in shards if shard.name in found["left"]]
    if found["finished"] and not left:
        return
    flops = found["flops"] + (_encode(folder, left, strategy) if left else 0)
    main_first(lambda: finish(folder, shards, binding, flops))


def _take_stock(
    folder: Path, shards: Sequence[Shard], binding: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Names of the files that are missing or damaged, whether there is a manifest of this cache, and its operations."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        manifest = read_manifest(folder, FORMAT, COMMAND)
    except UserError:
        manifest = None
    bound = {} if manifest is None else manifest["binding"]
    differing = [key for key, value in binding.items() if bound.get(key) != value]
    if manifest is not None and differing:
        say(f"the instructions in {folder} were encoded for another {', '.join(differing)}: they are encoded anew")
        manifest = None
    left = [shard.name for shard in shards if not is_whole(folder / shard.name)]
    if manifest is not None and left:
        say(f"{len(left)} of {len(shards)} files in {folder} are missing or damaged: they are made anew")
    return {"left": left, "finished": manifest is not None, "flops": manifest["flops"] if manifest else 0}


def _require_room(
    folder: Path, left: Sequence[Shard], dtype: torch.dtype, width: int, say: Callable[[str], None]
) -> None:
    """Tells what is about to be written, and refuses a disk that has no room for it."""
    if not left:
        return
    need, free = sum(shard.tokens for shard in left) * width * dtype.itemsize, shutil.disk_usage(folder).free
    say(f"encoding {sum(len(shard.rows) for shard in left)} instructions once: {need / 1e9:.3f} GB in {folder}")
    if need > free:
        raise UserError(
            f"{folder} needs {need / 1e9:.3f} GB for encoded instructions, and its disk has {free / 1e9:.3f} GB free",
            "free space on that disk, choose another --output_dir, or set engine.instruction_cache off",
        )


def _encode(folder: Path, left: Sequence[Shard], strategy: Strategy) -> int:
    """Encodes and writes shards, each on one replica; FLOPs of all ranks.

    Sharded parameters are gathered by all ranks together, so every rank runs equally often: one that has no shard left
    runs the last one, the smallest, for nothing.
    """
    replica, device, flops = strategy.replica, strategy.ranks.device, 0
    total = sum(len(shard.rows) for shard in left)
    with Progress("encoding instructions", total, unit="instruction", show=is_main()) as bar:
        for first in range(0, len(left), replica.count):
            at(f"encoding of instructions, file {first + 1} of {len(left)}")
            mine, turn = first + replica.index < len(left), left[first : first + replica.count]
            shard, meter = turn[replica.index] if mine else left[-1], FlopMeter()
            ids, mask = pad_ids(shard.rows)
            with meter.counting():
                encoded = strategy.encode_instructions(ids.to(device), mask.to(device))
            path = folder / shard.name if mine and replica.speaks else None
            flops += sum(together(partial(_keep, path, shard, encoded, meter.flops if mine else 0), folder))
            bar.update(bar.done + sum(len(each.rows) for each in turn))
    return flops


def _keep(path: Path | None, shard: Shard, encoded: Tensor, flops: int) -> int:
    """Writes a file's encodings where this rank is to, and tells what they took."""
    if path is not None:
        write_shard(path, shard, encoded)
    return flops
