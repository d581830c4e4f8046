"""A progress bar on a terminal, short plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

_PLAIN_SECONDS = 10.0
_PLAIN_SHARE = 0.05
_PLAIN_LONGEST = 60.0


def duration(seconds: float) -> str:
    """Seconds as 4s, 3m 05s or 2h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class Progress:
    """Shows how far a stage is, its throughput and its ETA; use as a context manager.

    Plain lines come every twentieth of the way, but no more often than every ten seconds and no more rarely
    than every minute, and at the end.

    Args:
        title: name of the stage.
        total: units of work in all; start: units done before.
        unit: what a unit is called.
        show: False keeps silent (ranks other than 0).
        stream: where to write; default the standard output.
    """

    def __init__(
        self, title: str, total: int, *, start: int = 0, unit: str = "step", show: bool = True, stream: Any = None
    ) -> None:
        self.title, self.total, self.start, self.unit, self.done = title, total, start, unit, start
        self._show = show
        self._stream: TextIO = stream or sys.stdout
        self._began = self._printed_at = time.monotonic()
        self._printed_done = start
        self._bar: Any = self._open_bar() if show and self._stream.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, note: str = "") -> None:
        """Goes to `done` units; `note` is shown beside the throughput."""
        self.done = done
        if not self._show:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=self._figures(note))
            return
        waited = time.monotonic() - self._printed_at
        moved = done - self._printed_done >= _PLAIN_SHARE * self.total
        if done >= self.total or waited >= (_PLAIN_SECONDS if moved else _PLAIN_LONGEST):
            self._print_line(note)

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._show = False

    def _open_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=self._stream),
        )
        bar.start()
        self._task = bar.add_task(self.title, total=self.total, completed=self.start, figures="")
        return bar

    def _figures(self, note: str) -> str:
        elapsed = max(1e-9, time.monotonic() - self._began)
        rate = (self.done - self.start) / elapsed
        left = f"ETA {duration((self.total - self.done) / rate)}" if rate > 0 and self.done < self.total else ""
        ended = f"in {duration(elapsed)}" if self.done >= self.total else ""
        pace = f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}" if rate > 0 else ""
        return " · ".join(part for part in (pace, note, left, ended) if part)

    def _print_line(self, note: str) -> None:
        share = f"{100 * self.done / self.total:.0f} %" if self.total else ""
        line = f"{self.title}: {self.done}/{self.total} ({share}) · {self._figures(note)}"
        print(line, file=self._stream, flush=True)
        self._printed_at, self._printed_done = time.monotonic(), self.done
