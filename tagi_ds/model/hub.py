"""Models of the hub: which of a repository's files are read, fetched once a process."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path

from tagi_ds.errors import UserError


@functools.cache
def snapshot(name: str) -> Path:
    """The hub's snapshot of a model, fetched where it is not there; without a network, what was fetched before.

    Raises:
        UserError: the repository has no weights that could be read.
        Exception: the hub's or the network's own, where neither has the model.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        found = HfApi().model_info(name)
    except Exception as error:
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:
            raise error from None
    wanted = model_files([item.rfilename for item in found.siblings or []])
    # Not by the commit: the hub's cache would not know it as the newest, and not find it without a network.
    return Path(snapshot_download(name, allow_patterns=wanted))


def commit_of(folder: Path) -> str | None:
    """The commit of the hub's repository that a snapshot's folder holds; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def model_files(present: Collection[str]) -> list[str]:
    """Of a model repository's files those that are read: no weights twice, none of other frameworks.

    Raises:
        UserError: it has no weights that could be read.
    """
    top = [path for path in present if "/" not in path]
    weights = [path for path in top if path.endswith(".safetensors")]
    weights = weights or [path for path in top if path.startswith("pytorch_model") and path.endswith(".bin")]
    others = [path for path in top if path.endswith((".json", ".model"))]
    if not weights:
        raise UserError("the model has no weights as *.safetensors or pytorch_model*.bin", "name another model")
    form = ".safetensors" if weights[0].endswith(".safetensors") else ".bin"
    # An index names the shards of one form; the other form's would send readers to files that are not there.
    others = [path for path in others if not path.endswith(".index.json") or path.endswith(f"{form}.index.json")]
    return sorted({*weights, *others})
