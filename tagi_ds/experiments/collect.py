"""A study's figures out of its nodes' folders: scores over seeds and tasks, costs, curves, controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagi_ds.evaluation.comparison import units_of
from tagi_ds.evaluation.metrics import average, score_tasks
from tagi_ds.evaluation.predictions import read_predictions
from tagi_ds.evaluation.results import PREDICTIONS_FOLDER, RESULTS_FILE
from tagi_ds.evaluation.statistics import Units, paired
from tagi_ds.experiments.compute import relative_inference, training_flops
from tagi_ds.experiments.definition import Part, Study
from tagi_ds.experiments.nodes import Cell, Node, Plan
from tagi_ds.experiments.statistics import (
    differences,
    mean_of,
    over_seeds,
    seeds_and_tasks_interval,
    seeds_and_tasks_p_value,
)
from tagi_ds.files import read_json, read_json_lines

CURVE = "validation/"
"""What the names of figures on validation tasks begin with."""


@dataclass(frozen=True)
class Row:
    """One variant's cells that are done, with their results files, by seed."""

    variant: str
    cells: Mapping[int, Cell]
    results: Mapping[int, Mapping[str, Any]]


def rows_of(part: Part, plan: Plan) -> list[Row]:
    """The part's variants in order, those without any result left out."""
    rows = []
    for name in part.variants:
        cells = {cell.seed: cell for cell in plan.cells if (cell.part, cell.variant) == (part.name, name)}
        done = {seed: cell for seed, cell in cells.items() if plan.nodes[cell.evaluated].done}
        results = {seed: read_json(results_folder(plan, cell) / RESULTS_FILE) for seed, cell in done.items()}
        if done:
            rows.append(Row(name, done, results))
    return rows


def results_folder(plan: Plan, cell: Cell) -> Path:
    """Where a cell's evaluation left its results file and predictions."""
    node = plan.nodes[cell.evaluated]
    assert node.config is not None
    assert node.config.evaluation.methods is not None
    return node.run_dir / next(iter(node.config.evaluation.methods))


def part_figures(study: Study, part: Part, plan: Plan) -> dict[str, Any]:
    """What study.json holds of a part.

    Returns:
        {"title", "lengths", "reference", "seeds", "methods": {variant: {group: {"metric", "mean", "interval", "seeds",
        "tasks", "against_reference": what :func:`_against` tells, "other": {further metric: {"mean", "interval"}}}}},
        "about": {variant: what :func:`_about` tells}, "categories": {group: {category: {variant: mean}}},
        "controls": {variant: {control: {group: mean}}}, "curves": {variant: {seed: {step: value}}},
        "floors": {group: {metric: copying the input}}}.
    """
    rows = rows_of(part, plan)
    reference = next((row for row in rows if row.variant == part.reference), None)
    return {
        "title": part.title,
        "lengths": {name: list(at) for name, at in study.lengths_of(part).items()},
        "reference": part.reference,
        "seeds": list(part.seeds),
        "methods": {row.variant: _scores(row, reference, study.averages) for row in rows},
        "about": {row.variant: _about(study, part, row, plan) for row in rows},
        "categories": _categories(rows),
        "controls": {row.variant: found for row in rows if (found := _controls(row))},
        "curves": {row.variant: found for row in rows if (found := _curves(row, plan))},
        "floors": _floors(rows, plan, study.averages),
    }


def _scores(row: Row, reference: Row | None, averages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    metrics = next(iter(row.results.values()))["metrics"]
    groups: dict[str, tuple[str, ...]] = {group: (group,) for group in metrics}
    groups |= {name: tuple(members) for name, members in averages.items() if set(members) <= set(metrics)}
    figures: dict[str, Any] = {}
    for group, members in groups.items():
        main, *others = [m for m in metrics[members[0]] if all(m in metrics[member] for member in members)]
        units = {seed: _units(results, members, main) for seed, results in row.results.items()}
        figures[group] = {
            "metric": main,
            **_mean(list(units.values())),
            "seeds": {str(seed): mean_of([found]) for seed, found in units.items()},
            "tasks": len(next(iter(units.values()))),
            "other": {m: _mean([_units(found, members, m) for found in row.results.values()]) for m in others},
        }
        if reference is not None and reference.variant != row.variant:
            figures[group]["against_reference"] = _against(row, reference, members, main)
    return figures


def _units(results: Mapping[str, Any], groups: Sequence[str], metric: str) -> Units:
    """Those of one group; of several, all of theirs, where each group has the same weight."""
    if len(groups) == 1:
        return units_of(results, groups[0], metric)
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        units = units_of(results, group, metric)
        whole = sum(weight for _, weight in units.values())
        found |= {f"{group}/{name}": (score, weight / whole) for name, (score, weight) in units.items()}
    return found


def _mean(results: Sequence[Units]) -> dict[str, Any]:
    low, high = seeds_and_tasks_interval(results)
    return {"mean": mean_of(results), "interval": None if math.isnan(low) else [low, high]}


def _against(row: Row, reference: Row, groups: Sequence[str], metric: str) -> dict[str, Any] | None:
    """Row minus reference, over the seeds that both have.

    Returns:
        {"difference", "interval" and "p_value" for other seeds and other tasks, "tasks_alone": the paired test over
        tasks of their averages over these seeds, "tasks", "seeds"}; None where they share no seed or no figure.
    """
    shared = [seed for seed in row.results if seed in reference.results]
    if not shared or any(metric not in reference.results[shared[0]]["metrics"].get(group, {}) for group in groups):
        return None
    mine, other = ([_units(which.results[seed], groups, metric) for seed in shared] for which in (row, reference))
    tasks_alone = paired(over_seeds(mine), over_seeds(other))
    apart = differences(mine, other)
    p_value = seeds_and_tasks_p_value(apart)
    return {
        "difference": tasks_alone.pop("difference"),
        "interval": _mean(apart)["interval"],
        "p_value": None if math.isnan(p_value) else p_value,
        "tasks": tasks_alone.pop("tasks"),
        "seeds": shared,
        "tasks_alone": tasks_alone,
    }


def _about(study: Study, part: Part, row: Row, plan: Plan) -> dict[str, Any]:
    """Title, method, steps, operations and seconds, each the mean over the seeds that are done.

    "flops": {"own": of the run whose model is evaluated, "all": with what it builds on}; "seconds": likewise;
    "relative_inference": lengths' name -> operations of answering relative to the concatenated instruction;
    "measured_answering": group -> {"operations", "seconds"} relative to that, measured on real examples.
    """
    variant, cells = part.variants[row.variant], list(row.cells.values())
    own = [plan.nodes[cell.trained] for cell in cells if cell.trained is not None]
    everything = [training_flops(plan, cell.training) for cell in cells]
    seconds = [sum(float(plan.nodes[name].summary().get("seconds", 0)) for name in cell.training) for cell in cells]
    hypernetwork = variant.method not in ("meta_training", "meta_lora", "no_finetuning")
    shown: Node = own[0] if own else plan.nodes[cells[0].evaluated]
    assert shown.config is not None
    measured = [results for results in row.results.values() if "flops" in results]
    return {
        "title": variant.title,
        "method": variant.method,
        "seeds": sorted(row.cells),
        "steps": _average([node.summary()["steps"] for node in own]),
        "flops": {"own": _average([node.summary()["flops"] for node in own]), "all": _average(everything)},
        "seconds": {"own": _average([node.summary()["seconds"] for node in own]), "all": _average(seconds)},
        "relative_inference": relative_inference(shown.config, hypernetwork, study.lengths_of(part)),
        "measured_answering": {
            group: {
                "operations": _average([found["flops"][group]["relative"]["once"] for found in measured]),
                "seconds": _average([found["cost"][group]["relative"]["once"] for found in measured]),
            }
            for group in (measured[0]["flops"] if measured else {})
        },
    }


def _categories(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        first = next(iter(row.results.values()))
        for group, categories in first.get("per_category", {}).items():
            metric = next(iter(first["metrics"][group]))
            for category in categories:
                values = [results["per_category"][group][category][metric] for results in row.results.values()]
                found.setdefault(group, {}).setdefault(category, {})[row.variant] = _average(values)
    return found


def _controls(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for control, groups in next(iter(row.results.values())).get("controls", {}).items():
        for group, metrics in groups.items():
            metric = next(iter(metrics))
            values = [results["controls"][control][group][metric]["score"] for results in row.results.values()]
            found.setdefault(control, {})[group] = _average(values)
    return found


def _curves(row: Row, plan: Plan) -> dict[str, Any]:
    """Seed -> step -> the figure on unseen validation tasks that chose the checkpoint."""
    found: dict[str, Any] = {}
    for seed, cell in row.cells.items():
        if cell.trained is None:
            continue
        node = plan.nodes[cell.trained]
        assert node.config is not None
        points = validation_curve(node.run_dir / "metrics.jsonl", node.config.engine.best_by)
        if points:
            found[str(seed)] = {str(step): value for step, value in points.items()}
    return found


def validation_curve(path: Path, figure: str) -> dict[int, float]:
    """Step -> a validation figure, out of a run's metrics; a step taken again counts as taken last.

    Raises:
        UserError: a whole line is not JSON.
    """
    points: dict[int, float] = {}
    for record in read_json_lines(path):
        if f"{CURVE}{figure}" in record:
            points[int(record["step"])] = float(record[f"{CURVE}{figure}"])
    return points


def _floors(rows: Sequence[Row], plan: Plan, averages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What repeating the bare input scores: group -> metric -> %; ranked groups have no answers to copy."""
    if not rows:
        return {}
    row = rows[0]
    seed, results = next(iter(row.results.items()))
    floors: dict[str, dict[str, float]] = {}
    for group, metrics in results["metrics"].items():
        path = results_folder(plan, row.cells[seed]) / PREDICTIONS_FOLDER / f"{group}.jsonl"
        found = read_predictions(path) if "exact_match" in metrics else []
        if found:
            floors[group] = average(score_tasks((each.task, each.input, each.references) for each in found))
    for name, groups in averages.items():
        if set(groups) <= set(floors):
            shared = [metric for metric in floors[groups[0]] if all(metric in floors[group] for group in groups)]
            floors[name] = {metric: sum(floors[group][metric] for group in groups) / len(groups) for metric in shared}
    return floors


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
