"""What a store is bound to, and the refusal of a store that belongs to something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tagi_ds.config import DataConfig, TeacherConfig
from tagi_ds.data.examples import Task
from tagi_ds.data.mixture import fingerprint
from tagi_ds.data.prompts import PROMPT_FIELDS
from tagi_ds.errors import UserError
from tagi_ds.files import json_text, read_json, sha256_of, write_json

MANIFEST = "manifest.json"
CHECKSUM = "checksum"
INPUT_FIELDS = ("prompt", "max_source_tokens", "max_target_tokens")
"""Those of PROMPT_FIELDS that decide what is read of an example without its instruction."""


def dataset_fingerprint(tasks: Sequence[Task]) -> str:
    """Hex SHA-256 over every task's wording, examples and references, in order of the task names."""
    return fingerprint(sorted(tasks, key=lambda task: task.name))


def tokenizer_hash(tokenizer: Any) -> str:
    """Hex SHA-256 over a tokenizer's vocabulary with its ids."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def data_binding(config: DataConfig, tasks: Sequence[Task], tokenizer: Any) -> dict[str, Any]:
    """What a store of figures of whole prompts is bound to: data set, prompt format, tokenizer."""
    prompt = {name: getattr(config, name) for name in PROMPT_FIELDS}
    return {"dataset": dataset_fingerprint(tasks), "tokenizer": tokenizer_hash(tokenizer), **prompt}


def input_binding(config: DataConfig, tasks: Sequence[Task], tokenizer: Any) -> dict[str, Any]:
    """What a store of models of bare inputs is bound to: no wording of an instruction, and no demonstration.

    `inputs` is the fingerprint of the tasks without them: names, units, examples and references.
    """
    bare = [replace(task, definition="", paraphrases=(), positives=(), negatives=()) for task in tasks]
    prompt = {name: getattr(config, name) for name in INPUT_FIELDS}
    return {"inputs": dataset_fingerprint(bare), "tokenizer": tokenizer_hash(tokenizer), **prompt}


def teacher_binding(config: TeacherConfig) -> dict[str, Any]:
    """What a logit store's distributions are; a run must ask for the same."""
    size = "top_k" if config.method == "topk" else "draws"
    return {name: getattr(config, name) for name in ("method", size, "temperature", "demonstrations")}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes ``manifest.json``, which makes a store complete, with a checksum over its own content."""
    write_json(folder / MANIFEST, {**manifest, CHECKSUM: content_checksum(manifest)})


def content_checksum(content: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a JSON-able object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, kind: str, command: str, earlier: Collection[str] = ()) -> dict[str, Any]:
    """A store's manifest, as :func:`write_manifest` wrote it.

    Args:
        folder: the store.
        kind: what the manifest's ``format`` must be.
        command: the launcher that makes such a store, for the mend.
        earlier: values of ``format`` from before `kind` that the caller reads too.

    Raises:
        UserError: missing, unfinished, not JSON, of another kind, or altered since it was written.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder} is not a finished store: manifest.json is missing", f"make it with {command}")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") not in (kind, *earlier):
        raise UserError(f"{file} is not of the kind {kind!r}", f"make the store with {command}")
    # The text as well: not a byte of a store may have changed unnoticed, be it one without a meaning.
    as_written = file.read_bytes() == json_text(manifest).encode()
    checksum = manifest.pop(CHECKSUM, None)
    if checksum != content_checksum(manifest) or not as_written:
        raise UserError(f"{file} is damaged: its checksum is not that of its content", f"run {command} again")
    return manifest


def damaged_files(folder: Path, checksums: Mapping[str, str]) -> list[Path]:
    """Those files of a store (name -> hex SHA-256) that are missing or not as they were written."""
    paths = {folder / name: checksum for name, checksum in checksums.items()}
    return [path for path, checksum in paths.items() if not path.is_file() or sha256_of(path) != checksum]


def require_fit(folder: Path, bound: Mapping[str, Any], expected: Mapping[str, Any], command: str) -> None:
    """Refuses a store whose binding differs from the run's.

    Args:
        folder: the store.
        bound: the manifest's binding.
        expected: the run's values of the fields that must agree.
        command: the launcher that makes such a store, for the mend.

    Raises:
        UserError: names every field that differs with both values.
    """
    differing = [
        f"{key} (store: {_short(bound.get(key))}, run: {_short(value)})"
        for key, value in expected.items()
        if bound.get(key) != value
    ]
    if differing:
        raise UserError(
            f"the store {folder} does not fit this run; differing: {', '.join(differing)}",
            f"point to the store made for this run, or make it anew with {command}",
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
