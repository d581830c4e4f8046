"""The hypernetwork's two stages: pretraining on text, then finetuning on tasks with their teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tagi_ds.build import build_tagi, load_study_tokenizer, open_distillation
from tagi_ds.config import LossConfig, RunConfig
from tagi_ds.data.c4 import DocumentMixture
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Batch, Task, unit_of
from tagi_ds.encodings.instructions import InstructionCache, open_cache
from tagi_ds.engine.strategy import Strategy, make_strategy, replica_of
from tagi_ds.errors import UserError
from tagi_ds.launch import Stage
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.objectives import TagiObjective
from tagi_ds.plan.operations import count_operations
from tagi_ds.plan.shapes import count_model
from tagi_ds.plan.timing import unit_costs
from tagi_ds.plan.workload import workload_of
from tagi_ds.stages.probe import StageProbe, first_documents, first_examples
from tagi_ds.stages.training import held_out_batches, task_source, train
from tagi_ds.teachers.distillation import Distillation, DistilledSource
from tagi_ds.teachers.logit_teacher import ReadingCollator, TeacherReader


def pretrain(stage: Stage) -> dict[str, Any]:
    """Stage 2 of the paper: a | b | c; a goes to the hypernetwork, b to the backbone, c is predicted."""
    config, ranks = stage.config, stage.ranks
    replica, costs = replica_of(config.engine, ranks), stage_costs(stage)
    tokenizer = load_study_tokenizer(config)
    assert config.data.c4_dir is not None
    accumulation = config.engine.accumulation
    source = DocumentMixture(
        config.data.c4_dir, tokenizer, config.data, config.seed, replica.index, replica.count, accumulation
    )
    strategy = make_strategy(config.engine, ranks)
    model = _build(strategy, config, costs)
    objective = TagiObjective(LossConfig(), model.config.scaling)
    looked_at = first_documents(config, tokenizer, replica)
    probe = StageProbe(strategy, looked_at, tokenizer, config.data.max_target_tokens, model.config.scaling)
    summary = train(stage, strategy, model, objective, source, probe=probe)
    return summary


def finetune(stage: Stage) -> dict[str, Any]:
    """Stage 3 of the paper: L = label·L_pred + λ1·KL + λ2·alignment on the training tasks."""
    config, costs = stage.config, stage_costs(stage)
    tokenizer = load_study_tokenizer(config)
    tasks, validation_tasks = training_split(config.data, config.seed)
    distillation = open_distillation(config, tasks, tokenizer, replica_of(config.engine, stage.ranks).speaks)
    examples = (example.id for task in tasks for example in task.examples)
    distillation.require(examples, (unit_of(task, config.teachers.unit) for task in tasks))
    own = Path(config.study_dir) / "pretrain"
    if config.model.initial is None and (own / "done.json").is_file():
        config.model.initial = str(own)
    stage.say(f"finetune: hypernetwork from {config.model.initial or 'a new start'}")
    strategy = make_strategy(config.engine, stage.ranks)
    store = distillation.parameters
    shared = store.common_a() if store is not None and config.model.a == "shared" else None
    model = _build(strategy, config, costs, shared)
    scaling = model.config.scaling
    collator = Collator(tokenizer, config.data, "hypernetwork", config.teachers.unit)
    cache = open_cache(stage, model, tasks, validation_tasks, collator, strategy)
    objective, source = objective_and_source(stage, tasks, tokenizer, distillation, scaling, cache)
    held_out: Sequence[Batch] = held_out_batches(stage, validation_tasks, collator)
    looked_at = first_examples(validation_tasks or tasks, collator)
    probe = StageProbe(strategy, looked_at, tokenizer, config.data.max_target_tokens, scaling)
    judged = TagiObjective(LossConfig(), scaling)
    if cache is None:
        return train(stage, strategy, model, objective, source, judged, held_out, probe)
    summary = train(
        stage,
        strategy,
        model,
        objective,
        source,
        judged,
        cache.attached(held_out),
        probe,
        lambda: cache.build(strategy),
    )
    summary["flops"] += cache.flops
    cache.remove()
    return summary


def objective_and_source(
    stage: Stage,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    distillation: Distillation,
    scaling: float,
    cache: InstructionCache | None = None,
) -> tuple[TagiObjective, DistilledSource]:
    """What finetuning minimises, and its batches with what the step needs beside them.

    Args:
        stage: with the run's configuration.
        tasks: the training tasks.
        tokenizer: of the backbone.
        distillation: the run's teachers.
        scaling: the generated adapters' alpha / r.
        cache: of encoded instructions, built before the first batch; None: the step encodes them.
    """
    config, store = stage.config, distillation.parameters
    objective = TagiObjective(
        config.loss,
        scaling,
        config.teachers.temperature,
        store.scaling if store is not None else 1.0,
        store.mean_square if store is not None else None,
        distillation.online,
    )
    collator = Collator(tokenizer, config.data, "hypernetwork", config.teachers.unit)
    if distillation.online is not None:
        reader = TeacherReader(tokenizer, config.data, config.teachers.demonstrations, config.seed)
        collator = ReadingCollator(reader, tokenizer, config.data, "hypernetwork", config.teachers.unit)

    def attach(batch: Batch) -> Batch:
        taught = distillation.attach(batch)
        return taught if cache is None else cache.attach(taught)

    return objective, DistilledSource(task_source(stage, tasks, collator, distillation.prepare), attach)


def stage_costs(stage: Stage) -> list[float] | None:
    """FLOPs of each of the model's blocks with what lies beside it, for a pipeline's cuts; None for other strategies.

    Nothing is loaded: the model is counted on the meta device, at the recipe's longest lengths.

    Raises:
        UserError: the processes are no multiple of the stages, or there are fewer blocks than stages.
    """
    config = stage.config
    replica = replica_of(config.engine, stage.ranks)
    if config.engine.strategy != "pipeline":
        return None
    shapes = count_model(config, stage.name)
    if config.engine.stages > len(shapes.blocks):
        raise UserError(
            f"engine.stages {config.engine.stages}, but the backbone has {len(shapes.blocks)} blocks",
            f"choose at most {len(shapes.blocks)} stages",
        )
    work = workload_of(config, stage.name, replica.count, stage.ranks.device.type == "cpu")
    return unit_costs(shapes, count_operations(shapes, work))


def _build(
    strategy: Strategy, config: RunConfig, costs: list[float] | None, shared_a: Mapping[str, Tensor] | None = None
) -> TagiForConditionalGeneration:
    with strategy.model_context():
        model = build_tagi(
            config, strategy.dtype, strategy.gathered, shared_a, strategy.construction(), strategy.held, costs
        )
    if config.engine.activation_checkpointing:
        model.backbone.gradient_checkpointing_enable()
    return model
