"""What a run reports: metrics.jsonl, TensorBoard, a progress bar. Rank 0 writes, the others keep silent."""

from __future__ import annotations

import json
import math
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tagi_ds.engine.distributed import is_main
from tagi_ds.engine.objective import PER_EXAMPLE, RUN_TOTALS, padding_shares
from tagi_ds.engine.progress import Progress
from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable, write_text

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "learning": {
        "loss": ["Multiline", ["^loss/"]],
        "validation": ["Multiline", ["^validation/"]],
        "learning rate": ["Multiline", ["^lr$"]],
        "gradient norm": ["Multiline", ["^grad_norm"]],
    },
    "adapters": {
        "norm of every site": ["Multiline", ["^adapter_norm/"]],
        "effective rank": ["Multiline", ["^adapter_rank/"]],
        "cosine between tasks": ["Multiline", ["^adapters/cosine$"]],
    },
    "machine": {
        "tokens a second": ["Multiline", ["^tokens_per_s$"]],
        "MFU": ["Multiline", ["^mfu$"]],
        "memory, GB": ["Multiline", ["^memory_gb$"]],
        "waiting for data": ["Multiline", ["^data/wait_share$"]],
        "tokens an example": ["Multiline", ["^data/(instruction|input|target)_(tokens|padding)$"]],
        "share of padding": ["Multiline", ["^data/.*padding_share$"]],
    },
}
"""What TensorBoard's CUSTOM SCALARS page shows together; the same in every run."""
FINAL_METRICS = ("loss/total", "validation/loss", "validation/exact")
"""Curves whose last values TensorBoard's HPARAMS page shows beside a run's settings."""

_LONGEST_TURN_S = 10.0


class Monitor:
    """Reports of one training run.

    Args:
        run_dir: its folder; `metrics.jsonl` and `tensorboard/` lie in it.
        title: name of the stage in the progress bar.
        total_steps: steps of the whole run.
        peak_flops: operations a second of all processors together at most, for the MFU; 0: not known.
        settings: of the run, for TensorBoard's HPARAMS page; the same names in every run of a study.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        run_dir: Path,
        title: str,
        total_steps: int,
        peak_flops: float = 0.0,
        settings: Mapping[str, str | float] | None = None,
    ) -> None:
        self.run_dir, self.title, self.total_steps = run_dir, title, total_steps
        self.peak_flops, self.settings = peak_flops, settings
        self.flops_per_step = 0.0
        self.metrics_file = run_dir / "metrics.jsonl"
        self._writer: Any = None
        self._progress: Progress | None = None
        self._lines: Any = None
        if is_main():
            ensure_writable(run_dir)

    def open(self, step: int) -> None:
        """Begins at `step` steps taken; what an interrupted run reported beyond them is dropped."""
        self._begin_window(time.monotonic())
        self._progress = Progress(self.title, self.total_steps, start=step, show=is_main())
        if not is_main():
            return
        self._drop_lines_after(step)
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run_dir / "tensorboard"
        _await_turn(folder)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._writer.add_custom_scalars(LAYOUT)
        self._tell_settings()
        # Line-buffered: a killed run loses at most the line it was writing.
        self._lines = self.metrics_file.open("a", encoding="utf-8", buffering=1)

    def count(self, step: int, counts: dict[str, float], loss: float) -> None:
        """Notes a step taken and what it processed, over all ranks; moves the progress bar."""
        self._window_steps += 1
        for name, value in counts.items():
            self._window_counts[name] = self._window_counts.get(name, 0.0) + value
        if self._progress is not None:
            self._progress.update(step, note=f"loss {loss:.4f}")

    def set_apart(self, seconds: float) -> None:
        """Time that was spent on something else than steps; throughput does not count it."""
        self._apart += seconds

    def log(
        self,
        step: int,
        metrics: dict[str, float],
        seconds: float,
        waited: float = 0.0,
        memory_gb: float | None = None,
    ) -> None:
        """Appends one line: the metrics, throughput since the line before, and peak memory.

        Args:
            seconds: training time so far.
            waited: seconds since the line before in which the slowest rank waited for its batches; `data/wait_share`
                is their share of all.
            memory_gb: peak of the rank that holds most; this process's where it is left out.

        Raises:
            UserError: the file cannot be written to.
        """
        peak = peak_memory_gb() if memory_gb is None else memory_gb
        line = {"step": step, **metrics, **self._throughput(waited), "memory_gb": peak, "seconds": seconds}
        if self._lines is None:
            return
        # Floats are written as their repr, which reads back to the same bits; JSON has no word for nan.
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        try:
            self._lines.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_file}: {error.strerror}", "free space on that disk") from error
        for name, value in finite.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, step)
        # A killed run is continued from a checkpoint, and every step up to that has been logged: on disk, not in a
        # queue, so that the curves have no gap there.
        self._writer.flush()

    def say(self, text: str) -> None:
        """One line for the reader of the terminal."""
        if self._progress is not None:
            self._progress.say(text)
        elif is_main():
            print(text, flush=True)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """A text (Markdown) in TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)

    def close(self) -> None:
        """Closes files and bar."""
        for opened in (self._progress, self._writer, self._lines):
            if opened is not None:
                opened.close()
        self._progress = self._writer = self._lines = None

    def _throughput(self, waited: float) -> dict[str, float]:
        now = time.monotonic()
        elapsed = max(1e-9, now - self._window_began - self._apart)
        counts = self._window_counts
        figures = {
            f"{name}_per_s": counts[name] / elapsed
            for name in ("examples", "tokens")
            if name in counts and self._window_steps
        }
        lengths = {name.removeprefix(PER_EXAMPLE): n for name, n in counts.items() if name.startswith(PER_EXAMPLE)}
        for name, value in lengths.items():
            figures[f"{RUN_TOTALS}{name}"] = value / max(counts["examples"], 1.0)
        figures |= {f"{RUN_TOTALS}{name}": share for name, share in padding_shares(lengths).items()}
        if self._window_steps and self.flops_per_step:
            figures["tflops"] = self.flops_per_step * self._window_steps / elapsed / 1e12
            if self.peak_flops:
                figures["mfu"] = figures["tflops"] * 1e12 / self.peak_flops
        figures["data/wait_share"] = min(1.0, waited / elapsed)
        self._begin_window(now)
        return figures

    def _begin_window(self, now: float) -> None:
        """Throughput is of the steps between two lines of the log."""
        self._window_began, self._apart, self._window_steps = now, 0.0, 0
        self._window_counts: dict[str, float] = {}

    def _tell_settings(self) -> None:
        """What the run was asked for; the values of FINAL_METRICS are then read off its curves."""
        if self.settings is None:
            return
        from torch.utils.tensorboard.summary import hparams

        experiment, session, _ = hparams(dict(self.settings), dict.fromkeys(FINAL_METRICS, 0.0))
        for summary in (experiment, session):
            self._writer.file_writer.add_summary(summary)

    def _drop_lines_after(self, step: int) -> None:
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_up_to(line, step)]
        if kept != lines:
            write_text(self.metrics_file, "".join(line + "\n" for line in kept))


def _await_turn(folder: Path) -> None:
    """Waits until a new event file will come last.

    TensorBoard reads a folder's files by name, which begins with the second of their making: a run that goes on within
    the second in which it was killed, or on a machine whose clock is a little behind, would else be read first.
    """
    made = [re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.out.tfevents.*")]
    latest = max((int(found[1]) for found in made if found), default=0)
    deadline = time.monotonic() + _LONGEST_TURN_S
    while int(time.time()) <= latest and time.monotonic() < deadline:
        time.sleep(0.05)


def peak_memory_gb() -> float:
    """Most memory held by this process so far, in GB (1e9 bytes): the accelerator's, or without one the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        # A killed run may leave its last line torn.
        return False
