"""Evaluation: every method on every group of tasks, examples dealt over ranks; controls and costs beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.build import build_tagi, load_study_tokenizer, study_backbone
from tagi_ds.config import Control, DataConfig, RunConfig
from tagi_ds.data.catalogue import P3, evaluated_tasks, evaluation_groups, training_split
from tagi_ds.data.collate import Collator, Form
from tagi_ds.data.examples import Task
from tagi_ds.data.leaks import find_group_leaks, leak_counts
from tagi_ds.engine.distributed import barrier, main_first
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
from tagi_ds.model.backbone import content_hash, load_backbone
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.stages.sharing import items_of_this_job, traces_of
from tagi_ds.study import MODELS
from tagi_ds.teachers.binding import data_binding

UNTRAINED = "untrained"
"""In the place of a folder: a new hypernetwork on the study's backbone."""

Groups = Mapping[str, Sequence[Task]]


def run(stage: Stage) -> dict[str, Any]:
    """Evaluates each method into ``<run_dir>/<method>/results.json``, together with the other jobs in the run folder.

    A job takes one method after the other, all of its ranks together.
    """
    config = stage.config
    tokenizer = load_study_tokenizer(config)
    tokens = scored_tokens(config.data.split, config.evaluation.tokenizer)
    groups = evaluation_tasks(config)
    methods = config.evaluation.methods or study_methods(Path(config.study_dir))
    if not methods:
        raise UserError(
            f"there is nothing to evaluate: {config.study_dir} holds no converted model",
            "run launchers/convert.py first, or name a folder: --evaluation.methods '{tagi: FOLDER}'",
        )
    _require_folders(methods)
    binding = data_binding(config.data, [task for tasks in groups.values() for task in tasks], tokenizer)
    leaks = _leaks(config, groups) if stage.ranks.is_main else {}
    evaluation = _Evaluation(stage, tokenizer, tokens, groups, binding, leaks)
    items = {_item(config, method, source): (method, source) for method, source in methods.items()}

    def is_there(item: str) -> bool:
        return (stage.run_dir / items[item][0] / RESULTS_FILE).is_file()

    for method, source in map(items.__getitem__, items_of_this_job(stage, list(items), is_there)):
        model, identity = _load(config, source, method, tokenizer)
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


def _item(config: RunConfig, method: str, source: str) -> str:
    """A method in the list of work; another model in the same place is other work."""
    folder = study_backbone(config) if source == UNTRAINED else Path(source)
    return f"{method}-{key_of(source, traces_of(folder))}"


@dataclass(frozen=True)
class _Evaluation:
    """What all methods are evaluated on.

    Attributes:
        tokens: what ROUGE-L compares on the cross-lingual track.
        groups: group -> tasks with the examples that count.
        binding: what answers depend on beside the model.
        leaks: for the results files.
    """

    stage: Stage
    tokenizer: PreTrainedTokenizerBase
    tokens: SubwordTokens | None
    groups: Groups
    binding: Mapping[str, Any]
    leaks: Mapping[str, Any]

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
                    "model": identity,
                    "form": _form(model),
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
        return {**self.binding, "model": identity, "beams": self.stage.config.evaluation.beams}

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


def evaluation_tasks(config: RunConfig) -> dict[str, list[Task]]:
    """Group -> its tasks with the instances that are tested, `evaluation.max_instances` of each at the most.

    Raises:
        UserError: as :func:`tagi_ds.data.catalogue.evaluated_tasks`.
    """
    most = config.evaluation.max_instances
    return {name: evaluated_tasks(config.data, spec, most) for name, spec in evaluation_groups(config).items()}


def setting_name(data: DataConfig) -> str:
    """The prompt's setting as the benchmark's tables call it: `Def`, `Def + 2 Pos`, `Def + 2 Pos + 1 Neg + Expl`."""
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


def _load(
    config: RunConfig, source: str, method: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, str]:
    """A model in evaluation mode, and what identifies it.

    Raises:
        UserError: it is of another backbone than the study's, or does not fit the study's tokenizer.
    """
    if source == UNTRAINED:
        config.model.initial = None
        model: PreTrainedModel = build_tagi(config)
        identity = f"{UNTRAINED} {config.seed} {model.config.backbone_hash}"
    elif (settings := read_json(Path(source) / "config.json")).get("model_type") == "tagi":
        named = config.model.backbone
        # A folder of the hypernetwork alone says where its backbone lay when it was trained; the run knows better.
        elsewhere = {"backbone": named} if settings.get("backbone_apart") and named is not None else {}
        model = TagiForConditionalGeneration.from_pretrained(source, **elsewhere)
        identity = content_hash(Path(source))
        _require_backbone(config, model, method, source)
    else:
        model = load_backbone(Path(source))
        identity = content_hash(Path(source))
    embeddings: Any = model.get_input_embeddings()
    pieces = embeddings.num_embeddings
    if pieces < len(tokenizer):
        raise UserError(
            f"{method} ({source}) knows {pieces} pieces, but the study's tokenizer has {len(tokenizer)}",
            "its backbone is another one: name it as --model.backbone, or evaluate it in its own study",
        )
    return model.eval(), identity


def _require_backbone(config: RunConfig, model: Any, method: str, source: str) -> None:
    try:
        backbone = study_backbone(config)
    except UserError:
        # A model folder brings all that it needs; only a backbone that is there can be the wrong one.
        return
    if model.config.backbone_hash and model.config.backbone_hash != content_hash(backbone):
        raise UserError(
            f"{method} ({source}) was trained on another backbone than {backbone}",
            "name its own as --model.backbone, or evaluate it in its own study",
        )


def _line(metrics: Mapping[str, Mapping[str, float]]) -> str:
    names = {"exact_match": "exact", "rouge_l": "ROUGE-L", "accuracy": "accuracy", "accuracy_unnormalised": "by sum"}
    return ", ".join(
        f"{group} " + " / ".join(f"{score:.1f} {names[metric]}" for metric, score in scores.items())
        for group, scores in metrics.items()
    )
