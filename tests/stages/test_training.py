from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tagi_ds import recipe
from tagi_ds.config import DataConfig, EngineConfig, EvaluationConfig, RunConfig
from tagi_ds.data.examples import Example, Task
from tagi_ds.data.mixture import TaskMixture
from tagi_ds.errors import UserError
from tagi_ds.plan.workload import validation_examples
from tagi_ds.recipe import to_dict
from tagi_ds.recipe_rules import check
from tagi_ds.run_folder import differing_fields
from tagi_ds.stages.training import padding_of, planned_steps
from tagi_ds.teachers.distillation import DistilledSource

TASK = Task("t", "say", "c", tuple(Example(str(n), "lamp", ("bell",)) for n in range(10)))
UNUSED: Any = None


@pytest.mark.parametrize(
    ("epochs", "per_batch", "steps"), [(None, 4, 7), (1.0, 4, 3), (2.0, 4, 5), (0.1, 1, 1), (0.3, 1, 3), (0.01, 4, 1)]
)
def test_epochs_in_the_place_of_steps(epochs: float | None, per_batch: int, steps: int) -> None:
    config = RunConfig(engine=EngineConfig(steps=7, epochs=epochs))
    source = TaskMixture([TASK], UNUSED, 0, per_batch)
    assert planned_steps(config, source) == steps
    assert planned_steps(config, DistilledSource(source, lambda batch: batch)) == steps


def test_scale_applies_to_epochs() -> None:
    config = replace(RunConfig(scale=0.5), engine=EngineConfig(epochs=3.0))
    resolved = recipe.resolve(config, "finetune")
    assert resolved.engine.epochs == 1.5
    assert recipe.resolve(resolved, "finetune").engine.epochs == 1.5


def test_what_makes_no_sense_is_refused_before_the_run() -> None:
    with pytest.raises(UserError, match=r"engine\.epochs 2\.0 in pretraining"):
        check(RunConfig(engine=EngineConfig(epochs=2.0)), "pretrain")
    check(RunConfig(engine=EngineConfig(epochs=2.0)), "finetune")
    with pytest.raises(UserError, match=r"data\.task_cap 5 with data\.sampling uniform"):
        check(RunConfig(data=DataConfig(task_cap=5, sampling="uniform")), "finetune")


def test_the_summary_has_the_runs_share_of_padding() -> None:
    totals = {"malformed": 3.0, "total_input_tokens": 30.0, "total_input_padding": 10.0}
    totals |= {"total_target_tokens": 5.0, "total_target_padding": 15.0}
    totals |= {"total_instruction_tokens": 0.0, "total_instruction_padding": 0.0}
    assert padding_of(totals) == {"input": 0.25, "target": 0.75, "all": 0.4167}
    assert padding_of({"malformed": 3.0}) == {}


def test_a_validation_batch_has_64_examples_or_as_many_as_are_answered_together() -> None:
    found = [validation_examples(RunConfig(evaluation=EvaluationConfig(batch_examples=n))) for n in (1, 16, 64, 128)]
    assert found == [1, 16, 64, 64]
    smaller = RunConfig(evaluation=EvaluationConfig(batch_examples=16))
    assert differing_fields(smaller, to_dict(RunConfig())) == [], "the run that found no memory goes on with less"
