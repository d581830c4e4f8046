"""The results file of one evaluated method, and how several become a study's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tagi_ds.config import STAGES, EvaluationConfig
from tagi_ds.data.examples import Task
from tagi_ds.engine import distributed
from tagi_ds.errors import UserError
from tagi_ds.evaluation.generation import Collate, GenerationSettings, predict
from tagi_ds.evaluation.metrics import average, score_tasks
from tagi_ds.files import read_json, write_json
from tagi_ds.run_folder import done_summary, is_done

RESULTS_FILE = "results.json"
"""In a method's evaluation folder, and in the study's."""
PREDICTIONS_FOLDER = "predictions"
"""In a method's evaluation folder."""


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    groups: Mapping[str, Sequence[Task]],
    collate: Collate,
    config: EvaluationConfig,
    max_new_tokens: int,
    run_dir: Path,
    method: str,
    split: str,
    fingerprint: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a model on groups of tasks and writes ``run_dir/results.json``; every rank must call it.

    Of each task the first `config.max_instances` examples count, as in the published evaluation.

    Args:
        model, tokenizer, collate, fingerprint: see :func:`tagi_ds.evaluation.generation.predict`.
        groups: group name -> its tasks.
        config: batch size, instances, beams.
        max_new_tokens: longest answer, in tokens.
        run_dir: the evaluation's run folder.
        method, split: names for the results file.
        extra: further entries of the results file (e.g. flops).

    Returns:
        {"method", "split", "metrics": {group: {"exact_match", "rouge_l"}}, "per_task": {group: {task:
        {"exact_match", "rouge_l", "examples", "category", "instruction"}}}, "examples", "seconds"}; scores in
        percent; seconds of generating, summed over ranks and over restarts.

    Raises:
        UserError: a group has no examples, or the folder cannot be written.
    """
    settings = GenerationSettings(config.batch_examples, max_new_tokens, config.beams)
    metrics: dict[str, Any] = {}
    per_task: dict[str, Any] = {}
    examples, seconds = 0, 0.0
    for group, all_tasks in groups.items():
        tasks = [dataclasses.replace(task, examples=task.examples[: config.max_instances]) for task in all_tasks]
        if not any(task.examples for task in tasks):
            raise UserError(f"group {group} has no examples", "name another split file under evaluation.groups")
        folder = run_dir / PREDICTIONS_FOLDER
        predictions = predict(model, tokenizer, tasks, collate, settings, folder, group, fingerprint)
        scores = score_tasks((found.task, found.prediction, found.references) for found in predictions)
        for task in tasks:
            if task.name in scores:
                scores[task.name] |= {"category": task.category, "instruction": task.definition}
        metrics[group], per_task[group] = average(scores), scores
        examples += len(predictions)
        seconds += sum(found.seconds for found in predictions)
    results: dict[str, Any] = {"method": method, "split": split, "metrics": metrics, "per_task": per_task}
    results |= {"examples": examples, "seconds": seconds, **(extra or {})}
    if distributed.is_main():
        write_json(run_dir / RESULTS_FILE, results)
    return results


def read_methods(study_dir: Path) -> dict[str, dict[str, Any]]:
    """The results files under ``<study_dir>/evaluate/<method>`` by method, in the order of their names.

    Raises:
        UserError: one of them is not JSON.
    """
    return {path.parent.name: read_json(path) for path in sorted((study_dir / "evaluate").glob(f"*/{RESULTS_FILE}"))}


def gather_results(study_dir: Path) -> dict[str, Any]:
    """A study's results out of its parts: {"methods": {method: {group: scores}}, "steps", "seconds"} by stage."""
    methods = {name: result["metrics"] for name, result in read_methods(study_dir).items()}
    summaries = stage_summaries(study_dir)
    return {
        "methods": methods,
        "steps": {stage: summary["steps"] for stage, summary in summaries.items() if "steps" in summary},
        "seconds": {stage: summary["seconds"] for stage, summary in summaries.items() if "seconds" in summary},
    }


def stage_folders(study_dir: Path) -> list[Path]:
    """The study's folders in the order of the stages, others behind by name."""
    folders = [path for path in study_dir.iterdir() if path.is_dir()] if study_dir.is_dir() else []
    order = {stage: index for index, stage in enumerate(STAGES)}
    return sorted(folders, key=lambda path: (order.get(path.name, len(order)), path.name))


def stage_summaries(study_dir: Path) -> dict[str, dict[str, Any]]:
    """What the stages that are done recorded about themselves."""
    return {folder.name: done_summary(folder) for folder in stage_folders(study_dir) if is_done(folder)}
