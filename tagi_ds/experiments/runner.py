"""Runs a plan's nodes as local processes: some at a time, each as soon as what it needs is done.

Several runners, on one machine or several that share the folder, may work on one study: each claims a node before it
starts it (:mod:`tagi_ds.teachers.work_list`), and what a killed one held is taken over. A launch that outlived its
runner still holds its run folder, and is waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tagi_ds import run_folder, study
from tagi_ds.errors import UserError
from tagi_ds.experiments.compute import late_arguments
from tagi_ds.experiments.estimates import Estimates, duration
from tagi_ds.experiments.nodes import Node, Plan
from tagi_ds.experiments.processes import LocalProcess, Process, Start
from tagi_ds.teachers.work_list import WORK_FOLDER, WorkList

LOGS_FOLDER = "logs"
"""Of a study's folder: what each launch printed, `<node>.log`."""
CLAIM_TIMEOUT_S = 600
TAIL_LINES = 12
"""Of a failed launch's log, that are shown."""
_POLL_S = 0.3


@dataclass
class Outcome:
    """What became of the nodes that were asked for.

    Attributes:
        failed: name -> why, with the last lines that it printed.
        blocked: name -> the failed node that it needs, directly or not.
    """

    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything is done."""
        return not self.failed


@dataclass
class _Running:
    node: Node
    process: Process
    claim: contextlib.ExitStack
    began: float


class Runner:
    """Works off a plan.

    Args:
        plan: the nodes.
        folder: the study's.
        estimates: for what is left to expect.
        jobs: launches at the same time.
        start: starts a launch.
        say: prints a line.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        estimates: Estimates,
        jobs: int = 1,
        start: Start = LocalProcess,
        say: Callable[[str], None] = print,
    ) -> None:
        self.plan, self.folder, self.estimates, self.jobs = plan, folder, estimates, jobs
        self._start, self.say = start, say
        self.work = WorkList(folder / WORK_FOLDER, CLAIM_TIMEOUT_S)
        self._running: dict[str, _Running] = {}
        self._outcome = Outcome()
        self._done: set[str] = set()

    def run(self, names: Sequence[str]) -> Outcome:
        """Does the named nodes and all that they need; ends when nothing more can be done.

        Raises:
            KeyboardInterrupt: it was interrupted, after the launches have written their checkpoints.
            UserError: the study's folder cannot be written to.
        """
        wanted = self.plan.closure(names)
        self._outcome = Outcome()
        self._refresh(wanted)
        self.say(f"{len(wanted)} launches, {len(self._done)} done before{self._left(wanted)}")
        try:
            while self._step(wanted):
                time.sleep(_POLL_S)
        except BaseException:
            self._stop_all()
            raise
        return self._outcome

    def _step(self, wanted: Sequence[str]) -> bool:
        """Reaps, starts what can be started; whether there is anything to wait for."""
        for name, running in list(self._running.items()):
            status = running.process.poll()
            if status is not None:
                del self._running[name]
                self._ended(running, status, wanted)
        self._refresh(wanted)
        waiting = False
        for name in wanted:
            node = self.plan.nodes[name]
            if name in self._done or name in self._running or self._hopeless(node):
                continue
            if len(self._running) < self.jobs and self._done.issuperset(node.needs):
                waiting |= not self._try(node)
        return bool(self._running) or waiting

    def _refresh(self, wanted: Sequence[str]) -> None:
        self._done |= {name for name in wanted if name not in self._done and self.plan.nodes[name].done}

    def _hopeless(self, node: Node) -> bool:
        """Whether the node has failed, or needs one that has; notes the latter."""
        failed, blocked = self._outcome.failed, self._outcome.blocked
        if node.name in failed or node.name in blocked:
            return True
        for need in node.needs:
            if need in failed or need in blocked:
                blocked[node.name] = need if need in failed else blocked[need]
                return True
        return False

    def _try(self, node: Node) -> bool:
        """Starts a node; False where somebody else has it, who is waited for."""
        claim = contextlib.ExitStack()
        # The claim first: looking at a run folder's lock must not keep a launch from taking it.
        if not claim.enter_context(self.work.hold(node.name)) or run_folder.is_held(node.run_dir):
            claim.close()
            return False
        try:
            # Looked at again: it may have been finished between the look and the claim.
            if node.done:
                claim.close()
                return True
            arguments = [*node.arguments, *late_arguments(node, self.plan)]
            process = self._start(node, arguments, self.log_of(node.name))
        except UserError as error:
            claim.close()
            self._fail(node, str(error))
            return True
        except BaseException:
            claim.close()
            raise
        self._running[node.name] = _Running(node, process, claim, time.monotonic())
        return True

    def _ended(self, running: _Running, status: int, wanted: Sequence[str]) -> None:
        node, seconds = running.node, time.monotonic() - running.began
        with running.claim:
            if status == 0 and node.done:
                self.work.finish(node.name, {"seconds": round(seconds, 1)})
                self.estimates.note(node, seconds)
        if status != 0 or not node.done:
            self._fail(node, f"status {status}" if status else "it ended without a result")
            return
        self._done.add(node.name)
        count = len(self._done)
        self.say(f"[{count}/{len(wanted)}] {node.name}: {duration(seconds)}{self._left(wanted)}")

    def _fail(self, node: Node, why: str) -> None:
        lines = tail(self.log_of(node.name))
        self._outcome.failed[node.name] = "\n".join([why, *lines])
        shown = "\n".join(f"    {line}" for line in lines)
        self.say(f"{node.name} failed: {why}; the last lines of {self.log_of(node.name)}:\n{shown}")

    def _left(self, wanted: Sequence[str]) -> str:
        open_nodes = [self.plan.nodes[name] for name in wanted if name not in self._done]
        hopeful = [node for node in open_nodes if not self._hopeless(node)]
        if not hopeful:
            return ""
        seconds = sum(self.estimates.seconds(node) for node in hopeful)
        for name, running in self._running.items():
            seconds -= min(time.monotonic() - running.began, self.estimates.seconds(self.plan.nodes[name]))
        return f"; about {duration(seconds / self.jobs)} left"

    def _stop_all(self) -> None:
        """Lets the launches write their checkpoints; ends those that take too long."""
        for running in self._running.values():
            running.process.stop()
        until = time.monotonic() + study.STOP_S
        with contextlib.suppress(KeyboardInterrupt):
            while any(r.process.poll() is None for r in self._running.values()) and time.monotonic() < until:
                time.sleep(0.1)
        for running in self._running.values():
            if running.process.poll() is None:
                running.process.kill()
            running.claim.close()
        self._running.clear()

    def log_of(self, name: str) -> Path:
        """Where a node's launches print."""
        return self.folder / LOGS_FOLDER / f"{name}.log"


def tail(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log that are not blank; of a progress bar its last state."""
    try:
        text = path.read_bytes()[-20_000:].decode("utf-8", errors="replace")
    except OSError:
        return []
    rows = [line.rstrip().rsplit("\r", 1)[-1] for line in text.splitlines()]
    return [row for row in rows if row.strip()][-lines:]
