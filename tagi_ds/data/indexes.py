"""The indexes of the configured collections: built once, by rank 0, and again when the data have changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagi_ds.config import DataConfig
from tagi_ds.data import p3, sni
from tagi_ds.data.index_writer import build_index
from tagi_ds.data.remote import is_remote
from tagi_ds.data.task_index import RawTask, TaskIndex
from tagi_ds.engine.distributed import is_main
from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable


@dataclass(frozen=True)
class Source:
    """A collection, or the part of one that has an index of its own.

    Attributes:
        collection, address: as configured; local addresses are absolute.
        scope: what beside the data decides the index' content.
        listing: facts that change when the data change; `files` lists them.
        scan: the tasks.
    """

    collection: str
    address: str
    scope: dict[str, Any]
    listing: Callable[[], dict[str, Any]]
    scan: Callable[[], Iterator[RawTask]]


def sni_source(address: str) -> Source:
    """All of SNI: splits choose among its tasks."""
    address = _absolute(address)
    return Source("sni", address, {}, lambda: sni.listing(address), lambda: sni.scan(address))


def p3_source(config: DataConfig, named: str, group: str) -> Source:
    """A named split of P3; `group` is the split of its rows.

    The run's seed has no part in it, so that one index serves all seeds of a study. `data.p3_max_examples` bounds what
    is trained on; rows to be tested on are all there, whatever number of them a run then counts.
    """
    assert config.p3_dir is not None
    address, limit = _absolute(config.p3_dir), config.p3_max_examples if group == "train" else None
    templates = None if config.p3_templates is None else _absolute(config.p3_templates)
    scope = {"split": named, "group": group, "max_examples": limit, "templates": templates}
    return Source(
        "p3",
        address,
        scope,
        lambda: p3.listing(address, templates, named, group),
        lambda: p3.scan(address, templates, named, group, limit),
    )


def open_index(config: DataConfig, source: Source) -> TaskIndex:
    """The source's index; on rank 0 it is built first where it is missing, damaged or out of date.

    Other ranks take it as rank 0 left it: a launcher lets them in after rank 0 has prepared it.
    """
    identity = _hash([source.collection, source.address, source.scope])[:16]
    folder = _index_dir(config) / f"{source.collection}-{identity}"
    if not is_main():
        return TaskIndex(folder)
    listing = source.listing()
    facts = {"collection": source.collection, "address": source.address, "scope": source.scope, "key": _hash(listing)}
    index = _fresh(folder, facts)
    if index is not None:
        return index
    with _alone(folder):
        # Another job may have built it while this one waited.
        index = _fresh(folder, facts)
        if index is None:
            build_index(folder, source.scan(), facts, len(listing["files"]))
            index = TaskIndex(folder)
    return index


def _fresh(folder: Path, facts: dict[str, Any]) -> TaskIndex | None:
    """The index in `folder` where it is whole and of these data."""
    try:
        index = TaskIndex(folder) if folder.is_dir() else None
    except UserError:
        # Written by another version or cut short; it is of our making and can be made again.
        return None
    return index if index is not None and index.facts == facts else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job at a time builds an index; the others wait, and then find it."""
    ensure_writable(folder.parent)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        # Without locks (some file systems) several would build the same, and the last one's stays.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _index_dir(config: DataConfig) -> Path:
    if config.index_dir is not None:
        return Path(config.index_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tagi_ds" / "index"


def _absolute(address: str) -> str:
    return address if is_remote(address) else os.path.abspath(address)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
