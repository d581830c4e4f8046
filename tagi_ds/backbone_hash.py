"""The content hash of a model folder, made by one of the run's processes: of an 11B model it takes 44 GB of reading."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from tagi_ds.build import study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.engine.distributed import broadcast_object, current, is_main, main_first
from tagi_ds.errors import UserError
from tagi_ds.model.backbone import content_hash, tell_content_hash, weight_files

_SAMPLE = 2**20


def share_backbone_hash(config: RunConfig) -> None:
    """:func:`share_hash` of the study's backbone; where there is none, whoever needs one says so."""
    if current().world_size == 1:
        return
    folder = None
    with contextlib.suppress(UserError):
        folder = study_backbone(config)
    share_hash(folder)


def share_hash(folder: Path | None) -> None:
    """Lets rank 0 hash a model folder's weights for all ranks; called on all ranks together.

    A rank whose machine has other files under that name (by their names, sizes, beginnings and ends) hashes its own.

    Args:
        folder: None where this rank has none.
    """
    if current().world_size == 1:
        return
    mine = _traces(folder)
    theirs = broadcast_object(mine)
    if theirs is None:
        return
    main_first(lambda: content_hash(folder) if folder is not None else None)
    digest = broadcast_object(content_hash(folder) if is_main() and folder is not None else None)
    if folder is not None and mine == theirs:
        tell_content_hash(folder, digest)


def _traces(folder: Path | None) -> list[list[str | int]] | None:
    """Of every weight file its name, size in bytes, and the SHA-256 of its beginning and end; None without any."""
    try:
        return None if folder is None else [_trace(file) for file in weight_files(folder)]
    except (UserError, OSError):
        return None


def _trace(file: Path) -> list[str | int]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        sample = handle.read(_SAMPLE)
        handle.seek(max(0, size - _SAMPLE))
        sample += handle.read(_SAMPLE)
    return [file.name, size, hashlib.sha256(sample).hexdigest()]
