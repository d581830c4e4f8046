"""What fits a number of processes: strategies, global batches, and the shipped recipes on the machines they name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.processes import TRAINED_STAGES, check_processes
from tagi_ds.recipe import parse
from tests.distributed import ROOT

RECIPES = ROOT / "launchers" / "recipes"


def config_of(tasks: int, **engine: Any) -> RunConfig:
    config = RunConfig()
    data = dataclasses.replace(config.data, tasks_per_batch=tasks)
    return dataclasses.replace(config, data=data, engine=dataclasses.replace(config.engine, **engine))


@pytest.mark.parametrize(
    ("tasks", "processes", "engine", "problem"),
    [
        (16, 8, {"strategy": "zero2", "accumulation": 2}, None),
        (
            8,
            8,
            {"strategy": "zero2", "accumulation": 2},
            "finetune: data.tasks_per_batch = 8 does not divide by 8 ranks",
        ),
        (2, 4, {"strategy": "pipeline", "stages": 2}, None),
        (2, 3, {"strategy": "pipeline", "stages": 2}, "engine.stages 2 does not divide 3 processes"),
        (2, 8, {"strategy": "pipeline", "stages": 2}, "does not divide by 4 ranks"),
        (2, 1, {"strategy": "single"}, None),
        (2, 2, {"strategy": "single"}, "single runs in one process, not in 2"),
    ],
)
def test_batches_and_strategies_fit_processes_or_are_refused(
    tasks: int, processes: int, engine: dict[str, Any], problem: str | None
) -> None:
    config = config_of(tasks, **engine)
    if problem is None:
        check_processes(config, "finetune", processes)
    else:
        with pytest.raises(UserError, match=problem):
            check_processes(config, "finetune", processes)
    # Nothing is dealt there: whoever is free takes the next piece of work.
    check_processes(config, "train_teachers", processes)


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("sni_base", 8),
        ("sni_xl", 8),
        ("sni_xxl", 2),
        ("sni_xxl_multinode", 16),
        ("sni_xxl_pipeline", 2),
        ("p3_base", 8),
        ("p3_xl", 8),
        ("p3_xxl", 2),
    ],
)
def test_every_stage_of_a_shipped_recipe_runs_on_the_gpus_that_it_is_for(name: str, processes: int) -> None:
    for stage in TRAINED_STAGES:
        config = parse(stage, ["--config", str(RECIPES / f"{name}.yaml")]).config
        check_processes(config, stage, processes)
