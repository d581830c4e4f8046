"""A study's figures and report out of made-up results, of which every figure is known."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tagi_ds.evaluation.results import PREDICTIONS_FOLDER
from tagi_ds.experiments import command
from tagi_ds.experiments.collect import part_figures, results_folder, validation_curve
from tagi_ds.experiments.compute import relative_inference
from tagi_ds.experiments.definition import Study
from tagi_ds.experiments.nodes import Plan
from tagi_ds.experiments.planning import plan_study
from tagi_ds.experiments.report import write_study_report
from tagi_ds.experiments.statistics import student_quantile
from tests.experiments.studies import VARIANTS, Launches, leave, study_of, tree_of

SCORES: dict[str, list[list[float]]] = {
    "no_finetuning": [[0, 0, 0], [0, 0, 0]],
    "hint": [[10, 20, 60], [20, 30, 70]],
    "tagi": [[40, 50, 90], [50, 60, 100]],
    "whole": [[40, 55, 85], [50, 65, 95]],
}
"""Method -> seed -> task -> exact match in the group `unseen`."""
CATEGORY = {"t0": "Move", "t1": "Move", "t2": "Insert then move"}


def results_of(scores: list[float], control: float | None) -> dict[str, Any]:
    """A results file of the group `unseen` with three tasks of ten examples."""
    tasks = {
        f"t{number}": {"exact_match": score, "rouge_l": 100.0, "examples": 10, "category": CATEGORY[f"t{number}"]}
        for number, score in enumerate(scores)
    }
    mean = sum(scores) / 3
    results: dict[str, Any] = {
        "metrics": {"unseen": {"exact_match": mean, "rouge_l": 100.0}},
        "per_task": {"unseen": tasks},
        "per_category": {
            "unseen": {
                "Move": {"exact_match": (scores[0] + scores[1]) / 2},
                "Insert then move": {"exact_match": scores[2]},
            }
        },
    }
    if control is not None:
        results["controls"] = {"random": {"unseen": {"exact_match": {"score": control}}}}
        results["flops"] = {"unseen": {"relative": {"once": 0.5}}}
        results["cost"] = {"unseen": {"relative": {"once": 0.25}}}
    return results


MADE = {
    name: {seed: results_of(row, 7.0 if name in ("hint", "tagi") else None) for seed, row in enumerate(rows)}
    for name, rows in SCORES.items()
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return study_of(tmp_path)


@pytest.fixture
def plan(study: Study) -> Plan:
    """Every node done, with the made-up results."""
    return made_plan(study, MADE)


def made_plan(study: Study, made: Mapping[str, Any], groups: Sequence[str] = ("unseen",)) -> Plan:
    plan = plan_study(study, ["main"])
    for node in plan.nodes.values():
        leave(node, made)
    for cell in plan.cells:
        folder = results_folder(plan, cell) / PREDICTIONS_FOLDER
        folder.mkdir(parents=True)
        lines = [
            {"id": f"{number}", "task": "t0", "input": "a b", "prediction": "c", "references": [reference], "key": "k"}
            for number, reference in enumerate(("a b", "b a", "a b", "x"))
        ]
        text = "".join(json.dumps({**line, "seconds": 0.0}) + "\n" for line in lines)
        for group in groups:
            (folder / f"{group}.jsonl").write_text(text, encoding="utf-8")
    return plan


def test_groups_are_averaged_each_with_the_same_weight(tmp_path: Path) -> None:
    study = study_of(tmp_path, averages={"all": ["unseen", "single"], "more": ["unseen", "nowhere"]})
    made: dict[str, Any] = copy.deepcopy(MADE)
    for seeds in made.values():
        for seed, results in seeds.items():
            results["metrics"]["single"] = {"exact_match": 10.0 * seed}
            results["per_task"]["single"] = {"t0": {"exact_match": 10.0 * seed, "examples": 1}}
    figures = part_figures(study, study.parts["main"], made_plan(study, made, ("unseen", "single")))
    found = figures["methods"]["tagi"]["all"]
    assert (found["tasks"], found["metric"], found["other"]) == (4, "exact_match", {})
    assert found["seeds"] == {"0": pytest.approx(30.0), "1": pytest.approx((70 + 10) / 2)}
    assert figures["methods"]["hint"]["all"]["against_reference"]["difference"] == pytest.approx(-15.0)
    assert set(figures["methods"]["tagi"]) == {"unseen", "single", "all"}, "a group that is not there is no average"
    assert figures["floors"]["all"]["exact_match"] == pytest.approx(50.0)


def test_means_intervals_and_seeds_are_those_of_the_results(study: Study, plan: Plan) -> None:
    figures = part_figures(study, study.parts["main"], plan)
    assert list(figures["methods"]) == list(VARIANTS), "in the file's order"
    tagi = figures["methods"]["tagi"]["unseen"]
    assert (tagi["metric"], tagi["tasks"]) == ("exact_match", 3)
    assert tagi["mean"] == pytest.approx(65.0)
    assert tagi["seeds"] == {"0": pytest.approx(60.0), "1": pytest.approx(70.0)}
    # Seeds differ by 10 on every task: no rest, so the variances of the means add up.
    of_seeds, of_tasks = 50.0 / 2, float(np.var([45, 55, 95], ddof=1)) / 3
    freedom = (of_seeds + of_tasks) ** 2 / (of_seeds**2 / 1 + of_tasks**2 / 2)
    half = student_quantile(freedom) * math.sqrt(of_seeds + of_tasks)
    assert tagi["interval"] == pytest.approx([65.0 - half, 65.0 + half])
    assert tagi["other"]["rouge_l"]["mean"] == pytest.approx(100.0)
    assert tagi["other"]["rouge_l"]["interval"] == pytest.approx([100.0, 100.0])


def test_pairs_are_tested_over_tasks(study: Study, plan: Plan) -> None:
    figures = part_figures(study, study.parts["main"], plan)
    test = figures["methods"]["hint"]["unseen"]["against_reference"]
    assert test["difference"] == pytest.approx(-30.0)
    # Every task and seed differs by as much, so nothing is left to chance.
    assert (test["interval"], test["p_value"]) == (pytest.approx([-30.0, -30.0]), 0.0)
    # Of three tasks alike, two of the eight sign flips are as large.
    assert test["tasks_alone"]["p_value"] == pytest.approx(2 / 8)
    assert (test["tasks"], test["seeds"]) == (3, [0, 1])
    assert "against_reference" not in figures["methods"]["tagi"]["unseen"]
    level = figures["methods"]["meta_training"]["unseen"]["against_reference"]
    assert (level["difference"], level["p_value"]) == (pytest.approx(0.0), pytest.approx(1.0))
    # Differences of 0, 5 and -5 on both seeds: Student's interval over three tasks.
    half = 4.3026527 * 5 / math.sqrt(3)
    assert level["interval"] == pytest.approx([-half, half])


def test_costs_are_summed_over_what_a_model_builds_on(study: Study, plan: Plan) -> None:
    about = part_figures(study, study.parts["main"], plan)["about"]
    config = next(node.config for node in plan.nodes.values() if node.stage == "finetune")
    assert config is not None
    steps = config.engine.steps
    backbone = about["no_finetuning"]["flops"]["all"]
    assert about["no_finetuning"]["flops"]["own"] is None
    assert about["hint"]["flops"]["own"] == pytest.approx(1e9 * steps)
    assert about["hint"]["flops"]["all"] > backbone + 1e9 * steps, "its pretraining too"
    assert about["tagi"]["seconds"]["all"] == pytest.approx(about["hint"]["seconds"]["all"] + 20.0), "teachers, store"
    assert about["tagi"]["measured_answering"] == {"unseen": {"operations": 0.5, "seconds": 0.25}}
    assert about["meta_training"]["relative_inference"] == {"own": 1.0, "long": 1.0}
    assert about["tagi"]["relative_inference"]["long"] < about["tagi"]["relative_inference"]["own"] < 1.5
    assert about["hint"]["relative_inference"]["own"] < about["tagi"]["relative_inference"]["own"], "no fusion"


def test_many_inputs_approach_the_share_that_the_formula_tells(study: Study, plan: Plan) -> None:
    """With the instruction paid once, what is left is the bare input beside the concatenated one."""
    config = next(node.config for node in plan.nodes.values() if node.stage == "finetune")
    assert config is not None
    at = {"x": (100, 20, 1)}
    few, many, most = (relative_inference(config, True, at, inputs)["x"] for inputs in (1, 100, 100_000))
    assert few > 1 > many > most
    assert most < 0.6


def test_where_they_fail_controls_floors_and_curves(study: Study, plan: Plan) -> None:
    figures = part_figures(study, study.parts["main"], plan)
    categories = figures["categories"]["unseen"]
    assert categories["Move"]["tagi"] == pytest.approx(50.0)
    assert categories["Insert then move"] == {"no_finetuning": 0.0, "hint": 65.0, "tagi": 95.0, "meta_training": 90.0}
    assert figures["controls"] == {name: {"random": {"unseen": 7.0}} for name in ("hint", "tagi")}
    assert figures["floors"]["unseen"]["exact_match"] == pytest.approx(50.0), "two of four references are the input"
    assert set(figures["curves"]) == {"hint", "tagi", "meta_training"}
    steps = [int(step) for step in figures["curves"]["tagi"]["0"]]
    assert list(figures["curves"]["tagi"]["0"].values()) == pytest.approx([0.5 * steps[0] / steps[1], 0.5])


def test_a_step_taken_again_counts_as_taken_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "validation/exact": 0.1}, {"step": 2, "loss/total": 1.0}, {"step": 1, "validation/exact": 0.2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "valid')
    assert validation_curve(path, "exact") == {1: 0.2}
    assert validation_curve(tmp_path / "none", "exact") == {}


def test_the_report_holds_tables_pictures_and_figures(study: Study, plan: Plan) -> None:
    main = dataclasses.replace(
        study.parts["main"], lengths={"its own": (30, 5, 5)}, remarks=("Three tasks say little.",)
    )
    study = dataclasses.replace(study, parts={"main": main})
    path = write_study_report(study, ["main"], {})
    assert path is not None
    figures = json.loads((study.folder / "study.json").read_text())
    assert figures["parts"]["main"]["methods"]["tagi"]["unseen"]["mean"] == pytest.approx(65.0)
    lengths = {"its own": [30, 5, 5], "own": [12, 5, 5], "long": [197, 44, 8]}
    assert figures["parts"]["main"]["lengths"] == lengths
    assert list(figures["parts"]["main"]["about"]["tagi"]["relative_inference"]) == list(lengths), "a part's own first"
    markdown = (study.folder / "study.md").read_text()
    assert "for other seeds and other tasks (two-way" in markdown
    low, high = figures["parts"]["main"]["methods"]["tagi"]["unseen"]["interval"]
    assert high > 100, "which no percentage is"
    assert f"| TAGI | 2 | 65.0 \\[{low:.1f}, 100.0\\] |" in markdown
    assert "floor: the input copied | - | 50.0" in markdown
    assert "-30.0" in markdown
    assert "Insert then move" in markdown
    assert "\nThree tasks say little.\n" in markdown
    for name in ("main_cost", "main_curves"):
        assert f"study_pictures/{name}.png" in markdown
        assert (study.folder / "study_pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    html = path.read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html, "it needs no other file"
    elsewhere = study.folder.parent / "docs"
    assert write_study_report(study, ["main"], {}, elsewhere) == elsewhere / "study.html"
    assert (elsewhere / "study.md").read_text() == markdown
    assert (elsewhere / "study_pictures" / "main_cost.png").is_file()


def test_a_study_that_is_half_done_is_reported_with_the_seeds_it_has(study: Study, plan: Plan) -> None:
    for cell in plan.cells:
        node = plan.nodes[cell.evaluated]
        if (cell.variant, cell.seed) == ("tagi", 1) or cell.variant == "hint":
            (node.run_dir / "done.json").unlink()
    figures = part_figures(study, study.parts["main"], plan)
    assert list(figures["methods"]) == ["no_finetuning", "tagi", "meta_training"]
    assert figures["about"]["tagi"]["seeds"] == [0]
    assert figures["methods"]["meta_training"]["unseen"]["against_reference"]["seeds"] == [0]
    assert figures["methods"]["meta_training"]["unseen"]["against_reference"]["p_value"] is None, "of one seed"


def test_nothing_evaluated_is_no_report(study: Study) -> None:
    assert write_study_report(study, ["main"], {}) is None
    assert not (study.folder / "study.md").exists()


def test_the_command_runs_tunes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command over made-up launches: the grid, what it chose, a part by itself, the report."""
    import yaml

    tuning = {"seeds": [0], "methods": ["hint"], "grid": {"optimizer.learning_rate": [1e-3, 2e-3]}}
    path = tmp_path / "study.yaml"
    main = {"seeds": [0], "reference": "hint", "variants": {"hint": {"method": "hint"}}}
    path.write_text(yaml.safe_dump(tree_of(tmp_path, tuning=tuning, parts={"main": main, "other": main})))
    words = ["--config", str(path), "--part", "main", "--model.rank", "8"]
    assert command.run([*words, "--dry-run"]) == 0
    assert "not tuned yet" in capsys.readouterr().out
    launches = Launches(results={"hint": MADE["hint"]})
    assert command.run(words, launches) == 0
    assert all("--model.rank=8" in told for name, told in launches.arguments.items() if name.startswith("finetune"))
    assert sum(name.startswith("finetune") for name in launches.started) == 2, "the grid's; one of them is the part's"
    folder = tmp_path / "study"
    assert json.loads((folder / "tuning.json").read_text())["methods"]["hint"]["at_edge"]
    listed = json.loads((folder / "plan.json").read_text())
    assert {"name", "launcher", "arguments", "run_folder", "needs"} == set(listed[0])
    assert "30.0" in (folder / "study.md").read_text()
    again = Launches(results={"hint": MADE["hint"]})
    assert command.run([*words[:2], "--model.rank", "8"], again) == 0
    assert not again.started, "the other part is the same"
    assert list(json.loads((folder / "study.json").read_text())["parts"]) == ["main", "other"]
    failing = Launches(failing=["evaluate"])
    assert command.run([*words, "--seed", "3", "--evaluation.beams", "2"], failing) == 1
    assert "failed: evaluate-finetune-hint" in capsys.readouterr().out


def test_the_command_tunes_what_is_given_others_compute_last(tmp_path: Path) -> None:
    import yaml

    grid = {"optimizer.learning_rate": [1e-3, 2e-3]}
    tuning = {"part": "main", "seeds": [0], "methods": ["equal", "hint"], "grid": grid}
    variants = {"hint": {"method": "hint"}, "equal": {"method": "meta_training", "compute_of": "hint"}}
    path = tmp_path / "study.yaml"
    parts = {"main": {"seeds": [0], "reference": "hint", "variants": variants}}
    path.write_text(yaml.safe_dump(tree_of(tmp_path, tuning=tuning, parts=parts)))
    launches = Launches(results={"hint": MADE["hint"], "whole": MADE["whole"]})
    assert command.run(["--config", str(path)], launches) == 0
    trained = [name.split("-")[0] for name in launches.started if name.startswith(("finetune", "meta_train"))]
    assert trained == ["finetune", "finetune", "meta_train", "meta_train"], "the part's own are among them"
    assert set(json.loads((tmp_path / "study" / "tuning.json").read_text())["methods"]) == {"hint", "equal"}
