"""A study's launches as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tagi_ds import study
from tagi_ds.experiments.nodes import BENCHMARK, Node


class Process(Protocol):
    """A launch under way."""

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""

    def stop(self) -> None:
        """Asks it to write its checkpoint and leave; returns at once."""

    def kill(self) -> None:
        """Ends it."""


Start = Callable[[Node, Sequence[str], Path], Process]
"""(node, arguments of its launcher, its log) -> the launch."""


class LocalProcess:
    """A launch as a process group of this machine, so that its ranks are told together.

    Args:
        node: the launch.
        arguments: of its launcher.
        log: takes what it prints, behind what earlier starts have printed.
        ranks, threads: processes of the launch, and threads of each.
    """

    def __init__(self, node: Node, arguments: Sequence[str], log: Path, ranks: int = 1, threads: int = 1) -> None:
        if node.stage == BENCHMARK:
            command = [sys.executable, "-m", "tagi_ds.data.program_tasks", *arguments]
            environment = dict(os.environ)
        else:
            # What trains on several ranks may; a conversion is one process's work.
            ranks = 1 if node.stage == "convert" else ranks
            command, environment = study.launch_command(node.stage, arguments, ranks, threads)
        log.parent.mkdir(parents=True, exist_ok=True)
        heard = signal.getsignal(signal.SIGINT)
        try:
            if ranks > 1:
                # DeepSpeed's launcher would end its ranks at once; they hear the signal themselves.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        finally:
            signal.signal(signal.SIGINT, heard)

    def poll(self) -> int | None:
        """See :class:`Process`."""
        return self._process.poll()

    def stop(self) -> None:
        """See :class:`Process`."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """See :class:`Process`."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
