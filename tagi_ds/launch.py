"""What every launcher does around its stage: command line, processes, run folder, errors."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from tagi_ds import recipe, run_folder, study
from tagi_ds.backbone_hash import share_backbone_hash
from tagi_ds.config import RunConfig
from tagi_ds.data.catalogue import prepare_index
from tagi_ds.engine.determinism import choose_kernels
from tagi_ds.engine.disk import require_shared
from tagi_ds.engine.distributed import (
    MeetingError,
    barrier,
    end,
    end_after_lost_peer,
    is_lost_peer,
    leave,
    main_first,
    quieten_libraries,
    start,
    take_ranks_from_slurm,
)
from tagi_ds.engine.exhaustion import memory_told
from tagi_ds.engine.profile import recording
from tagi_ds.engine.trainer import FLOP_STEPS, INTERRUPTED_STATUS, Interrupted
from tagi_ds.errors import UserError
from tagi_ds.model.backbone import resolve_folder
from tagi_ds.model.hub import commit_of
from tagi_ds.processes import check_processes

RECIPES = Path(__file__).resolve().parents[1] / "launchers" / "recipes"
DEFAULT_RECIPE = RECIPES / "quickstart.yaml"
ERROR_STATUS = 1
USER_ERROR_STATUS = 2
REQUEUED_WAIT_S = 300
"""How long a job that SLURM has requeued waits for its former self to let go of the run folder."""

REAL_DATA = {
    "backbone": "(a published backbone needs no training: give it to the later stages as --model.backbone)",
    "pretrain": "--config launchers/recipes/sni_base.yaml --data.c4_dir C4_FOLDER",
    "train_teachers": "--config launchers/recipes/sni_base.yaml --data.sni_dir natural-instructions",
    "store_logits": "--config launchers/recipes/sni_base.yaml --data.sni_dir natural-instructions "
    "--teachers.logit_teacher allenai/tk-instruct-base-def-pos",
    "finetune": "--config launchers/recipes/sni_base.yaml --data.sni_dir natural-instructions",
    "meta_train": "--config launchers/recipes/sni_base.yaml --data.sni_dir natural-instructions",
    "evaluate": "--config launchers/recipes/sni_base.yaml --data.sni_dir natural-instructions",
    "convert": "--config launchers/recipes/sni_base.yaml --convert.run runs/sni_base/finetune",
}
"""What a user types after the launcher's name for real data, by stage."""


@dataclass
class Stage:
    """One launched stage.

    Attributes:
        name: one of tagi_ds.config.STAGES.
        config: resolved; the data folder that the stage reads is set.
        ranks: the processes (tagi_ds.engine.distributed.Ranks).
        run_dir: the run's folder.
    """

    name: str
    config: RunConfig
    ranks: Any
    run_dir: Path

    def say(self, text: str) -> None:
        """Prints a line on rank 0."""
        if self.ranks.is_main:
            print(text, flush=True)


def run_stage(name: str, work: Callable[[Stage], dict[str, Any]], shared: bool = False) -> None:
    """A launcher's main: reads the command line, does the work, records that it is done.

    Without ``--config`` the embedded default is used, and the stages that it builds on are run first where they are
    missing. A stage that is done says so and returns at once.

    Args:
        name: one of tagi_ds.config.STAGES.
        work: does it, and returns what is to be recorded.
        shared: several jobs may work in one run folder at the same time; `work` sees to their order.
    """
    take_ranks_from_slurm()
    # A crash inside a library (SIGSEGV, SIGABRT) tells the line at which it came.
    faulthandler.enable()
    quieten_libraries()
    # Imported by the launcher before anything here ran, so that its environment variables come too late.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with _signals_heard():
            _run(name, work, shared)
    except (KeyboardInterrupt, Interrupted):
        end(INTERRUPTED_STATUS, "interrupted; the same command goes on", finishing=True)
    except Exception as error:
        if isinstance(error, MeetingError):
            end(ERROR_STATUS, f"error: {error}")
        if is_lost_peer(error):
            end_after_lost_peer()
        if isinstance(error, UserError):
            end(USER_ERROR_STATUS, f"error: {error}")
        end(ERROR_STATUS, traceback.format_exc())


def _run(name: str, work: Callable[[Stage], dict[str, Any]], shared: bool = False) -> None:
    parsed = recipe.parse(name, default_recipe=DEFAULT_RECIPE)
    config, main = parsed.config, int(os.environ.get("RANK", "0")) == 0
    if parsed.is_default and main:
        print(
            f"no --config given: the embedded default {DEFAULT_RECIPE.name} in {config.study_dir}\n"
            f"on real data: deepspeed launchers/{name}.py {REAL_DATA[name]}",
            flush=True,
        )
    if parsed.recipe_path is not None and parsed.recipe_path.resolve() != DEFAULT_RECIPE:
        study.require_data(config, name)
    else:
        study.prepare_data(config, main)
    if parsed.is_default:
        study.run_missing_predecessors(name, config, parsed.scale, main)
    ranks = start(config.engine.timeout_s)
    choose_kernels(config.engine.deterministic, ranks.device)
    check_processes(config, name, ranks.world_size)
    run_dir = run_folder.open_run(config, name, ranks.world_size, ranks.rank, _fetched_backbone(config, name))
    require_shared(run_dir)
    if ranks.is_main and not shared:
        _hold(run_dir)
    stage = Stage(name, config, ranks, run_dir)
    # One folder takes any number of conversions, so an earlier one is no reason to stop.
    if run_folder.is_done(run_dir) and name != "convert":
        stage.say(f"{name}: done before, in {run_dir}; delete that folder to do it again")
    else:
        began = time.monotonic()
        if name not in ("pretrain", "convert"):
            main_first(lambda: prepare_index(config))
        if name not in ("backbone", "convert") and config.model.initial != "scratch":
            share_backbone_hash(config)
        # The training loop names its step itself; this is for what is loaded before it.
        with memory_told(name, config.engine), _recorded(stage):
            summary = work(stage)
        barrier()
        if ranks.is_main:
            run_folder.mark_done(run_dir, {"seconds": round(time.monotonic() - began, 1), **summary})
    barrier()
    leave()


def _fetched_backbone(config: RunConfig, name: str) -> str | None:
    """The commit of the run's backbone where that is the hub's: rank 0 has fetched it before the others look for it."""
    named = config.model.backbone
    if named is None or Path(named).is_dir() or name == "convert" or run_folder.is_done(Path(str(config.output_dir))):
        return None
    main_first(lambda: resolve_folder(named))
    return commit_of(resolve_folder(named))


_UNITS = {"store_logits": "batch", "evaluate": "batch", "convert": "task"}
"""What the work of a stage that does not train consists of."""


def _recorded(stage: Stage) -> contextlib.AbstractContextManager[None]:
    """With ``--profile``, the recording of this process's work on rank 0."""
    if not (stage.config.profile and stage.ranks.is_main):
        return contextlib.nullcontext()
    unit = _UNITS.get(stage.name, "step")
    # The first steps of a training stage are slow: their operations are being counted.
    return recording(stage.run_dir, stage.name, unit, wait=FLOP_STEPS if unit == "step" else 0)


@contextlib.contextmanager
def _signals_heard() -> Iterator[None]:
    """In a SLURM job a signal to make way raises Interrupted: work that is claimed is given back, no other job waits.

    A training loop handles its signals itself.
    """
    numbers = (signal.SIGTERM, signal.SIGUSR1) if "SLURM_JOB_ID" in os.environ else ()

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    def stop(number: int, frame: Any) -> None:
        # Once is enough: SLURM repeats it, and the way out must not be interrupted.
        ignore()
        raise Interrupted

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        ignore()


def _hold(run_dir: Path) -> None:
    """Holds the run folder; a requeued job waits for its former self, which may live on on a node that was cut off."""
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    run_folder.hold(run_dir, REQUEUED_WAIT_S if requeued else 0)
