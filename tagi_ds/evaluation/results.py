"""The results file of one evaluated method, and how several become a study's.

``<study>/evaluate/<method>/results.json``; scores are percentages, a group is a name of ``evaluation.groups``::

    method, split      names; the method's is its folder's
    setting            "Def", "Def + 2 Pos", ...: the demonstrations in the instruction
    instruction        "own", or of a control ("<method> (random instruction)") "random" or "shuffled"
    model              the model's content hash, by which a model card finds its scores
    form               "hypernetwork", or "concatenated" of a model that reads the instruction with every input
    metrics            group -> {"exact_match", "rouge_l"}: means over examples; where all examples have answer choices
                       group -> {"accuracy", "accuracy_unnormalised"}: means over templates, then over data sets.
                       MTest11 has a further group "<group>_hypert5", HyperT5's subset
    per_category       group -> category -> {the metrics, "tasks", "examples"}
    per_task           group -> task -> {the metrics, "examples", "category", "source", "instruction"}
    per_dataset        group -> data set -> {the accuracies, "median", "q1", "q3", "min", "max" over templates,
                       "templates", "examples"}; ranked groups alone ("anli" of HyperT5's subset has the accuracies)
    missing            group -> data sets of MTest11 that were not there; without them averages are not comparable
    left_out           group -> what its scores are without, as far as there is any: {"malformed": {task: rows and files
                       that cannot be read}, "gone": tasks of which nothing can be read, "other_languages": tasks,
                       "cut": {template of P3: rows that there are, where evaluation.max_instances counts fewer}}
    empty              group -> answers without any text
    intervals          group -> metric -> [low, high]: 95 %, bootstrap over tasks (of ranked groups over data sets)
    controls           control -> group -> metric -> {"score", "difference": own - control, "interval", "p_value",
                       "tasks", "test"}; what `evaluation.controls` asked for
    leaks              what the groups share with the training tasks
    examples           number of answers
    flops              group -> operations counted, see :mod:`tagi_ds.evaluation.cost`; TAGI models alone
    cost               group -> seconds and memory measured beside them

Everything but ``cost`` is the same for any number of ranks and after any interruption, byte by byte. Beside it:
``predictions/<group>.jsonl`` (answers with inputs and references), ``predictions/<group>.timing.json`` (seconds), and
``leaderboard/<group>.jsonl`` ({"id", "prediction"} a line) of groups that are answered freely. Of a trained TAGI model
``adapters_map.json`` beside them has its adapters' likeness, see :mod:`tagi_ds.evaluation.adapter_map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tagi_ds.config import STAGES, EvaluationConfig
from tagi_ds.data.examples import Task
from tagi_ds.engine import distributed
from tagi_ds.errors import UserError
from tagi_ds.evaluation import accuracy, leaderboard
from tagi_ds.evaluation.comparison import intervals_of
from tagi_ds.evaluation.dealing import Collate
from tagi_ds.evaluation.generation import GenerationSettings, predict
from tagi_ds.evaluation.metrics import METRICS, SubwordTokens, average, average_categories, score_tasks
from tagi_ds.evaluation.predictions import Prediction
from tagi_ds.evaluation.ranking import Encode, has_choices, rank
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
    encode_choice: Encode | None = None,
    tokens: SubwordTokens | None = None,
    mtest11: Collection[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a model on groups of tasks and writes ``run_dir/results.json``; every rank must call it.

    Of each task the first `config.max_instances` examples count, as in the published evaluation.

    Args:
        model, tokenizer, collate, fingerprint, progress: see :func:`tagi_ds.evaluation.generation.predict`.
        groups: group name -> its tasks.
        config: batch size, instances, beams.
        max_new_tokens: longest answer, in tokens.
        run_dir: the evaluation's run folder.
        method, split: names for the results file.
        extra: further entries of the results file (leaks, setting, instruction).
        encode_choice: makes labels of answer choices; None: every group is answered freely.
        tokens: what ROUGE-L compares on the cross-lingual track.
        mtest11: those groups that are MTest11.

    Returns:
        The content of the results file, as described above.

    Raises:
        UserError: a group or a task has no examples, an example no reference, or the folder cannot be written.
    """
    settings = GenerationSettings(config.batch_examples, max_new_tokens, config.beams)
    results: dict[str, Any] = {"method": method, "split": split}
    for group, all_tasks in groups.items():
        tasks = first_examples(all_tasks, config.max_instances)
        require_examples(group, tasks)
        given = (settings, run_dir / PREDICTIONS_FOLDER, group, fingerprint, progress)
        if encode_choice is not None and has_choices(tasks):
            ranked = rank(model, tasks, collate, encode_choice, *given)
            add_ranked(results, group, tasks, ranked, group in mtest11)
            continue
        predictions = predict(model, tokenizer, tasks, collate, *given)
        add_answered(results, group, tasks, predictions, tokens)
        if distributed.is_main():
            leaderboard.write_leaderboard(run_dir / leaderboard.FOLDER / f"{group}.jsonl", predictions)
    results["intervals"] = intervals_of(results)
    results |= extra or {}
    if distributed.is_main():
        write_json(run_dir / RESULTS_FILE, results)
    return results


def first_examples(tasks: Sequence[Task], most: int) -> list[Task]:
    """The tasks with their first `most` examples."""
    return [dataclasses.replace(task, examples=task.examples[:most]) for task in tasks]


def require_examples(group: str, tasks: Sequence[Task]) -> None:
    """Refuses what cannot be scored.

    Raises:
        UserError: a group or a task without examples, or an example without a reference.
    """
    if not tasks:
        raise UserError(f"group {group} has no tasks", "name another split file under evaluation.groups")
    for task in tasks:
        if not task.examples:
            raise UserError(
                f"task {task.name} of group {group} has no instances",
                "take it out of the split file, or fetch its data again",
            )
        for example in task.examples:
            if not example.references:
                raise UserError(
                    f"instance {example.id} of task {task.name} has no reference",
                    "an answer cannot be scored without one: mend the task file, or leave the instance out",
                )


def add_answered(
    results: dict[str, Any],
    group: str,
    tasks: Sequence[Task],
    predictions: Sequence[Prediction],
    tokens: SubwordTokens | None = None,
) -> None:
    """Adds the scores of freely answered examples to a results file's content."""
    scores = score_tasks(((found.task, found.prediction, found.references) for found in predictions), tokens)
    _add(results, group, tasks, scores, predictions, METRICS)
    _entry(results, "metrics")[group] = average(scores)


def add_ranked(
    results: dict[str, Any], group: str, tasks: Sequence[Task], predictions: Sequence[Prediction], is_mtest11: bool
) -> None:
    """Adds the scores of ranked examples to a results file's content, for MTest11 with HyperT5's subset."""
    scores = accuracy.score_templates(predictions)
    _add(results, group, tasks, scores, predictions, accuracy.ACCURACIES)
    per_dataset = accuracy.score_datasets(scores)
    parts = {group: per_dataset}
    if is_mtest11:
        parts[f"{group}_{accuracy.HYPERT5}"] = accuracy.hypert5_datasets(per_dataset)
        lacking = [name for name in accuracy.MTEST11_NAMES if name not in per_dataset]
        _entry(results, "missing")[group] = lacking
    for name, datasets in parts.items():
        if datasets:
            _entry(results, "per_dataset")[name] = datasets
            _entry(results, "metrics")[name] = accuracy.average_datasets(datasets)


def _add(
    results: dict[str, Any],
    group: str,
    tasks: Sequence[Task],
    scores: dict[str, dict[str, Any]],
    predictions: Sequence[Prediction],
    metrics: Sequence[str],
) -> None:
    for task in tasks:
        scores[task.name] |= {"category": task.category, "source": task.source, "instruction": task.definition}
    _entry(results, "per_task")[group] = scores
    _entry(results, "per_category")[group] = average_categories(scores, metrics)
    _entry(results, "empty")[group] = sum(not found.prediction.strip() for found in predictions)
    results["examples"] = results.get("examples", 0) + len(predictions)


def _entry(results: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = results.setdefault(name, {})
    return entry


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
