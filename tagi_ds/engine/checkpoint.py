"""Checkpoints that are complete or absent, and the way back from them.

`checkpoints/step_N/` holds the strategy's files, `state.json`, each rank's random state and, written last,
`manifest.json` with every file's size and SHA-256. The folder is filled aside and renamed into place, once rank 0 sees
in it what every rank has written. Each rank hashes its own files, and on the way back a part of them. DeepSpeed's
files are pickles: they are read only from the run's own folder and after the manifest has been verified. Another
layout than the saved one (strategy, processes, stages, DeepSpeed's cutting) resumes through the universal form.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tagi_ds.engine.disk import require_parts, together
from tagi_ds.engine.distributed import barrier, broadcast_object, current, gather_objects, is_main, main_first
from tagi_ds.engine.evaluated import note_evaluated, state_of
from tagi_ds.engine.exhaustion import checkpoint_bytes, require_space
from tagi_ds.engine.full_state import FullState
from tagi_ds.engine.layout import check_model, description_of, in_words, layout_of
from tagi_ds.engine.manifest import Facts, damage_of, facts_of, seal
from tagi_ds.engine.random_state import load_random_state, save_random_state, seed_anew
from tagi_ds.engine.strategy import Strategy
from tagi_ds.engine.trained import read_trained_parameters
from tagi_ds.engine.universal import WHOLE, universal_folder, write_universal
from tagi_ds.errors import UserError
from tagi_ds.files import write_json, write_text

__all__ = [
    "CheckpointStore",
    "RunState",
    "best_checkpoint",
    "damage_of",
    "latest_checkpoint",
    "read_trained_parameters",
]


@dataclass
class RunState:
    """Where a run stands, beside what the strategy holds; JSON-able and the same on every rank.

    Attributes:
        step: optimizer steps taken.
        total_steps: steps of the whole run, on which the schedule depends.
        seconds: training time so far, over all starts.
        data, extra: state of the batch source (the ranks' shares joined) and of what else the run carries.
        best: best value of the metric so far and its step, or None before the first evaluation.
        flops_per_step: floating-point operations of a step, all ranks together, counted on the run's first steps.
        totals: the objective's counts under RUN_TOTALS, over all steps and ranks.
        unevaluated: the step's metrics where it was saved before its evaluation, which is then still to come.
    """

    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] | None = None
    flops_per_step: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    unevaluated: dict[str, float] | None = None


class CheckpointStore:
    """The checkpoints of one run folder.

    Args:
        run_dir: the run's folder.
        keep: latest checkpoints kept beside the best.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = max(1, keep)

    def save(self, strategy: Strategy, state: RunState) -> Path:
        """Writes step_N; called on all ranks together.

        Raises:
            UserError: on every rank, when one of them cannot write; earlier checkpoints are then as they were.
        """
        final, aside = self.folder / f"step_{state.step}", self.folder / f".step_{state.step}.part"
        self.require_space(strategy)
        together(lambda: _empty(aside) if is_main() else None, aside)
        try:
            parts = together(lambda: self._write_parts(strategy, aside), aside)
            together(lambda: self._publish(strategy, state, aside, final, parts) if is_main() else None, final)
        except UserError:
            # Half a checkpoint would only fill the disk.
            if is_main():
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return final

    def note_evaluated(self, state: RunState) -> None:
        """Notes that the step of the latest checkpoint has been evaluated; called on all ranks together.

        Raises:
            UserError: on every rank, when rank 0 cannot write.
        """

        def note() -> None:
            best = self._point_at_best(state)
            note_evaluated(self.folder / f"step_{state.step}", state.best)
            self._prune(best)

        together(lambda: note() if is_main() else None, self.folder)

    def require_space(self, strategy: Strategy) -> None:
        """Refuses to go on where the disk will not hold the next checkpoint; called on all ranks together.

        Raises:
            UserError: on every rank.
        """

        def check() -> None:
            last = next(iter(_steps(self.folder)), None)
            require_space(self.folder, checkpoint_bytes(strategy, last))

        together(lambda: check() if is_main() else None, self.folder)

    def resume(self, strategy: Strategy, say: Callable[[str], None] = print) -> RunState | None:
        """Loads the latest complete checkpoint; None where there is none at all. Called on all ranks together.

        On the saved layout every bit is as it was. On another one the checkpoint goes through its universal form,
        which is made beside it where it is not there yet, and random states are drawn anew.

        Args:
            say: told in a line when the layout is another one.

        Raises:
            UserError: none is complete, or the run's model or precision is not the saved one.
        """
        folder = self._choose()
        if folder is None:
            return None
        saved = state_of(folder)
        # A network disk may not show a late note to all of them.
        saved["run"] |= broadcast_object({name: saved["run"].get(name) for name in ("best", "unevaluated")})
        check_model(folder, saved, strategy)
        if layout_of(saved) == layout_of(description_of(strategy)):
            strategy.load(folder)
            load_random_state(folder, strategy.ranks.rank)
        else:
            say(self._load_elsewhere(folder, saved, strategy))
        barrier()
        return RunState(**saved["run"])

    def _load_elsewhere(self, folder: Path, saved: dict[str, Any], strategy: Strategy) -> str:
        """Takes over what another layout saved; returns what became of it, in a line."""
        full = folder if saved["strategy"] in WHOLE else universal_folder(folder)
        if full != folder:
            main_first(lambda: write_universal(folder, full))
        has_optimizer = strategy.load_full(FullState(full))
        seed_anew(full, strategy.ranks.rank)
        kept = "weights, optimizer and data position" if has_optimizer else "weights and data position"
        lost = "" if has_optimizer else "; the saved optimizer's state is of another kind and begins anew"
        before, now = in_words(saved.get("origin", saved)), in_words(description_of(strategy))
        if before == now:
            now = "the same with parameters cut otherwise by DeepSpeed's settings"
        return (
            f"{folder.name} was saved by {before}, this run is {now}: {kept} are taken over{lost}; random states "
            "(dropout) are drawn anew from the checkpoint's and the rank"
        )

    def _write_parts(self, strategy: Strategy, aside: Path) -> dict[str, Any]:
        """Returns what this rank has written, and on which machine."""
        files = [*strategy.save(aside), *save_random_state(aside, strategy.ranks.rank)]
        return {"host": socket.gethostname(), "files": facts_of(aside, files)}

    def _publish(
        self, strategy: Strategy, state: RunState, aside: Path, final: Path, parts: list[dict[str, Any]]
    ) -> None:
        require_parts(aside, parts)
        known: Facts = {name: facts for part in parts for name, facts in part["files"].items()}
        write_json(aside / "state.json", {**description_of(strategy), "run": asdict(state), "versions": _versions()})
        seal(aside, known)
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(aside, final)
        shutil.rmtree(old, ignore_errors=True)
        write_text(self.folder / "latest", final.name + "\n")
        self._prune(self._point_at_best(state))

    def _point_at_best(self, state: RunState) -> str | None:
        best = f"step_{int(state.best['step'])}" if state.best else None
        if best and (self.folder / best).is_dir():
            write_text(self.folder / "best", best + "\n")
        return best

    def _prune(self, best: str | None) -> None:
        for folder in _steps(self.folder)[self.keep :]:
            if folder.name != best:
                shutil.rmtree(folder)
        # Universal forms have served when a later checkpoint is there.
        for pattern in (".step_*", "universal_*", ".universal_*"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def _choose(self) -> Path | None:
        """The latest complete checkpoint, of whose files every rank looks at a part."""
        names = broadcast_object([folder.name for folder in _steps(self.folder)] if is_main() else None)
        latest = None
        for name in names:
            folder = self.folder / name
            damage = _damage_told(folder)
            if damage is None:
                return folder
            latest = latest or damage
            if is_main():
                warnings.warn(f"checkpoint {folder} is damaged ({damage}); trying the one before", stacklevel=2)
        if names:
            raise UserError(
                f"no checkpoint under {self.folder} is complete (latest: {latest})",
                f"remove {self.folder} to start anew, or restore it",
            )
        return None


def _damage_told(folder: Path) -> str | None:
    """What is wrong with a checkpoint, of whose files every rank looks at a part; None: nothing."""
    ranks = current()
    found = gather_objects(damage_of(folder, ranks.rank, ranks.world_size))
    return next((each for each in found if each is not None), None)


def best_checkpoint(run_dir: Path, by_all: bool = False) -> Path:
    """Folder of the run's best complete checkpoint; of the latest, where the run has none evaluated.

    Args:
        run_dir: of the run.
        by_all: every rank asks, and looks at a part of the files.

    Raises:
        UserError: the run has no complete checkpoint, or its best one is damaged.
    """
    return _pointed(run_dir, ("best", "latest"), _damage_told if by_all else damage_of)


def latest_checkpoint(run_dir: Path) -> Path:
    """Folder of the run's latest checkpoint, from which it would go on.

    Raises:
        UserError: the run has no complete checkpoint, or its latest one is damaged.
    """
    return _pointed(run_dir, ("latest",), damage_of)


def _pointed(run_dir: Path, pointers: tuple[str, ...], damage_in: Callable[[Path], str | None]) -> Path:
    folder = run_dir / "checkpoints"
    for pointer in pointers:
        if (folder / pointer).is_file():
            chosen = folder / (folder / pointer).read_text(encoding="utf-8").strip()
            damage = damage_in(chosen)
            if damage is not None:
                raise UserError(f"checkpoint {chosen} is damaged: {damage}", "restore it, or train again")
            return chosen
    raise UserError(f"{run_dir} has no checkpoint", "train that stage first")


def _steps(folder: Path) -> list[Path]:
    """The step_N folders, latest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers", "tagi_ds"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
