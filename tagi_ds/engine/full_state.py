"""What trains, whole and by name: float32 masters and the optimizer's state, as safetensors of bounded size.

The form belongs to no number of processes. One process saves it as it is; of the shards that ZeRO and the pipeline
save, :mod:`tagi_ds.engine.universal` makes it. A kind of tensors is `weights` or an entry of the optimizer's state
(AdamW: `exp_avg`, `exp_avg_sq`, `step`), each in files of its own, ``KIND.safetensors``, ``KIND-2.safetensors``, ...,
under the parameters' names; ``full.json`` lists them. Entries that are numbers are tensors without dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tagi_ds.engine.disk import writing_told
from tagi_ds.errors import UserError
from tagi_ds.files import read_json, write_json

WEIGHTS = "weights"
"""Kind of the float32 masters."""
INDEX = "full.json"
SHARD_BYTES = 2**30
"""Bytes of a file, and hence of the memory that writing takes; a larger tensor has a file of its own."""


def write_full_state(
    folder: Path, kinds: Mapping[str, Iterable[tuple[str, Tensor]]], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes into an existing folder; at most `shard_bytes` and one tensor more are held at a time.

    Args:
        kinds: by kind, (parameter name, tensor) one after the other.

    Returns:
        The files.

    Raises:
        UserError: a file cannot be written.
    """
    files: dict[str, list[str]] = {}
    for kind, tensors in kinds.items():
        shard: dict[str, Tensor] = {}
        size, files[kind] = 0, []
        for name, tensor in tensors:
            if shard and size + tensor.nbytes > shard_bytes:
                _write_shard(folder, kind, shard, files[kind])
                shard, size = {}, 0
            shard[name] = tensor.detach().cpu().contiguous()
            size += tensor.nbytes
        _write_shard(folder, kind, shard, files[kind])
    write_json(folder / INDEX, {"files": files})
    return [folder / INDEX, *(folder / name for names in files.values() for name in names)]


class FullState:
    """Reads what :func:`write_full_state` wrote; nothing but the asked tensor is held.

    Args:
        folder: of a checkpoint whose manifest has been verified.

    Raises:
        UserError: the index is missing or is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._files: dict[str, list[str]] = dict(read_json(folder / INDEX)["files"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder / INDEX} lists no files", "convert the checkpoint again") from error

    @property
    def kinds(self) -> list[str]:
        """`weights` first, then the entries of the optimizer's state."""
        return list(self._files)

    def names(self, kind: str) -> list[str]:
        """Parameters that have a tensor of that kind."""
        return [name for name, _ in self._places[kind].items()] if kind in self._files else []

    def tensor(self, kind: str, name: str) -> Tensor:
        """One tensor on the CPU, mapped from its file: not to be written to.

        Raises:
            UserError: there is no such tensor, or its file cannot be read.
        """
        try:
            return self._places[kind][name].get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise UserError(f"{self.folder} has no {kind} of {name}", "restore it, or convert it again") from error

    @cached_property
    def _places(self) -> dict[str, dict[str, Any]]:
        places: dict[str, dict[str, Any]] = {}
        for kind, files in self._files.items():
            places[kind] = {}
            for file in files:
                try:
                    opened = safe_open(self.folder / file, framework="pt")
                except (OSError, SafetensorError) as error:
                    raise UserError(f"cannot read {self.folder / file}: {error}", "restore that file") from error
                places[kind].update(dict.fromkeys(opened.keys(), opened))
        return places


def _write_shard(folder: Path, kind: str, shard: dict[str, Tensor], written: list[str]) -> None:
    name = f"{kind}.safetensors" if not written else f"{kind}-{len(written) + 1}.safetensors"
    with writing_told(folder / name):
        save_file(shard, folder / name)
    written.append(name)
