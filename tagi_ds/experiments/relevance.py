"""Which fields of a configuration can change what a stage leaves: two launches that agree in these are one.

Fields are named that do not matter, so a field that nobody thought of costs a launch more and never shares a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tagi_ds.config import RunConfig
from tagi_ds.recipe import SECTIONS, to_dict

CIRCUMSTANCES = (
    "study_dir",
    "output_dir",
    "scale",
    "profile",
    "data.index_dir",
    "data.workers",
    "engine.strategy",
    "engine.stages",
    "engine.deepspeed",
    "engine.nvme_path",
    "engine.accumulation",
    "engine.activation_checkpointing",
    "engine.instruction_cache",
    "engine.peak_tflops",
    "engine.deterministic",
    "engine.log_every",
    "engine.checkpoint_every",
    "engine.keep_checkpoints",
    "engine.timeout_s",
    "teachers.claim_timeout_s",
)
"""How a launch is run, and where; its outcome is the same."""
_CORPUS = ("data.c4_dir", "data.min_part_tokens", "data.document_tokens", "data.documents", "data.shuffle_block")
_HYPERNETWORK = (
    "model.method",
    "model.a",
    "model.bottleneck",
    "model.head",
    "model.pooling",
    "model.fusion",
    "model.fusion_norm",
    "model.fusion_start",
    "model.fusion_heads",
    "model.concatenate",
    "model.also_train",
)
_LORA = ("model.rank", "model.alpha", "model.sites")
_ORDER = (
    "data.tasks_per_batch",
    "data.examples_per_task",
    "data.weights",
    "data.sampling",
    "data.task_cap",
)
_TASKS = (
    "data.sni_dir",
    "data.p3_dir",
    "data.p3_templates",
    "data.p3_train",
    "data.p3_max_examples",
    "data.split",
    "data.train_split",
    "data.validation_split",
    "data.validation_tasks",
    "data.max_tasks",
    "data.label_noise",
    "data.max_instances",
    "data.prompt",
    "data.positives",
    "data.negatives",
    "data.explanations",
    "data.english_only",
    *_ORDER[2:],
)
_TEACHERS_TRAINING = (
    "teachers.max_units",
    "teachers.batched",
    "teachers.examples",
    "teachers.steps",
    "teachers.learning_rate",
    "teachers.validation_share",
    "teachers.min_gain",
    "teachers.patience",
    "teachers.look_every",
    "teachers.warm_start",
)
_DISTRIBUTIONS = (
    "teachers.logit_teacher",
    "teachers.demonstrations",
    "teachers.method",
    "teachers.top_k",
    "teachers.draws",
    "teachers.temperature",
    "teachers.store_dtype",
)
_REST = ("evaluation", "convert")

IRRELEVANT: dict[str, tuple[str, ...]] = {
    "backbone": ("model", "teachers", "loss", *_REST, *_CORPUS),
    "train_teachers": (
        *("optimizer", "engine", "loss", "scratch", *_REST, *_CORPUS, *_ORDER, *_DISTRIBUTIONS, *_HYPERNETWORK),
        # A LoRA teacher reads bare inputs.
        *("data.positives", "data.negatives", "data.explanations", "model.initial", "model.meta_lora"),
    ),
    "store_logits": (
        *("optimizer", "engine", "loss", "scratch", *_REST, *_CORPUS, *_ORDER, *_TEACHERS_TRAINING, *_HYPERNETWORK),
        *("teachers.train_a", *_LORA, "model.initial", "model.meta_lora"),
    ),
    "pretrain": ("loss", "teachers", "scratch", *_REST, *_TASKS, "model.meta_lora"),
    "finetune": ("scratch", *_REST, *_CORPUS, *_TEACHERS_TRAINING, "teachers.store_dtype", "model.meta_lora"),
    "meta_train": ("teachers", "loss", *_REST, *_CORPUS, *_HYPERNETWORK),
    "convert": ("seed", "model", "scratch", "data", "teachers", "loss", "optimizer", "engine", *_REST),
    "evaluate": ("teachers", "loss", "optimizer", "engine", "scratch", "convert", *_CORPUS, *_ORDER),
}
"""Stage -> fields, or whole sections, that do not matter to it."""

_KEPT = {
    "backbone": ("model.dropout",),
    "train_teachers": ("engine.precision",),
    "store_logits": ("engine.precision",),
}
"""Exceptions from whole sections."""


def matters(key: str, stage: str) -> bool:
    """Whether a field, by its dotted name, can change what the stage leaves."""
    if key in CIRCUMSTANCES:
        return False
    named = IRRELEVANT[stage]
    return key in _KEPT.get(stage, ()) or not (key in named or key.partition(".")[0] in named)


def goes_to(key: str, stage: str) -> bool:
    """Whether a launch is told of a field: it matters, or it says how the launch is run."""
    return key not in _OF_THE_STUDY and (matters(key, stage) or key in CIRCUMSTANCES)


_OF_THE_STUDY = ("seed", "scale", "study_dir", "output_dir", "data.index_dir")
"""What the plan itself gives every launch."""


def relevant_fields(config: RunConfig, stage: str) -> dict[str, Any]:
    """The fields of a resolved configuration that matter to a stage and are not at their default, by dotted name.

    A field that is new to the configuration leaves every identity as it was: earlier runs had what is its default.
    Beyond :data:`IRRELEVANT`: a run without teachers does not depend on their description, whole meta-training not on
    a LoRA's shape, training from a backbone not on the shape of one from random weights.
    """
    default, flat = _flat(RunConfig()), _flat(config)
    found = {key: value for key, value in flat.items() if matters(key, stage) and value != default[key]}
    return {key: value for key, value in found.items() if not _void(key, stage, config)}


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        flat |= {f"{name}.{inner}": leaf for inner, leaf in value.items()} if name in SECTIONS else {name: value}
    return flat


def _void(key: str, stage: str, config: RunConfig) -> bool:
    section = key.partition(".")[0]
    if stage == "finetune" and section == "teachers":
        return config.loss.kl == 0 and config.loss.alignment == 0
    if stage == "meta_train" and key in _LORA:
        return not config.model.meta_lora
    return stage == "meta_train" and section == "scratch" and config.model.initial != "scratch"


def unknown_names(fields: Mapping[str, Any]) -> set[str]:
    """Names in this module's tables that are no fields or sections (none, or a field was renamed)."""
    tables = (CIRCUMSTANCES, *IRRELEVANT.values(), *_KEPT.values())
    return {name for table in tables for name in table} - set(fields) - set(SECTIONS)
