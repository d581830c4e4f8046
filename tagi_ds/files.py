"""Files that are whole or absent: write aside, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagi_ds.errors import UserError

_PROCESS = secrets.token_hex(4)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it is fsynced and renamed over `path`.

    Raises:
        UserError: the folder cannot be written to or the disk is full; `path` is then as it was.
    """
    aside = path.with_name(f".{path.name}.{_writer()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", _mend_for(error)) from error
    finally:
        aside.unlink(missing_ok=True) if path.parent.is_dir() and os.access(path.parent, os.W_OK) else None


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; on success its files are fsynced and it is renamed to `path`.

    An existing `path` is replaced only then.

    Raises:
        UserError: the folder cannot be written to or the disk is full; `path` is then as it was.
    """
    aside = path.with_name(f".{path.name}.{_writer()}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            old = path.with_name(f".{path.name}.{_writer()}.old")
            os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old)
        else:
            os.replace(aside, path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", _mend_for(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole, as :func:`json_text`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """An object as an indented JSON text that ends with a line break."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: it is missing or not JSON; the text names the place.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing", "check the path, or run the stage that writes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}", "fetch or write the file again") from error


def read_json_lines(path: Path) -> list[Any]:
    """The whole lines of a JSON-lines file, none where there is no file.

    What follows the last line break was being written when its process ended, and is left out.

    Raises:
        UserError: a whole line is not JSON.
    """
    found = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}", "delete that line") from error
    return found


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def ensure_writable(folder: Path) -> None:
    """Creates `folder` and proves that a file can be written there.

    Raises:
        UserError: it cannot.
    """
    probe = folder / f".writable.{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}", _mend_for(error)) from error


def _writer() -> str:
    """This process, in a name: containers that share a folder may share process ids too."""
    return f"{os.getpid()}-{_PROCESS}"


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mend_for(error: OSError) -> str:
    if error.errno == 28:
        return "free space on that disk, or choose another --output_dir; what was there before is untouched"
    return "choose a folder that you may write to (--output_dir), or mend its permissions"
