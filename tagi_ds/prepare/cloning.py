"""Cloning git repositories for machines without network: whole or not at all, at a revision that can be named.

An address is ``https://...git``, behind it ``@REVISION`` (a tag, a branch or a whole commit) where not the newest state
is meant, and ``#FOLDER`` where only a folder of it is.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tagi_ds.data.remote import is_remote
from tagi_ds.errors import UserError
from tagi_ds.files import whole_folder

_ADDRESS = re.compile(r"(?P<url>.+?\.git)(?:@(?P<revision>[^#-][^#]*))?(?:#(?P<inner>.*))?")
_ASKED = "tagi.revision"
"""Key of a clone's own git configuration: the revision that its address named."""


def is_repository(address: str) -> bool:
    """Whether an address is a git repository's."""
    return is_remote(address) and _ADDRESS.fullmatch(address) is not None


def is_cloned(address: str, folder: Path) -> bool:
    """Whether a folder is the clone of that very repository and revision; the folder inside it has no say.

    A branch that has moved on since counts as the same: what was cloned is kept until it is deleted.

    Raises:
        UserError: git is not installed.
    """
    url, asked, _ = _parts(address)
    if not (folder / ".git").is_dir() or _said(folder, "config", "--get", "remote.origin.url") != url:
        return False
    return asked == (_said(folder, "config", "--get", _ASKED) or "") or asked == revision(folder)


def clone(address: str, folder: Path) -> Path:
    """Clones a git repository without its history, whole or not at all; the clone that is there is kept.

    A clone of another repository or revision is replaced.

    Args:
        address: of the repository.
        folder: of the clone.

    Returns:
        The clone, or the folder of it that the address names.

    Raises:
        UserError: git cannot clone it, the folder is there and no clone, or the named folder is not in the repository.
    """
    url, asked, inner = _parts(address)
    if not is_cloned(address, folder):
        if folder.exists() and not (folder / ".git").is_dir():
            raise UserError(
                f"{folder} is there and not a clone of {url}",
                "delete it, choose another --to FOLDER, or name that folder itself in the recipe",
            )
        with whole_folder(folder) as aside:
            _do(address, aside, "init", "--quiet")
            _do(address, aside, "remote", "add", "origin", url)
            _do(address, aside, "config", _ASKED, asked)
            # Unlike `git clone --branch` this takes commits too.
            _do(address, aside, "fetch", "--quiet", "--depth", "1", "origin", asked or "HEAD")
            _do(address, aside, "checkout", "--quiet", "FETCH_HEAD")
    if not (folder / inner).is_dir():
        raise UserError(f"{url} has no folder {inner}", "mend what follows the # in the address")
    return folder / inner


def revision(folder: Path) -> str | None:
    """The commit of a clone, or None where it is none."""
    return _said(folder, "rev-parse", "HEAD")


def _parts(address: str) -> tuple[str, str, str]:
    """URL, revision and folder of an address, the latter two possibly empty."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise UserError(f"{address} is no git repository", "write https://...git, @REVISION and #FOLDER behind it")
    return found["url"], found["revision"] or "", found["inner"] or ""


def _said(folder: Path, *words: str) -> str | None:
    """What git says about a clone, or None where it fails; never about a repository that the folder lies in."""
    ended = _git(folder, f"--git-dir={folder / '.git'}", *words)
    return ended.stdout.strip() if ended.returncode == 0 else None


def _do(address: str, folder: Path, *words: str) -> None:
    ended = _git(folder, *words)
    if ended.returncode != 0:
        reason = (ended.stderr.strip().splitlines() or ["git said nothing"])[-1]
        raise UserError(
            f"{address} cannot be cloned: {reason}",
            "check the address, its revision (a tag, a branch or a whole commit) and the network",
        )


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise UserError("repositories are cloned by git, which is not installed", "install git") from error
