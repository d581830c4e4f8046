"""What the tuning grid showed, and the values that it chose: the same grid for every method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tagi_ds.errors import UserError
from tagi_ds.experiments.definition import Study
from tagi_ds.experiments.nodes import Plan
from tagi_ds.files import read_json, write_json

TUNING_FILE = "tuning.json"
"""In the study's folder."""


def tuning_rounds(study: Study) -> list[tuple[str, ...]]:
    """What is tuned one after the other: last what is given the compute of others, as tuned before."""
    tuning = study.tuning
    if tuning is None:
        return []
    variants = {} if tuning.part is None else study.parts[tuning.part].variants
    late = tuple(name for name in tuning.methods if name in variants and variants[name].compute_of is not None)
    first = tuple(name for name in tuning.methods if name not in late)
    return [names for names in (first, late) if names]


def tuning_outcome(study: Study, plan: Plan) -> dict[str, Any]:
    """The grid's scores of the methods with trials in `plan`, and what they choose; every trial must be done.

    Returns:
        {"metric": of validation, "seeds", "grid", "methods": {method: {"chosen": {field: value}, "points": [{"values":
        {field: value}, "mean", "seeds": {seed: value}}], "at_edge": fields whose chosen value is the grid's least or
        greatest}}}.

    Raises:
        UserError: a trial never looked at its validation tasks.
    """
    assert study.tuning is not None
    methods: dict[str, Any] = {}
    metric = "loss"
    for method in dict.fromkeys(trial.method for trial in plan.trials):
        points: dict[tuple[tuple[str, Any], ...], dict[str, float]] = {}
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
        "metric": f"validation/{metric}",
        "seeds": list(study.tuning.seeds),
        "grid": {key: list(values) for key, values in study.tuning.grid.items()},
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
    if study.tuning is None:
        return {}
    path: Path = study.folder / TUNING_FILE
    if not path.is_file():
        return None
    outcome = read_json(path)
    grid = {key: list(values) for key, values in study.tuning.grid.items()}
    if (outcome.get("grid"), outcome.get("seeds")) != (grid, list(study.tuning.seeds)):
        raise UserError(
            f"{path} is the outcome of another grid", f"delete it, and tune again: --part tuning, on {study.path}"
        )
    chosen = chosen_values(outcome)
    return chosen if set(study.tuning.methods) <= set(chosen) else None


def chosen_values(outcome: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Method -> chosen values, of what :func:`tuning_outcome` found, or of nothing."""
    return {method: found["chosen"] for method, found in outcome.get("methods", {}).items()}


def _is_edge(value: Any, values: tuple[Any, ...]) -> bool:
    return len(values) > 1 and value in (values[0], values[-1])
