"""Whether a run's global batch and strategy fit a number of processes, before any of them starts."""

from __future__ import annotations

from tagi_ds.config import EngineConfig, RunConfig
from tagi_ds.errors import UserError

TRAINED_STAGES = ("backbone", "meta_train", "pretrain", "finetune")
"""Those that deal a global batch to their processes."""


def check_processes(config: RunConfig, stage: str, processes: int) -> None:
    """Checks that a stage can run in so many processes; those that share a list of work can in any number.

    Raises:
        UserError: the strategy or the global batch does not fit; the text says what would.
    """
    if stage not in TRAINED_STAGES:
        return
    engine = config.engine
    if engine.strategy == "single":
        check_single(processes)
    try:
        check_dealing(config.data.tasks_per_batch, replicas(engine, processes), engine.accumulation)
    except UserError as error:
        raise UserError(f"{stage}: {error.problem}", error.mend) from error


def check_single(processes: int) -> None:
    """Checks the number of processes of the strategy `single`.

    Raises:
        UserError: there are several.
    """
    if processes > 1:
        raise UserError(
            f"engine.strategy single runs in one process, not in {processes}",
            "choose zero2 or zero3, or start one process",
        )


def replicas(engine: EngineConfig, processes: int) -> int:
    """How many shares of the data there are: processes, in a pipeline divided by its stages.

    Raises:
        UserError: the stages do not divide the processes.
    """
    if engine.strategy != "pipeline":
        return processes
    if processes % engine.stages:
        raise UserError(
            f"engine.stages {engine.stages} does not divide {processes} processes",
            f"start a multiple of {engine.stages} processes, or choose engine.stages from their number's divisors",
        )
    return processes // engine.stages


def check_dealing(tasks_per_batch: int, count: int, accumulation: int) -> None:
    """Checks that a global batch can be dealt to `count` replicas in `accumulation` micro-batches each.

    Raises:
        UserError: it cannot.
    """
    parts = count * accumulation
    if tasks_per_batch < 1 or tasks_per_batch % parts:
        raise UserError(
            f"data.tasks_per_batch = {tasks_per_batch} does not divide by {count} ranks x "
            f"engine.accumulation = {accumulation}",
            f"make data.tasks_per_batch a multiple of {parts}, or change engine.accumulation or the ranks",
        )
