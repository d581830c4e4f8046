"""Whether a folder of files is as it was written: a manifest of their sizes and hashes, written last.

Who wrote a file hashes it at once, while it is still in that machine's memory, and several files at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from tagi_ds.errors import UserError
from tagi_ds.files import read_json, sha256_of, write_json

MANIFEST = "manifest.json"
Facts: TypeAlias = dict[str, dict[str, Any]]
"""By a file's name within the folder, its `size` in bytes and its `sha256`."""

_THREADS = 4
"""Files that a process reads at a time; hashing leaves the interpreter to others."""


def facts_of(folder: Path, files: Iterable[Path]) -> Facts:
    """Makes files in `folder` durable and says what they are.

    Raises:
        OSError: one cannot be read, or the disk did not take it after all.
    """

    def facts(file: Path) -> dict[str, Any]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        return {"size": file.stat().st_size, "sha256": sha256_of(file)}

    ordered = sorted(set(files))
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(facts, ordered))
    return {file.relative_to(folder).as_posix(): each for file, each in zip(ordered, found, strict=True)}


def seal(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Makes the files durable, then writes the manifest that says so.

    Args:
        known: what those who wrote files have said of them (`facts_of`); the others are read here.
    """
    known = known or {}
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    facts = {**facts_of(folder, (path for name, path in there.items() if name not in known)), **known}
    write_json(folder / MANIFEST, {"files": dict(sorted(facts.items()))})


def missing_of(folder: Path, facts: Mapping[str, dict[str, Any]]) -> list[str]:
    """Files that are not in a folder, or not in their whole size, as this machine sees it now."""
    for place in {(folder / name).parent for name in facts}:
        # Opened, a folder on a network disk is asked for what others have put there meanwhile.
        if place.is_dir():
            os.listdir(place)
    return [name for name, each in facts.items() if _size(folder / name) != each["size"]]


def damage_of(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder's files, in words; None when they are those of its manifest.

    Args:
        part, parts: of so many parts, alike in bytes, the one that is looked at; default the whole.
    """
    try:
        listed = read_json(folder / MANIFEST)["files"]
        names = _dealt({name: int(facts["size"]) for name, facts in listed.items()}, parts)[part]
        for name in names:
            if not (folder / name).is_file():
                return f"{name} is missing"
        with ThreadPoolExecutor(_THREADS) as threads:
            same = list(threads.map(lambda name: _is_as_listed(folder / name, listed[name]), names))
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        return str(error).splitlines()[0]
    changed = [name for name, is_same in zip(names, same, strict=True) if not is_same]
    return f"{changed[0]} is not as it was written" if changed else None


def _is_as_listed(file: Path, facts: Mapping[str, Any]) -> bool:
    return file.stat().st_size == facts["size"] and sha256_of(file) == facts["sha256"]


def _dealt(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names in so many parts, alike in bytes: the largest first, each to the part that has least."""
    dealt: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        dealt[least].append(name)
        loads[least] += sizes[name]
    return dealt


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
