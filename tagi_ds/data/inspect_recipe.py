"""A recipe's data inspected for one stage, through the very objects that the stage would build."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tagi_ds.build import load_study_tokenizer
from tagi_ds.config import RunConfig
from tagi_ds.data import catalogue, sni
from tagi_ds.data.c4 import DocumentMixture
from tagi_ds.data.collate import Collator, Form
from tagi_ds.data.corpus import shards_of
from tagi_ds.data.examples import Task
from tagi_ds.data.inspection import (
    PartLengths,
    measure_batches,
    rendered_examples,
    sample_examples,
    task_set_figures,
    text_lengths,
)
from tagi_ds.data.leaks import find_group_leaks
from tagi_ds.errors import UserError
from tagi_ds.launch import Stage
from tagi_ds.stages.training import task_source

STAGES = ("pretrain", "finetune", "meta_train", "backbone", "train_teachers")
"""Stages that read batches."""
_FORMS: dict[str, Form] = {"meta_train": "concatenated", "backbone": "concatenated", "train_teachers": "input_only"}


@dataclass(frozen=True)
class Options:
    """How much is looked at.

    Attributes:
        sample: examples whose lengths are measured, and about as many in batches.
        ranks: processes that share the global batch; the first one's batches are measured.
        shown: examples that are shown.
    """

    sample: int = 2000
    ranks: int = 1
    shown: int = 3


def inspect_recipe(config: RunConfig, stage: str, options: Options) -> dict[str, Any]:
    """Everything that is known of a stage's data before it runs, as JSON-able values.

    Args:
        config: resolved for the stage, its data folders named.
        stage: one of STAGES.
        options: how much is looked at.

    Raises:
        UserError: as the stage would.
    """
    # What one process does alone is measured; the order is the same with any number of workers.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    found = _documents(config, options) if stage == "pretrain" else _tasks(config, stage, options)
    batch = {"tasks": config.data.tasks_per_batch, "examples_per_task": config.data.examples_per_task}
    return {"stage": stage, "seed": config.seed, "global_batch": batch, "ranks": options.ranks, **found}


def _tasks(config: RunConfig, stage: str, options: Options) -> dict[str, Any]:
    data, seed = config.data, config.seed
    tokenizer = load_study_tokenizer(config)
    indexes = catalogue.prepare_index(config)
    train, validation = catalogue.training_split(data, seed)
    groups, notes = _groups(config)
    form = _FORMS.get(stage, "hypernetwork")
    pairs = sample_examples(train, options.sample, seed)
    total = sum(len(task.examples) for task in train)
    source = task_source(_stage(config, stage, options.ranks), train, Collator(tokenizer, data, form))
    a_batch = data.tasks_per_batch * data.examples_per_task
    figures, first = measure_batches(source, max(1, -(-min(options.sample, total) // a_batch)))
    sets = {"train": train, "validation": validation, **groups}
    leaks = find_group_leaks(train, {name: tasks for name, tasks in sets.items() if name != "train" and tasks})
    return {
        "form": form,
        "sets": {name: dataclasses.asdict(task_set_figures(tasks)) for name, tasks in sets.items()},
        "left_out": _left_out(config, indexes),
        "notes": notes,
        "sampled": {"examples": len(pairs), "of": total},
        "lengths": {
            kind: dataclasses.asdict(lengths)
            for kind, lengths in text_lengths(pairs, tokenizer, data, form, seed).items()
        },
        "batches": figures.to_dict(),
        "examples": _shown(first, tokenizer, options),
        "leaks": {name: dataclasses.asdict(found) for name, found in leaks.items()},
    }


def _documents(config: RunConfig, options: Options) -> dict[str, Any]:
    data = config.data
    assert data.c4_dir is not None
    tokenizer = load_study_tokenizer(config)
    shards = shards_of(data.c4_dir)
    source = DocumentMixture(data.c4_dir, tokenizer, data, config.seed, 0, options.ranks, config.engine.accumulation)
    parts = PartLengths()
    figures, first = measure_batches(source, max(1, -(-options.sample // data.tasks_per_batch)), parts.add)
    return {
        "form": "hypernetwork",
        "shards": {"files": len(shards), "bytes": sum(shard.size for shard in shards)},
        "notes": [f"documents beyond {data.document_tokens} tokens: {data.documents}"],
        "sampled": {"examples": figures.examples, "of": None},
        "lengths": {kind: dataclasses.asdict(lengths) for kind, lengths in parts.figures(data).items()},
        "batches": figures.to_dict(),
        "examples": _shown(first, tokenizer, options),
    }


def _groups(config: RunConfig) -> tuple[dict[str, list[Task]], list[str]]:
    """The test tasks that the recipe names and that are there; what is missing is a note, not this stage's error."""
    groups, notes = {}, []
    for name, spec in catalogue.evaluation_groups(config).items():
        try:
            groups[name] = catalogue.evaluated_group(config.data, spec, config.evaluation.max_instances).tasks
        except UserError as error:
            notes.append(f"group {name}: {error.problem}")
    return groups, notes


def _left_out(config: RunConfig, indexes: Sequence[Any]) -> dict[str, Any]:
    """Tasks of the training split in other languages, and what is malformed in every index."""
    languages: Counter[str] = Counter()
    rows = files = 0
    for index in indexes:
        records = [index.record(name) for name in index.names]
        rows += sum(record.malformed for record in records if not record.is_broken)
        files += sum(record.is_broken for record in records)
        if index.facts.get("collection") == "sni" and config.data.english_only:
            for name in sni.selection(index, config.data.split, config.data.train_split):
                spoken = index.record(name).languages if name in index else ()
                if not sni.is_english(spoken):
                    languages[" to ".join(dict.fromkeys(spoken))] += 1
    return {"languages": dict(languages.most_common()), "malformed_rows": rows, "malformed_files": files}


def _stage(config: RunConfig, name: str, ranks: int) -> Stage:
    """The stage as its first rank would see it."""
    first: Any = SimpleNamespace(rank=0, world_size=ranks, is_main=True)
    return Stage(name, config, first, Path(config.output_dir or "."))


def _shown(batches: Any, tokenizer: PreTrainedTokenizerBase, options: Options) -> list[dict[str, Any]]:
    return [dataclasses.asdict(found) for found in rendered_examples(batches, tokenizer, options.shown)]
