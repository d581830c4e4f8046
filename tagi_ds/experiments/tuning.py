"""Which points of the tuning grid are tried, what they showed, and the values that this chose.

Grid, seeds and rule are the same for every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tagi_ds.errors import UserError
from tagi_ds.experiments.definition import Point, Study, Tuning
from tagi_ds.experiments.nodes import Plan
from tagi_ds.files import read_json, write_json

TUNING_FILE = "tuning.json"
"""In the study's folder."""
_VALIDATION = "validation/"


def tuning_rounds(study: Study) -> list[tuple[str, ...]]:
    """What is tuned one after the other: last what is given the compute of others, as tuned before."""
    tuning = study.tuning
    if tuning is None:
        return []
    variants = {} if tuning.part is None else study.parts[tuning.part].variants
    late = tuple(name for name in tuning.methods if name in variants and variants[name].compute_of is not None)
    first = tuple(name for name in tuning.methods if name not in late)
    return [names for names in (first, late) if names]


def first_trials(tuning: Tuning, methods: Iterable[str]) -> dict[str, tuple[Point, ...]]:
    """Method -> points that are tried first: every one, or the start of a walk and the value above it."""
    whole = tuple(_points(tuning.grid))
    if tuning.start:
        at = whole.index(tuple(tuning.start.items()))
        # Where there is no value above, the one below.
        whole = whole[at : at + 2] if at + 1 < len(whole) else whole[max(0, at - 1) :]
    return dict.fromkeys(methods, whole)


def further_trials(tuning: Tuning, outcome: Mapping[str, Any]) -> dict[str, tuple[Point, ...]]:
    """Method -> points to be tried next, after what was found; methods at the end of their walk are left out."""
    if not tuning.start:
        return {}
    whole = list(_points(tuning.grid))
    start = whole.index(tuple(tuning.start.items()))
    sign = -1 if outcome["metric"] == f"{_VALIDATION}loss" else 1
    further: dict[str, tuple[Point, ...]] = {}
    for method, found in outcome["methods"].items():
        scores = {whole.index(tuple(each["values"].items())): sign * each["mean"] for each in found["points"]}
        ahead = _ahead(scores, start, len(whole))
        if ahead is not None:
            further[method] = (whole[ahead],)
    return further


def _ahead(scores: Mapping[int, float], start: int, size: int) -> int | None:
    """The next place of a walk that goes on while scores rise, upwards first; None at its end."""
    at = start
    for step in (1, -1):
        while 0 <= at + step < size:
            if at + step not in scores:
                return at + step
            if scores[at + step] <= scores[at]:
                break
            at += step
        if at != start:
            break
    return None


def tuning_outcome(study: Study, plan: Plan) -> dict[str, Any]:
    """The grid's scores of the methods with trials in `plan`, and what they choose; every trial must be done.

    Returns:
        {"metric": of validation, "seeds", "grid", "start" of a walk, "methods": {method: {"chosen": {field: value},
        "points": [{"values": {field: value}, "mean", "seeds": {seed: value}}], "at_edge": fields whose chosen value is
        the grid's least or greatest}}}.

    Raises:
        UserError: a trial never looked at its validation tasks.
    """
    assert study.tuning is not None
    methods: dict[str, Any] = {}
    metric, order = "loss", list(_points(study.tuning.grid))
    for method in dict.fromkeys(trial.method for trial in plan.trials):
        points: dict[Point, dict[str, float]] = {}
        for trial in (trial for trial in plan.trials if trial.method == method):
            node = plan.nodes[trial.trained]
            assert node.config is not None
            best, metric = node.summary().get("best"), node.config.engine.best_by
            if best is None:
                raise UserError(
                    f"{node.name} has no validation score, so that tuning cannot choose",
                    "name a data.validation_split, or hold tasks out with data.validation_tasks",
                )
            points.setdefault(trial.point, {})[str(trial.seed)] = float(best["value"])
        points = {point: points[point] for point in sorted(points, key=order.index)}
        means = {point: sum(values.values()) / len(values) for point, values in points.items()}
        # Of equal ones the first in the grid's order.
        chosen = (min if metric == "loss" else max)(means, key=lambda point: means[point])
        methods[method] = {
            "chosen": dict(chosen),
            "at_edge": [key for key, value in chosen if _is_edge(value, study.tuning.grid[key])],
            "points": [
                {"values": dict(point), "mean": means[point], "seeds": values} for point, values in points.items()
            ],
        }
    return {
        "metric": f"{_VALIDATION}{metric}",
        **_rule(study.tuning),
        "methods": methods,
    }


def write_tuning(study: Study, outcome: dict[str, Any]) -> None:
    """Records the outcome.

    Raises:
        UserError: the study's folder cannot be written to.
    """
    write_json(study.folder / TUNING_FILE, outcome)


def read_tuned(study: Study) -> dict[str, dict[str, Any]] | None:
    """Method -> chosen values, of a study that was tuned; None before all are, {} for a study without tuning.

    Raises:
        UserError: the record is of another grid.
    """
    chosen = read_chosen(study)
    wanted = () if study.tuning is None else study.tuning.methods
    return chosen if set(wanted) <= set(chosen) else None


def read_chosen(study: Study) -> dict[str, dict[str, Any]]:
    """Method -> chosen values, of those that were tuned so far.

    Raises:
        UserError: the record is of another grid.
    """
    path: Path = study.folder / TUNING_FILE
    if study.tuning is None or not path.is_file():
        return {}
    outcome = read_json(path)
    rule = _rule(study.tuning)
    if {key: outcome.get(key) for key in rule} != rule:
        raise UserError(
            f"{path} is the outcome of another grid", f"delete it, and tune again: --part tuning, on {study.path}"
        )
    return chosen_values(outcome)


def chosen_values(outcome: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Method -> chosen values, of what :func:`tuning_outcome` found, or of nothing."""
    return {method: found["chosen"] for method, found in outcome.get("methods", {}).items()}


def _rule(tuning: Tuning) -> dict[str, Any]:
    grid = {key: list(values) for key, values in tuning.grid.items()}
    return {"seeds": list(tuning.seeds), "grid": grid, "start": dict(tuning.start)}


def _points(grid: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """Every combination of a grid's values."""
    found: list[Point] = [()]
    for key, values in grid.items():
        found = [(*point, (key, value)) for point in found for value in values]
    yield from found


def _is_edge(value: Any, values: tuple[Any, ...]) -> bool:
    return len(values) > 1 and value in (values[0], values[-1])
