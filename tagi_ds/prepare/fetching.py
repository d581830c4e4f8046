"""Fetching files for machines without network: each whole or absent, verified, resumable."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable, sha256_of, whole_file

LEDGER = "fetched.jsonl"
"""One line a fetched file: where it came from, its size and SHA-256."""
TRIES = 4
"""Attempts at a file before its error is believed."""
DOWNLOADS = 8
"""Files fetched at the same time."""
RESERVE = 1 << 30
"""Bytes left free on the disk."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch.

    Attributes:
        address: of the whole source, for messages and the ledger.
        path: in its file system.
        local: where it goes, relative to the target folder.
        size: in bytes, as the source says.
        sha256, git_sha: hex digests as the source says; empty where it says none. `git_sha` is git's of a blob.
    """

    address: str
    path: str
    local: str
    size: int
    sha256: str = ""
    git_sha: str = ""


def listing(address: str, local: str) -> tuple[fsspec.AbstractFileSystem, list[RemoteFile]]:
    """The files under an address and their file system, sorted by name.

    Args:
        address: any that fsspec opens, e.g. ``hf://datasets/allenai/c4/en``.
        local: folder under the target that they belong to.

    Raises:
        UserError: nothing is there, or it cannot be reached.
    """
    try:
        system, root = url_to_fs(address)
        found = _again(lambda: system.find(root, detail=True), address)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{address} cannot be opened: {error}", "use an address that fsspec opens (hf://, s3://)"
        ) from error
    files = []
    for path, info in sorted(found.items()):
        inner = PurePosixPath(path).relative_to(root) if path != root else PurePosixPath(PurePosixPath(path).name)
        if ".." in inner.parts:
            raise UserError(f"{address} names a file outside itself: {inner}", "do not fetch from that source")
        lfs = info.get("lfs")
        files.append(
            RemoteFile(
                address=address,
                path=path,
                local=f"{local}/{inner}",
                size=int(info.get("size") or 0),
                sha256=str(lfs["sha256"]) if lfs else "",
                git_sha="" if lfs else str(info.get("blob_id") or ""),
            )
        )
    if not files:
        raise UserError(f"{address} holds no file", "check the address, and that this machine may read it")
    return system, files


def missing(files: Iterable[RemoteFile], target: Path) -> list[RemoteFile]:
    """Those files that the target's ledger does not hold or that are no longer there in their size."""
    ledger = read_ledger(target)
    wanted = []
    for file in files:
        path, entry = target / file.local, ledger.get(file.local, {})
        known = entry.get("address") == file.address and entry.get("source_size") == file.size
        known = known and (not file.sha256 or entry.get("sha256") == file.sha256)
        if not (known and path.is_file() and path.stat().st_size == entry.get("size")):
            wanted.append(file)
    return wanted


def require_space(target: Path, needed: int, what: str) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        UserError: fewer than `needed` bytes and a reserve are free.
    """
    ensure_writable(target)
    free = shutil.disk_usage(target).free
    if needed + RESERVE > free:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB, and {target} has {free / 1e9:.1f} GB free",
            "free space, choose another --to FOLDER, or fetch fewer shards (--c4_shards N)",
        )


def fetch(system: fsspec.AbstractFileSystem, files: Sequence[RemoteFile], target: Path, show: bool = True) -> None:
    """Fetches files side by side; what is there after an interruption is not fetched again.

    Args:
        system: of the files.
        files: of :func:`missing`.
        target: they go to `target / file.local`, each written aside, verified and renamed.
        show: a progress bar in bytes.

    Raises:
        UserError: a file cannot be had, or is not what its source says, after several tries.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, disable=not show, transient=True) as progress, ThreadPoolExecutor(DOWNLOADS) as pool:
        bar = progress.add_task("fetching", total=sum(file.size for file in files))
        begun = [pool.submit(_fetch_one, system, file, target) for file in files]
        try:
            for done in as_completed(begun):
                entry = done.result()
                _append(target / LEDGER, entry)
                progress.advance(bar, entry["source_size"])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_ledger(target: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> what was fetched there last; a line that was cut by a crash does not count."""
    path = target / LEDGER
    entries: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            entries[entry["local"]] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return entries


class _FetchError(Exception):
    """A transfer that failed or brought something else than the source says: worth another try."""


def _fetch_one(system: fsspec.AbstractFileSystem, file: RemoteFile, target: Path) -> dict[str, Any]:
    def once() -> dict[str, Any]:
        with whole_file(target / file.local) as aside:
            try:
                system.get_file(file.path, str(aside))
            except OSError as error:
                if error.errno in _DISK:
                    raise
                # Not the disk's: whole_file would call it a failure to write.
                raise _FetchError(f"{type(error).__name__}: {error}") from error
            digest, size = sha256_of(aside), aside.stat().st_size
            _compare(file, aside, digest, size)
        return {"local": file.local, "address": file.address, "source_size": file.size, "size": size, "sha256": digest}

    return _again(once, f"{file.address} ({file.local})")


def _compare(file: RemoteFile, aside: Path, digest: str, size: int) -> None:
    """Raises _FetchError where a fetched file is not what its source says."""
    if size != file.size:
        raise _FetchError(f"{size} bytes came of {file.size}")
    if file.sha256 and digest != file.sha256:
        raise _FetchError(f"its SHA-256 is {digest[:12]}… instead of {file.sha256[:12]}…")
    if file.git_sha:
        own = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with aside.open("rb") as handle:
            for block in iter(lambda: handle.read(1 << 20), b""):
                own.update(block)
        if own.hexdigest() != file.git_sha:
            raise _FetchError(f"its git digest is {own.hexdigest()[:12]}… instead of {file.git_sha[:12]}…")


def _again(work: Callable[[], Any], what: str) -> Any:
    for number in range(1, TRIES + 1):
        try:
            return work()
        except (FileNotFoundError, UserError, ImportError) as error:
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{what} does not exist", "check the address") from error
            raise
        # Every library has its own errors for a network that fails for a moment; none of them is worth a crash.
        except Exception as error:
            if number == TRIES:
                raise UserError(
                    f"{what} cannot be fetched: {error or type(error).__name__}",
                    "check the network and the rights (hf auth login); the same command then goes on",
                ) from error
            time.sleep(min(2.0**number, 30.0) * 0.25)


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as handle:
        # The line break comes first, so that a line cut by a crash spoils no other.
        handle.write("\n" + json.dumps(entry))
