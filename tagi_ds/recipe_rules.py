"""What a configuration's values must satisfy, each by itself and together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.evaluation.metrics import XLINGUAL
from tagi_ds.methods import METHODS

SITES = ("q", "k", "v", "o", "wi", "wo")
"""Linears that may be adapted."""

COLLECTIONS = ("sni", "p3")
"""Collections of tasks that may be mixed."""

MOST_DRAWS = 65_535
"""Draws a target token of a logit store."""

_POSITIVE = (
    "model.rank",
    "model.alpha",
    "model.bottleneck",
    "model.fusion_heads",
    "scratch.d_model",
    "scratch.d_ff",
    "scratch.layers",
    "scratch.heads",
    "scratch.vocabulary",
    "data.max_tasks",
    "data.max_instances",
    "data.max_source_tokens",
    "data.max_target_tokens",
    "data.tasks_per_batch",
    "data.examples_per_task",
    "data.min_part_tokens",
    "data.document_tokens",
    "data.shuffle_block",
    "data.pad_multiple",
    "data.p3_max_examples",
    "data.task_cap",
    "teachers.max_units",
    "teachers.batched",
    "teachers.examples",
    "teachers.steps",
    "teachers.learning_rate",
    "teachers.top_k",
    "teachers.draws",
    "teachers.claim_timeout_s",
    "teachers.temperature",
    "optimizer.learning_rate",
    "engine.steps",
    "engine.epochs",
    "engine.stages",
    "engine.accumulation",
    "engine.peak_tflops",
    "engine.log_every",
    "engine.keep_checkpoints",
    "engine.timeout_s",
    "engine.nonfinite_limit",
    "evaluation.batch_examples",
    "evaluation.max_instances",
    "evaluation.beams",
    "convert.shard_gb",
)
_NOT_NEGATIVE = (
    "seed",
    "data.validation_tasks",
    "data.positives",
    "data.negatives",
    "data.workers",
    "teachers.patience",
    "teachers.look_every",
    "teachers.demonstrations",
    "loss.label",
    "loss.kl",
    "optimizer.weight_decay",
    "optimizer.clip",
    "engine.evaluate_every",
    "engine.checkpoint_every",
    "evaluation.cost_tasks",
)
_SHARES = ("model.dropout", "teachers.validation_share", "data.label_noise")


def check(config: RunConfig, stage: str) -> None:
    """Checks a resolved configuration for the launched stage.

    Raises:
        UserError: the first value, or pair of values, that makes no sense.
    """
    for problem, mend in (*_single(config), *_together(config), *_for_stage(config, stage)):
        raise UserError(problem, mend)


def _value(config: RunConfig, key: str) -> float | None:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


def _single(config: RunConfig) -> Iterator[tuple[str, str]]:
    for key in _POSITIVE:
        value = _value(config, key)
        # Written as "not above" so that NaN is refused too.
        if value is not None and not value > 0:
            yield f"{key} is {value}", "give a number above 0"
    for key in _NOT_NEGATIVE:
        value = _value(config, key)
        if value is not None and not value >= 0:
            yield f"{key} is {value}", "give 0 or a number above 0"
    for key in _SHARES:
        value = _value(config, key)
        if value is not None and not 0 <= value < 1:
            yield f"{key} is {value}", "give a share from 0 up to, but without, 1"
    if not 0 <= config.optimizer.warmup <= 1:
        yield f"optimizer.warmup is {config.optimizer.warmup}", "give the share of the steps, from 0 to 1"
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        yield f"optimizer.betas are {list(config.optimizer.betas)}", "give two numbers from 0 up to, but without, 1"
    sites = config.model.sites
    if len(set(sites)) < len(sites) or not set(sites) <= set(SITES):
        yield f"model.sites is {sites}", f"name each of {', '.join(SITES)} once at most; [] is fusion alone"
    alignment = config.loss.alignment
    if not isinstance(alignment, str) and not alignment >= 0:
        yield f"loss.alignment is {alignment}", "give 0, a number above 0, or sigmoid"
    for group in config.evaluation.groups or {}:
        if not group or group.startswith(".") or "/" in group:
            yield (
                f"evaluation.groups has a group named {group!r}",
                "use a name that can be a file's: letters, digits, _",
            )
    controls = config.evaluation.controls
    if len(set(controls)) < len(controls):
        yield f"evaluation.controls is {controls}", "name each of random and shuffled once at the most"
    for source, weight in (config.data.weights or {}).items():
        if source not in COLLECTIONS or not weight > 0:
            yield f"data.weights gives {source!r} {weight}", f"give {' and '.join(COLLECTIONS)} a number above 0 each"
    if config.evaluation.groups == {}:
        yield "evaluation.groups is empty", 'name groups as {"test": "test_tasks"}, or leave the field out'


def _together(config: RunConfig) -> Iterator[tuple[str, str]]:
    data, model, engine = config.data, config.model, config.engine
    if data.document_tokens < 3 * data.min_part_tokens:
        yield (
            f"data.document_tokens {data.document_tokens} cannot hold three parts of "
            f"data.min_part_tokens {data.min_part_tokens}",
            "raise data.document_tokens or lower data.min_part_tokens",
        )
    if data.prompt == "plain" and (data.positives or data.negatives):
        yield (
            f"data.positives {data.positives} and data.negatives {data.negatives} with data.prompt plain, which has no "
            "examples",
            "set data.prompt tk_instruct, or leave the examples out",
        )
    if data.task_cap is not None and data.sampling != "size":
        yield (
            f"data.task_cap {data.task_cap} with data.sampling {data.sampling}, which does not ask how large a task is",
            "set data.sampling size, or leave data.task_cap out",
        )
    if data.split == XLINGUAL and data.english_only:
        yield (
            f"data.split {XLINGUAL} with data.english_only true: its test tasks are in other languages, and those that "
            "it trains on would be left out",
            "set data.english_only false",
        )
    if config.optimizer.name == "adafactor" and engine.strategy != "single":
        yield (
            f"optimizer.name adafactor with engine.strategy {engine.strategy}: ZeRO flattens what it factors",
            "set optimizer.name adamw, or engine.strategy single",
        )
    if engine.stages > 1 and engine.strategy != "pipeline":
        yield (
            f"engine.stages {engine.stages} with engine.strategy {engine.strategy}, which has no stages",
            "set engine.strategy pipeline, or leave engine.stages out",
        )
    if engine.strategy == "pipeline" and model.also_train != "nothing":
        yield (
            f"model.also_train {model.also_train} with engine.strategy pipeline: instructions are encoded without "
            "gradients, and the embeddings lie on several stages",
            "set model.also_train nothing, or engine.strategy zero2 or zero3",
        )
    if engine.deepspeed is not None and not Path(engine.deepspeed).is_file():
        yield f"engine.deepspeed: {engine.deepspeed} is missing", "name a DeepSpeed JSON file, or leave the field out"
    shared_factors = model.a == "shared" and config.loss.alignment_form == "mse" and config.loss.alignment != 0
    if shared_factors and config.teachers.train_a:
        yield (
            "model.a shared with loss.alignment_form mse, but teachers.train_a true: B is comparable under one A only",
            "set teachers.train_a false, or loss.alignment_form product",
        )


def _for_stage(config: RunConfig, stage: str) -> Iterator[tuple[str, str]]:
    loss = config.loss
    if stage in ("backbone", "meta_train") and config.engine.strategy == "pipeline":
        yield (
            f"engine.strategy pipeline in {stage}, which trains an ordinary model whole",
            f"set stages.{stage}.engine.strategy zero2 or zero3; its engine.stages is then 1",
        )
    yield from _without_sites(config, stage)
    if stage == "meta_train" and config.model.meta_lora and config.model.initial == "scratch":
        yield (
            "model.meta_lora with model.initial scratch: a LoRA cannot teach random weights",
            "leave model.initial out, or set model.meta_lora false",
        )
    if config.teachers.draws > MOST_DRAWS:
        yield f"teachers.draws is {config.teachers.draws}", f"give at most {MOST_DRAWS}: counts are stored in two bytes"
    if stage == "pretrain" and config.engine.epochs is not None:
        yield (
            f"engine.epochs {config.engine.epochs} in pretraining: a stream of documents has no length",
            "give pretraining engine.steps, and move engine.epochs under stages.finetune.engine",
        )
    if stage == "pretrain" and config.engine.instruction_cache == "on":
        yield (
            "engine.instruction_cache on in pretraining: every instruction is a new one",
            "move it under stages.finetune.engine",
        )
    if stage == "finetune" and config.engine.instruction_cache == "on" and config.model.also_train != "nothing":
        yield (
            f"engine.instruction_cache on with model.also_train {config.model.also_train}: an encoder that trains "
            "encodes an instruction differently in every step",
            "set engine.instruction_cache auto, or model.also_train nothing",
        )
    if stage == "pretrain" and (loss.kl != 0 or loss.alignment != 0):
        yield (
            f"loss.kl {loss.kl} and loss.alignment {loss.alignment} in pretraining: the corpus has no teachers",
            "move them under stages.finetune.loss",
        )
    learned = (loss.label,) if stage == "pretrain" else (loss.label, loss.kl, loss.alignment)
    if stage in ("pretrain", "finetune") and all(weight == 0 for weight in learned):
        yield "every weight of the loss is 0: nothing would be learned", "set loss.label, loss.kl or loss.alignment"


def _without_sites(config: RunConfig, stage: str) -> Iterator[tuple[str, str]]:
    """A model without adapters learns through its fusion alone."""
    if config.model.sites:
        return
    mend = f"name some of {', '.join(SITES)}"
    if stage == "train_teachers" or (stage == "meta_train" and config.model.meta_lora):
        yield f"model.sites is [] in {stage}: a LoRA needs linears", mend
    if stage in ("pretrain", "finetune") and not (METHODS[config.model.method].fusion and config.model.fusion):
        yield f"model.sites is [] and model.method {config.model.method} has no fusion: nothing would be learned", mend
    if stage == "finetune" and config.loss.alignment != 0:
        yield "loss.alignment with model.sites []: there are no adapters to align", "set loss.alignment 0"
