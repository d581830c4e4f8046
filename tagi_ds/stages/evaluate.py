"""Evaluation: every method on every group of tasks, examples dealt over ranks; controls and costs beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.backbone_hash import share_hash
from tagi_ds.build import load_study_tokenizer, study_backbone
from tagi_ds.config import Control, DataConfig, RunConfig
from tagi_ds.data.catalogue import P3, EvaluatedGroup, evaluated_group, evaluation_groups, training_split
from tagi_ds.data.collate import Collator, Form
from tagi_ds.data.examples import Task
from tagi_ds.data.leaks import find_group_leaks, leak_counts
from tagi_ds.engine.distributed import barrier, main_first
from tagi_ds.engine.exhaustion import memory_told
from tagi_ds.errors import UserError
from tagi_ds.evaluation.adapter_map import MAP_FILE, write_adapter_map
from tagi_ds.evaluation.board import write_board
from tagi_ds.evaluation.comparison import compare
from tagi_ds.evaluation.controls import control_tasks
from tagi_ds.evaluation.cost import COST_FILE, cost_table, measured_cost
from tagi_ds.evaluation.dealing import collate_pairs
from tagi_ds.evaluation.generation import GenerationSettings
from tagi_ds.evaluation.metrics import SubwordTokens, scored_tokens
from tagi_ds.evaluation.predictions import key_of
from tagi_ds.evaluation.results import RESULTS_FILE, evaluate
from tagi_ds.files import read_json, write_json
from tagi_ds.launch import Stage
from tagi_ds.model.precision import DTYPES, Precision, require_room
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.stages.evaluated_models import (
    UNTRAINED,
    agreed_precision,
    load_method,
    memory_advice,
    precision_key,
    weight_folders,
)
from tagi_ds.stages.sharing import items_of_this_job, traces_of
from tagi_ds.study import MODELS
from tagi_ds.teachers.binding import data_binding

Groups = Mapping[str, Sequence[Task]]


def run(stage: Stage) -> dict[str, Any]:
    """Evaluates each method into ``<run_dir>/<method>/results.json``, together with the other jobs in the run folder.

    A job takes one method after the other, all of its ranks together.
    """
    config = stage.config
    tokenizer = load_study_tokenizer(config)
    tokens = scored_tokens(config.data.split, config.evaluation.tokenizer)
    found = evaluated_groups(config)
    groups = {name: group.tasks for name, group in found.items()}
    left_out = {name: group.left_out for name, group in found.items() if group.left_out}
    methods = config.evaluation.methods or study_methods(Path(config.study_dir))
    if not methods:
        raise UserError(
            f"there is nothing to evaluate: {config.study_dir} holds no converted model",
            "run launchers/convert.py first, or name a folder: --evaluation.methods '{tagi: FOLDER}'",
        )
    _require_folders(methods)
    binding = data_binding(config.data, [task for tasks in groups.values() for task in tasks], tokenizer)
    leaks = _leaks(config, groups) if stage.ranks.is_main else {}
    precision = agreed_precision(stage)
    for method, source in methods.items():
        require_room(f"{method} ({source})", weight_folders(config, source), precision, stage.ranks.device)
    evaluation = _Evaluation(stage, tokenizer, tokens, groups, left_out, binding, leaks, precision)
    items = {_item(config, method, source, precision): (method, source) for method, source in methods.items()}

    def is_there(item: str) -> bool:
        return (stage.run_dir / items[item][0] / RESULTS_FILE).is_file()

    for method, source in map(items.__getitem__, items_of_this_job(stage, list(items), is_there)):
        with memory_told(f"evaluate, {method} in {precision}", config.engine, memory_advice(config, precision)):
            for folder in weight_folders(config, source):
                share_hash(folder)
            model, identity = load_method(config, source, method, tokenizer, DTYPES[precision])
            model.to(stage.ranks.device)
            rows = evaluation.rows(model, identity, method)
            # An untrained hypernetwork costs what a trained one does, and its updates are zero.
            evaluation.complete(model, identity, method, rows, trained=source != UNTRAINED)
    for _ in items_of_this_job(stage, [f"board-{key_of(list(items))}"], lambda _: True):
        main_first(lambda: write_board(stage.run_dir))
    names = [row_name(method, control) for method in methods for control in (None, *config.evaluation.controls)]
    return {"metrics": {name: read_json(stage.run_dir / name / RESULTS_FILE)["metrics"] for name in names}, "flops": 0}


def row_name(method: str, control: Control | None) -> str:
    """Of a method's results under its tasks' own instructions, or under a control's."""
    return method if control is None else f"{method} ({control} instruction)"


def _item(config: RunConfig, method: str, source: str, precision: Precision) -> str:
    """A method in the list of work; another model in the same place is other work, and another precision too."""
    folder = study_backbone(config) if source == UNTRAINED else Path(source)
    return f"{method}-{key_of(source, traces_of(folder), *precision_key(precision).values())}"


@dataclass(frozen=True)
class _Evaluation:
    """What all methods are evaluated on.

    Attributes:
        tokens: what ROUGE-L compares on the cross-lingual track.
        groups: group -> tasks with the examples that count.
        left_out: group -> what these are without, for the results files.
        binding: what answers depend on beside the model.
        leaks: for the results files.
        precision: in which they all answer.
    """

    stage: Stage
    tokenizer: PreTrainedTokenizerBase
    tokens: SubwordTokens | None
    groups: Groups
    left_out: Mapping[str, Any]
    binding: Mapping[str, Any]
    leaks: Mapping[str, Any]
    precision: Precision

    def rows(self, model: PreTrainedModel, identity: str, method: str) -> dict[str, dict[str, Any]]:
        """The method's results under its tasks' own instructions and under each control, by the rows' names."""
        config = self.stage.config
        collator = Collator(self.tokenizer, config.data, _form(model))

        def encode_choice(text: str) -> np.ndarray:
            return collator.encode(text, "target")

        rows: dict[str, dict[str, Any]] = {}
        for control in (None, *config.evaluation.controls):
            name = row_name(method, control)
            rows[name] = evaluate(
                model,
                self.tokenizer,
                self.groups if control is None else _controlled(self.groups, control, config.seed),
                collate_pairs(collator),
                config.evaluation,
                config.data.max_target_tokens,
                self.stage.run_dir / name,
                name,
                config.data.split,
                self.fingerprint(identity),
                {
                    "setting": setting_name(config.data),
                    "instruction": control or "own",
                    "leaks": self.leaks,
                    **({"left_out": self.left_out} if self.left_out else {}),
                    "model": identity,
                    "form": _form(model),
                    "precision": self.precision,
                },
                encode_choice,
                self.tokens,
                [group for group, spec in evaluation_groups(config).items() if spec == f"{P3}mtest11"],
            )
            self.stage.say(f"{name}: {_line(rows[name]['metrics'])}")
            for group, lacking in rows[name].get("missing", {}).items():
                if lacking and control is None:
                    self.stage.say(f"{group} lacks {', '.join(lacking)}: its average is not the published one")
            barrier()
        return rows

    def complete(
        self, model: PreTrainedModel, identity: str, method: str, rows: Mapping[str, dict[str, Any]], trained: bool
    ) -> None:
        """Adds to a method's results file what its controls tell and, of a trained TAGI model, what its answers cost.

        Of the latter a map of the generated adapters is written beside.
        """
        stage, results, folder = self.stage, rows[method], self.stage.run_dir / method
        controls = {other["instruction"]: _against(results, other) for name, other in rows.items() if name != method}
        if controls:
            results["controls"] = controls
        trained_tagi = trained and _form(model) == "hypernetwork"
        if trained_tagi:
            main_first(lambda: self._map(model, identity, folder / MAP_FILE))
        if trained_tagi and stage.config.evaluation.cost_tasks:
            # One process alone, so that no other takes its time; on one rank as on many.
            main_first(lambda: self._measure(model, identity, folder / COST_FILE))
            results |= {name: read_json(folder / COST_FILE)[name] for name in ("flops", "cost")}
            if stage.ranks.is_main:
                Console(width=120).print(cost_table(results))
        if stage.ranks.is_main:
            write_json(folder / RESULTS_FILE, results)
        barrier()

    def fingerprint(self, identity: str) -> dict[str, Any]:
        """All that the answers of a model depend on, beside instruction and input."""
        beams = self.stage.config.evaluation.beams
        return {**self.binding, "model": identity, "beams": beams, **precision_key(self.precision)}

    def _map(self, model: Any, identity: str, path: Path) -> None:
        tasks = {group: [task.name for task in tasks] for group, tasks in self.groups.items()}
        collate = collate_pairs(Collator(self.tokenizer, self.stage.config.data, "hypernetwork"))
        write_adapter_map(model, self.groups, collate, path, key_of(self.fingerprint(identity), tasks))

    def _measure(self, model: Any, identity: str, path: Path) -> None:
        settings, data = self.stage.config.evaluation, self.stage.config.data
        collators = (
            Collator(self.tokenizer, data, "hypernetwork"),
            Collator(self.tokenizer, data, "concatenated"),
        )
        generation = GenerationSettings(settings.batch_examples, data.max_target_tokens, settings.beams)
        key = key_of(self.fingerprint(identity), settings.cost_tasks, settings.batch_examples, list(self.groups))
        measured_cost(model, self.groups, collators, generation, settings.cost_tasks, path, key)


def evaluated_groups(config: RunConfig) -> dict[str, EvaluatedGroup]:
    """Group -> its tasks with the instances that are tested, `evaluation.max_instances` of each at the most.

    Raises:
        UserError: as :func:`tagi_ds.data.catalogue.evaluated_group`.
    """
    most = config.evaluation.max_instances
    return {name: evaluated_group(config.data, spec, most) for name, spec in evaluation_groups(config).items()}


def setting_name(data: DataConfig) -> str:
    """The prompt's setting as the benchmark's tables call it: `Def`, `Def + 2 Pos`, `Def + 2 Pos + 1 Neg + Expl`.

    The plain prompt shows no examples, however many the configuration names.
    """
    if data.prompt == "plain":
        return "Def"
    parts = ["Def"]
    parts += [f"{count} {kind}" for count, kind in ((data.positives, "Pos"), (data.negatives, "Neg")) if count]
    return " + ".join([*parts, "Expl"] if data.explanations and len(parts) > 1 else parts)


def study_methods(study_dir: Path) -> dict[str, str]:
    """What a study offers for evaluation: its backbone, its baseline, its TAGI model, and an untrained hypernetwork."""
    folders = {name: study_dir / stage / "model" for name, stage in MODELS.items()}
    found = {name: str(folder) for name, folder in folders.items() if (folder / "config.json").is_file()}
    return {UNTRAINED: UNTRAINED, **found} if found else {}


def _against(own: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    """What a control's results file says beside the method's own: group -> metric -> score and difference."""
    return {
        group: {
            metric: {
                "score": found["second"],
                **{name: value for name, value in found.items() if name not in ("first", "second")},
            }
            for metric, found in metrics.items()
        }
        for group, metrics in compare(own, control).items()
    }


def _controlled(groups: Groups, control: Control, seed: int) -> dict[str, list[Task]]:
    return {name: control_tasks(tasks, control, seed) for name, tasks in groups.items()}


def _leaks(config: RunConfig, groups: Groups) -> dict[str, Any]:
    """What each group shares with the training tasks, in numbers; or why that is unknown."""
    try:
        train, _ = training_split(config.data, config.seed)
    except UserError as error:
        # Test tasks can be had without the training tasks, and a model from elsewhere was trained on others.
        return {"unknown": error.problem}
    return leak_counts(find_group_leaks(train, groups))


def _require_folders(methods: dict[str, str]) -> None:
    for method, source in methods.items():
        if source != UNTRAINED and not (Path(source) / "config.json").is_file():
            raise UserError(
                f"evaluation.methods: {method} names {source}, which is no model folder",
                "convert the run first (launchers/convert.py --convert.run RUN_FOLDER), or mend the path",
            )


def _form(model: PreTrainedModel) -> Form:
    return "hypernetwork" if isinstance(model, TagiForConditionalGeneration) else "concatenated"


def _line(metrics: Mapping[str, Mapping[str, float]]) -> str:
    names = {"exact_match": "exact", "rouge_l": "ROUGE-L", "accuracy": "accuracy", "accuracy_unnormalised": "by sum"}
    return ", ".join(
        f"{group} " + " / ".join(f"{score:.1f} {names[metric]}" for metric, score in scores.items())
        for group, scores in metrics.items()
    )
