"""A made-up study with everything that a report can show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tagi_ds.evaluation.accuracy import score_datasets
from tagi_ds.evaluation.comparison import compare, intervals_of
from tagi_ds.evaluation.cost import WAYS
from tagi_ds.evaluation.metrics import average, average_categories
from tagi_ds.evaluation.predictions import Prediction, PredictionStore
from tagi_ds.evaluation.ranking import chosen
from tagi_ds.files import write_json
from tagi_ds.run_folder import mark_done

RELATIVE = {"concatenated": 1.0, "every_batch": 1.2, "once": 0.6, "compiled": 0.4}
FLOPS = {"backbone": 1e12, "finetune": 2e12, "pretrain": 0.5e12, "meta_train": 3.5e12}
LIKELIHOODS = (-6.0, -4.0)
"""Of a ranked example's two choices, of three tokens and of one: by the mean the first is the likelier, by the sum the
second."""


def results_of(method: str, shift: float, form: str, instruction: str = "own") -> dict[str, Any]:
    """A results file's content: six freely answered tasks and four templates of two data sets."""
    free = {
        f"task{at}": {
            "exact_match": 10.0 * at + shift,
            "rouge_l": 12.0 * at + shift,
            "examples": 4,
            "category": f"kind {at % 3}",
            "source": "s",
            "instruction": f"do <{at}>",
        }
        for at in range(6)
    }
    ranked = {
        f"super_glue_{name}_{at}": {
            "accuracy": 40.0 + 10 * at + shift,
            "accuracy_unnormalised": 30.0 + shift,
            "examples": 2,
            "category": "inference",
            "source": f"super_glue/{name}",
            "instruction": "{premise}?",
        }
        for name in ("cb", "rte")
        for at in range(2)
    }
    datasets = score_datasets(ranked)
    accuracies = ("accuracy", "accuracy_unnormalised")
    results: dict[str, Any] = {
        "method": method,
        "form": form,
        "instruction": instruction,
        "metrics": {"unseen": average(free), "mtest11": {name: _mean(datasets, name) for name in accuracies}},
        "per_task": {"unseen": free, "mtest11": ranked},
        "per_category": {"unseen": average_categories(free), "mtest11": average_categories(ranked, accuracies)},
        "per_dataset": {"mtest11": datasets},
        "missing": {"mtest11": ["anli/r1"]},
        "left_out": {
            "unseen": {"malformed": {"a": 2, "b": 5}, "gone": ["b"], "other_languages": ["c"]},
            "mtest11": {"cut": {"super_glue_cb_0": 56}},
        },
    }
    results["intervals"] = intervals_of(results)
    return results


def _mean(datasets: dict[str, Any], name: str) -> float:
    return sum(float(each[name]) for each in datasets.values()) / len(datasets)


def write_study(study: Path) -> dict[str, dict[str, Any]]:
    """Writes it; returns method -> results file's content."""
    own = results_of("tagi", 5.0, "hypernetwork")
    control = results_of("tagi (random instruction)", 2.0, "hypernetwork", "random")
    own["controls"] = {"random": _controls(own, control)}
    groups = ("unseen", "mtest11")
    memory: dict[str, int | None] = {**dict.fromkeys(WAYS, 2_500_000), "compiled": None}
    own["flops"] = {
        group: {
            "operations": {way: int(1e9 * share) for way, share in RELATIVE.items()},
            "relative": RELATIVE,
            "examples": 4,
        }
        for group in groups
    }
    own["cost"] = {
        group: {"seconds": RELATIVE, "relative": RELATIVE, "peak_memory": memory, "device": "cpu"} for group in groups
    }
    results = {
        "backbone": results_of("backbone", 0.0, "concatenated"),
        "tagi": own,
        "tagi (random instruction)": control,
        "untrained": results_of("untrained", -3.0, "hypernetwork"),
    }
    for method, content in results.items():
        write_json(study / "evaluate" / method / "results.json", content)
    _predictions(study / "evaluate" / "tagi" / "predictions")
    write_json(study / "evaluate" / "tagi" / "adapters_map.json", adapter_map())
    for stage, flops in FLOPS.items():
        mark_done(study / stage, {"steps": 30, "seconds": 12.5, "flops": flops})
        (study / stage / "config.yaml").write_text(yaml.safe_dump({"model": {"initial": None}}))
    lines = [
        {"step": step, "loss/total": 3.0 / step, "loss/label": 3.0 / step, "loss/exact": 0.1 * step, "lr": 1.0}
        | ({"validation/loss": 4.0 / step, "validation/exact": 0.05 * step} if step % 2 == 0 else {})
        for step in range(1, 7)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (study / "backbone" / "metrics.jsonl").write_text(text)
    (study / "finetune" / "metrics.jsonl").write_text(text.replace('"lr"', '"loss/kl"'))
    return results


def adapter_map() -> dict[str, Any]:
    """Forty tasks on a slanting grid, closer to each other than their names are wide."""
    points = [[(at % 8) / 10, (at // 8) / 10 + (at % 8) / 80] for at in range(40)]
    tasks = [
        {"name": f"task{at:04}_with_a_name_of_some_length", "group": "unseen", "category": f"kind {at % 12}"}
        for at in range(40)
    ]
    told = {"within": 0.75, "between": 0.25, "nearest": 0.5, "nearest_by_chance": 0.125}
    return {"key": "k", "tasks": tasks, "points": points, "kept": 0.625, "likeness": told}


def ranked_example(name: str, right: int, gap: float = 0.0) -> Prediction:
    """Of two choices the first was taken; `right` is the reference's place, `gap` makes the second less likely."""
    made = Prediction(
        name, f"super_glue_cb_{right}", f"premise {name}", "", (("yes indeed", "no")[right],), 0.0, "k",
        ("yes indeed", "no"), (LIKELIHOODS[0], LIKELIHOODS[1] - gap), (3, 1),
    )  # fmt: skip
    return Prediction(**{**vars(made), "prediction": chosen(made, normalised=True)})


def _predictions(folder: Path) -> None:
    free = [
        Prediction(f"e{n}", f"task{n % 6}", f"input {n}", "Yes!" if n % 2 else f"bad {n}", ("yes",)) for n in range(12)
    ]
    PredictionStore(folder, "unseen").finish(free)
    PredictionStore(folder, "mtest11").finish([ranked_example(f"r{n}", n % 2, float(n)) for n in range(8)])


def _controls(own: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    return {
        group: {metric: {"score": found["second"], **found} for metric, found in metrics.items()}
        for group, metrics in compare(own, control).items()
    }
