"""The plan speaks of every shipped recipe and stage, and what it says of each agrees with itself."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tagi_ds.plan.advice import make_plan
from tagi_ds.plan.cluster import read_cluster
from tagi_ds.plan.command import STAGES
from tagi_ds.plan.report import print_plan, to_dict
from tagi_ds.recipe import parse
from tests.shipped import RECIPES


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_for_every_stage(path: Path, stage: str) -> None:
    # Two machines: every kind of layout is among the candidates.
    plan = make_plan(parse(stage, ["--config", str(path)]).config, stage, read_cluster("2x4xA100-80G"))
    assert plan.recommended is not None, "the recipe has a layout on eight GPUs of 80 GB"
    assert plan.recommended.fits
    assert plan.shapes.trained + plan.shapes.frozen == plan.shapes.parameters
    for candidate in plan.candidates:
        if candidate.refused:
            continue
        memory, timing, work = candidate.memory, candidate.timing, candidate.work
        assert memory is not None
        assert timing is not None
        assert work is not None
        assert memory.peak > memory.frozen + memory.trained + memory.optimizer
        assert candidate.fits == (memory.peak <= plan.cluster.memory)
        validated = memory.validation > memory.frozen + memory.trained + memory.optimizer
        assert validated == (stage != "pretrain"), "pretraining validates nothing"
        assert timing.step_s >= max(timing.compute_s, timing.optimizer_s)
        assert 0 < timing.mfu < 0.58, "no more than what computing alone reaches"
    assert plan.recommended.memory is not None
    assert plan.recommended.memory.validation <= plan.cluster.memory, "the recipe's validation fits there, too"
    printed = io.StringIO()
    print_plan(plan, Console(file=printed, width=160))
    assert f"{plan.shapes.parameters - plan.shapes.generator - plan.shapes.fusion:,}" in printed.getvalue()
    assert json.loads(json.dumps(to_dict(plan)))["recommended"] == plan.recommended.layout.title
