"""Runs a script or module as several ranks on this machine, as a launcher would, and fails loudly."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RankResults:
    """Exit status and output (both streams) of each rank."""

    statuses: list[int]
    outputs: list[str]

    @property
    def text(self) -> str:
        return "\n".join(f"--- rank {rank}:\n{text}" for rank, text in enumerate(self.outputs))


def run_ranks(
    script_or_module: str | Path,
    n: int,
    args: Sequence[str] = (),
    timeout: float = 120,
    check: bool = True,
    env: dict[str, str] | None = None,
    until: Callable[[], bool] | None = None,
    patience: float = 5,
) -> RankResults:
    """Starts `n` processes with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set and waits for them.

    Once a rank has failed, the others get `patience` seconds before they are killed (their status is then -9).

    Args:
        script_or_module: path of a script, or a module's dotted name.
        check: raise AssertionError with every rank's output where a status is not 0.
        until: asked again and again; once it says True, all ranks are killed at once (their status is then -9).

    Raises:
        AssertionError: a rank failed, or the timeout passed; the processes are then gone.
    """
    path = Path(script_or_module)
    command = [sys.executable, str(path)] if path.suffix == ".py" else [sys.executable, "-m", str(script_or_module)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.log" for rank in range(n)]
        logs: list[IO[str]] = [path.open("w+", encoding="utf-8", errors="replace") for path in paths]
        processes = _spawn([*command, *args], logs, env or {})
        try:
            expired = _wait(processes, time.monotonic() + timeout, until, patience)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            outputs = []
            for log in logs:
                log.seek(0)
                outputs.append(log.read())
                log.close()
    results = RankResults([process.returncode for process in processes], outputs)
    assert not expired, f"{command} did not end within {timeout} s\n{results.text}"
    assert not check or not any(results.statuses), f"{command} ended with {results.statuses}\n{results.text}"
    return results


def _spawn(command: list[str], logs: list[IO[str]], extra: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(len(logs)),
        **extra,
    }
    return [
        subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]


def _wait(
    processes: list[subprocess.Popen[bytes]], deadline: float, until: Callable[[], bool] | None, patience: float
) -> bool:
    """True when the deadline passed before the ranks ended."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return True
        if any(process.poll() not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + patience)
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            return False
        if until is not None and until():
            return False
        time.sleep(0.05 if until is None else 0.005)
    return False
