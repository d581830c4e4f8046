"""The run folder: whose it is, what it records, and whether the run is done."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from tagi_ds.config import ConvertConfig, RunConfig
from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable, read_json, write_json, write_text
from tagi_ds.recipe import SECTIONS, to_dict
from tagi_ds.strict_yaml import read_yaml

CONFIG_FILE = "config.yaml"
"""The resolved configuration and the ``run`` block."""
DONE_FILE = "done.json"
"""Written last, by :func:`mark_done`."""
LOCK_FILE = ".lock"
"""Held by the process that runs in the folder."""
_LOOKED_AT_S = 5.0
"""How long a lock may seem taken because others look whether it is: the other processes of a start."""

_FREE = frozenset(
    {
        "study_dir",
        "output_dir",
        "profile",
        "data.index_dir",
        "data.workers",
        "engine.peak_tflops",
        "engine.log_every",
        "engine.evaluate_every",
        "engine.checkpoint_every",
        "engine.keep_checkpoints",
        "engine.timeout_s",
        "engine.deterministic",
        # The layout: a checkpoint of one is taken over by every other.
        "data.dealing",
        "data.pad_multiple",
        "engine.strategy",
        "engine.stages",
        "engine.deepspeed",
        "engine.nvme_path",
        "engine.accumulation",
        "engine.activation_checkpointing",
        "engine.instruction_cache",
        "teachers.claim_timeout_s",
        # What is computed together: a run whose validation found no memory goes on with less.
        "evaluation.batch_examples",
        # One folder takes any number of conversions.
        *(f"convert.{field.name}" for field in dataclasses.fields(ConvertConfig)),
    }
)
"""Fields that may change when a run goes on: they leave its steps as they are."""
_PATHS = frozenset(
    {
        "model.backbone",
        "model.initial",
        "data.sni_dir",
        "data.c4_dir",
        "data.p3_dir",
        "data.p3_templates",
        "data.index_dir",
        "teachers.logit_teacher",
        "teachers.warm_start",
        "loss.logit_store",
        "loss.parameter_store",
        "engine.deepspeed",
        "evaluation.model",
    }
)


def open_run(
    config: RunConfig, stage: str, world_size: int, rank: int | None = None, backbone_commit: str | None = None
) -> Path:
    """Creates the run folder, or finds that it holds this very run, which then goes on.

    A folder with nothing but a description is taken over: whoever was refused may correct what was wrong.

    Every rank checks; rank 0 alone writes ``config.yaml``, after its own checks, so no rank can meet a
    half-made folder: what rank 0 writes under way starts with a dot and is overlooked.

    Args:
        config: a resolved configuration (its `output_dir` is set).
        stage: the launched stage.
        world_size: number of processes.
        rank: this process's rank; default the environment's RANK, or 0.
        backbone_commit: of a backbone from the hub, for the ``run`` block.

    Returns:
        The folder, writable.

    Raises:
        UserError: the folder cannot be written to, holds another run, or holds something else.
    """
    if config.output_dir is None:
        raise ValueError("the configuration is not resolved: output_dir is None")
    folder = Path(config.output_dir)
    _refuse_other(folder, config, stage)
    ensure_writable(folder)
    if (int(os.environ.get("RANK", "0")) if rank is None else rank) == 0:
        layouts = _layouts(config, folder, world_size)
        extra: dict[str, Any] = {"stage": stage, "world_size": world_size, "layouts": layouts}
        commit = backbone_commit or _saved(folder).get("backbone_commit")
        save(config, folder, extra | ({} if commit is None else {"backbone_commit": commit}))
    return folder


def save(config: RunConfig, folder: Path, extra: Mapping[str, Any]) -> Path:
    """Writes ``config.yaml``: the configuration and a ``run`` block of circumstances.

    The block holds `extra` (:func:`open_run`: stage, world_size, layouts, the commit of a backbone from the hub), the
    versions of what the result depends on, the git revision of the package's folder if it has one, and the global batch
    in examples (pretraining: documents). The file can be given to ``--config`` again.
    """
    run = {
        **extra,
        "global_batch": config.data.tasks_per_batch * config.data.examples_per_task,
        "versions": _versions(),
        "git": _git_revision(),
    }
    path = folder / CONFIG_FILE
    write_text(path, yaml.safe_dump({**to_dict(config), "run": run}, sort_keys=False, allow_unicode=True))
    return path


_held: list[IO[str]] = []


def hold(run_dir: Path, wait_s: float = 0.0) -> None:
    """Holds a run folder for this process until it ends, so that no second run writes into it; called on rank 0.

    Args:
        run_dir: of the run.
        wait_s: how long another process may still hold it.

    Raises:
        UserError: another process holds it.
    """
    began = time.monotonic()
    handle = (run_dir / LOCK_FILE).open("w")
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            # Whoever runs in the folder keeps its lock; whoever looks (`is_held`) has it for a moment.
            waited = time.monotonic() - began
            if waited < max(wait_s, _LOOKED_AT_S):
                time.sleep(0.02 if waited < _LOOKED_AT_S else 1)
                continue
            handle.close()
            raise UserError(
                f"another process is running in {run_dir}", "wait for it, end it, or choose another --output_dir"
            ) from error
        except OSError:  # a file system without locks
            handle.close()
            return
    _held.append(handle)


def mark_done(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Records that the run in `run_dir` came to its end; `summary` (e.g. steps, seconds, flops) is kept."""
    write_json(run_dir / DONE_FILE, dict(summary))


def is_done(run_dir: Path) -> bool:
    """Whether the run in `run_dir` came to its end."""
    return (run_dir / DONE_FILE).is_file()


def done_summary(run_dir: Path) -> dict[str, Any]:
    """What :func:`mark_done` recorded.

    Raises:
        UserError: the run is not done.
    """
    return read_json(run_dir / DONE_FILE)


def differing_fields(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Fields that change the training and differ between `config` and a saved configuration, as ``key: was -> is``."""
    default, mine = _flat(to_dict(RunConfig())), _flat(to_dict(config))
    # A field that the saved run did not know yet had what is now its default.
    theirs = {**default, **_flat({key: value for key, value in saved.items() if key != "run"})}
    differing = []
    for key in sorted((mine.keys() | theirs.keys()) - _FREE):
        if _comparable(key, mine.get(key)) != _comparable(key, theirs.get(key)):
            differing.append(f"{key}: {theirs.get(key)} -> {mine.get(key)}")
    return differing


def _refuse_other(folder: Path, config: RunConfig, stage: str) -> None:
    mend = f"choose another --output_dir, or delete {folder} if it is no longer wanted"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder", "choose another --output_dir")
    try:
        present = sorted(folder.iterdir()) if folder.is_dir() else []
        known = (folder / CONFIG_FILE).is_file()
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}", "mend its permissions, or choose another") from error
    if not known:
        foreign = [entry.name for entry in present if not entry.name.startswith(".") and not _is_run(entry)]
        if foreign:
            names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UserError(f"{folder} holds files that belong to no run ({names})", mend)
        return
    if not any(_is_work(entry) for entry in present) and not is_held(folder):
        return
    saved = read_yaml(folder / CONFIG_FILE)
    other = (saved.get("run") or {}).get("stage")
    if other != stage:
        raise UserError(f"{folder} belongs to another run: stage {other}, not {stage}", mend)
    differing = differing_fields(config, saved)
    if differing:
        raise UserError(f"{folder} belongs to another run; differing fields:\n    " + "\n    ".join(differing), mend)


def _saved(folder: Path) -> dict[str, Any]:
    """The ``run`` block of the folder's ``config.yaml``, as far as there is one."""
    path = folder / CONFIG_FILE
    return (read_yaml(path).get("run") or {}) if path.is_file() else {}


def _layouts(config: RunConfig, folder: Path, world_size: int) -> list[dict[str, Any]]:
    """How the run was laid out so far, one entry a change: from which step on, and this start's last."""
    engine, saved = config.engine, _saved(folder).get("layouts")
    names = ("strategy", "stages", "accumulation", "deepspeed")
    now = {"world_size": world_size, **{name: getattr(engine, name) for name in names}}
    pointer = folder / "checkpoints" / "latest"
    number = pointer.read_text(encoding="utf-8").strip().removeprefix("step_") if pointer.is_file() else ""
    step = int(number) if number.isdigit() else 0
    # A start that took no step to a checkpoint has left nothing of its layout.
    before = [entry for entry in saved or [] if entry["from_step"] < step]
    if before and {**before[-1], "from_step": None} == {**now, "from_step": None}:
        return before
    return [*before, {"from_step": step, **now}]


def _is_work(entry: Path) -> bool:
    """Anything but the description. A run that was refused before it began leaves no more, and may be corrected."""
    return entry.name != CONFIG_FILE and not entry.name.startswith(".")


def is_held(folder: Path) -> bool:
    """Whether a process runs in the folder, though it may not have written anything yet."""
    try:
        with (folder / LOCK_FILE).open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock yet, or a file system without locks
        return False
    return False


def _is_run(entry: Path) -> bool:
    """A run folder may lie inside another one's folder: evaluate/<method> inside evaluate."""
    return (entry / CONFIG_FILE).is_file()


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def _comparable(key: str, value: Any) -> Any:
    is_path = key in _PATHS and isinstance(value, str) and "://" not in value
    return os.path.abspath(value) if is_path else value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "transformers", "tagi_ds"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@functools.cache
def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
