"""Launchers as processes of their own, the way a user starts them, on a small study."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tagi_ds import run_folder
from tests.distributed import ROOT

RECIPE = {
    "seed": 3,
    "model": {"rank": 2, "alpha": 4.0, "bottleneck": 16, "dropout": 0.1},
    "data": {
        "prompt": "plain",
        "validation_tasks": 1,
        "max_source_tokens": 32,
        "max_target_tokens": 32,
        "tasks_per_batch": 4,
        "examples_per_task": 2,
    },
    "teachers": {
        "unit": "task",
        "max_units": 4,
        "batched": 2,
        "examples": 4,
        "steps": 4,
        "learning_rate": 3.0e-2,
        "validation_share": 0.25,
    },
    "optimizer": {"learning_rate": 3.0e-3},
    "evaluation": {"batch_examples": 8},
    "engine": {
        "deepspeed": None,
        "precision": "fp32",
        "steps": 24,
        "log_every": 1,
        "evaluate_every": 7,
        "checkpoint_every": 5,
    },
    "stages": {"finetune": {"loss": {"kl": 2.0, "alignment": "sigmoid", "missing": "label_only"}}},
}
"""All losses, dropout, and checkpoints between evaluations."""


def write_recipe(path: Path, study: Path, sni: Path, backbone: Path) -> Path:
    """The recipe for a study of these folders."""
    recipe = {"study_dir": str(study), **RECIPE}
    recipe["model"] = {**RECIPE["model"], "backbone": str(backbone)}  # type: ignore[dict-item]
    recipe["data"] = {**RECIPE["data"], "sni_dir": str(sni), "c4_dir": str(sni)}  # type: ignore[dict-item]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def command(stage: str, *arguments: str, processes: int = 0) -> list[str]:
    """What a user types: through DeepSpeed's launcher, or for 0 processes plain Python."""
    script = str(ROOT / "launchers" / f"{stage}.py")
    if processes == 0:
        return [sys.executable, script, *arguments]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes)]
    return [*deepspeed, "--master_port", str(_free_port()), "--log_level", "error", script, *arguments]


def environment() -> dict[str, str]:
    """This process's, without what a launcher would have told its ranks."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}


def launch(
    stage: str, *arguments: str, processes: int = 0, timeout: float = 180, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a launcher to its end; its output is kept."""
    with started(command(stage, *arguments, processes=processes)) as process:
        out, errors = process.communicate(timeout=timeout)
    assert not check or process.returncode == 0, f"status {process.returncode}\n{out}\n{errors}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@contextmanager
def started(words: list[str], cwd: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; whatever is left of that session at the end is killed."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        signal_all(process, signal.SIGKILL)
        process.wait()


def signal_all(process: subprocess.Popen[str], number: int) -> None:
    """Sends a signal to the process and all that descends from it."""
    # A process that was waited for is gone, and so is the right to its number: those it left behind have its session.
    for member in _session(process.pid):
        try:
            os.kill(member, number)
        except ProcessLookupError:
            continue


def let_go_of_folders() -> None:
    """Ends this process's hold on run folders, as its end would; a launcher runs one stage and ends."""
    while run_folder._held:
        run_folder._held.pop().close()


def _session(leader: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.getsid(int(entry.name)) == leader:
                members.append(int(entry.name))
        except ProcessLookupError:
            continue
    return members


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
