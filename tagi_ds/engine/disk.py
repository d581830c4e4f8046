"""What several processes write to one disk: whether all of it came there, and one error on all of them where not."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from tagi_ds.engine.distributed import current, gather_objects, is_main
from tagi_ds.engine.manifest import missing_of
from tagi_ds.errors import UserError

T = TypeVar("T")

ARRIVES_S = 30.0
"""How long a network disk may take to show one machine what another has written."""
_OF_TORCH = ("inline_container", "PytorchStreamWriter", "write(): fd")
"""What torch.save says, in a RuntimeError without a number, of a file that it could not write to its end."""


def write_failure(path: Path, error: BaseException) -> UserError | None:
    """The error for a file that could not be written; None for errors that tell of something else.

    Args:
        path: of the file, or the folder if the file is not known; an OSError's own file name comes first.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        # Of a copy, the second is where it was to go.
        named, why = Path(error.filename2 or error.filename or path), error.strerror or str(error)
    elif isinstance(error, SafetensorError):
        named, why = path, str(error)
    elif isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_TORCH):
        named, why = path, f"the disk is full, or a quota is reached ({str(error).splitlines()[0]})"
    else:
        return None
    return UserError(
        f"cannot write {named}: {why}",
        "free space on that disk (or raise the quota), or mend its permissions; what was there before is untouched",
    )


@contextmanager
def writing_told(path: Path) -> Iterator[None]:
    """Within it a file that cannot be written ends in a UserError that names it (see `write_failure`).

    Raises:
        UserError: in the place of Python's, torch's and safetensors' own.
    """
    try:
        yield
    except Exception as error:
        told = write_failure(path, error)
        if told is None or told is error:
            raise
        raise told from error


def together(action: Callable[[], T], path: Path) -> list[T]:
    """Runs `action` on every rank and waits; what one cannot write is raised on all, so that none waits in vain.

    Args:
        action: writes, and joins no collective operation that another rank would miss; what it returns is JSON-able.
        path: told in an error that names no file.

    Returns:
        What it returned, by rank.

    Raises:
        UserError: on every rank, the first one's.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        told = write_failure(path, error)
        if told is None:
            raise
        failure = [told.problem, told.mend]
    gathered = gather_objects({"result": result, "failure": failure})
    failures = [each["failure"] for each in gathered if each["failure"]]
    if failures:
        raise UserError(*failures[0])
    return [each["result"] for each in gathered]


def require_shared(folder: Path) -> None:
    """Checks that a folder is the same one on every machine, by what rank 0 writes there; called on all ranks together.

    Raises:
        UserError: on every rank, naming the machines on which it is another one.
    """
    if current().world_size == 1:
        return
    sign = folder / together(lambda: _leave_sign(folder) if is_main() else "", folder)[0]
    try:
        found = gather_objects([socket.gethostname(), _appears(sign)])
    finally:
        if is_main():
            sign.unlink(missing_ok=True)
    blind = sorted({host for host, appeared in found if not appeared})
    if blind:
        others = ", ".join(blind[:4]) + (f" and {len(blind) - 4} more" if len(blind) > 4 else "")
        raise UserError(
            f"{folder} on {others} is not the folder of that name on {found[0][0]}, where rank 0 runs: each machine "
            "has its own, and no checkpoint would be whole",
            "choose an --output_dir on a disk that all machines share",
        )


def _leave_sign(folder: Path) -> str:
    # A name that is new: no machine can remember that it was not there.
    name = f".shared.{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + ARRIVES_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
        # Opened, a folder on a network disk is asked for what others have put there meanwhile.
        os.listdir(file.parent)
    return True


def require_parts(folder: Path, parts: list[dict[str, Any]]) -> None:
    """Waits until this machine sees what every rank has written.

    Args:
        parts: by rank, its `host` and its `files` (`facts_of`).

    Raises:
        UserError: it does not: the folder lies on a disk of this machine's own.
    """
    deadline = time.monotonic() + ARRIVES_S
    for rank, part in enumerate(parts):
        while missing := missing_of(folder, part["files"]):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder.parent} on {socket.gethostname()} lacks what rank {rank} on {part['host']} has written "
                    f"there ({missing[0]}): each machine has a folder of its own; earlier checkpoints are as they were",
                    "choose an --output_dir on a disk that all machines share",
                )
            time.sleep(0.5)
