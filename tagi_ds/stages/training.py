"""What the four training stages share: prepared strategy, monitor, validation, the loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from tagi_ds.build import study_backbone, trainable_share
from tagi_ds.config import RunConfig
from tagi_ds.data.catalogue import left_out
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Batch, Task
from tagi_ds.data.mixture import TaskMixture, evaluation_batches
from tagi_ds.engine.distributed import all_reduce_sums
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.objective import RUN_TOTALS, TOTAL, Objective, padding_shares
from tagi_ds.engine.probe import Probe, peak_flops
from tagi_ds.engine.strategy import Strategy, replica_of
from tagi_ds.engine.trainer import BatchSource, Trainer
from tagi_ds.errors import UserError
from tagi_ds.launch import Stage
from tagi_ds.model.backbone import content_hash
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.plan.workload import validation_examples


def task_source(
    stage: Stage, tasks: Sequence[Task], collator: Collator, finish: Callable[[Batch], Batch] | None = None
) -> TaskMixture:
    """The training order over tasks for this rank; `finish` is done to each batch where it is made."""
    data, replica = stage.config.data, replica_of(stage.config.engine, stage.ranks)
    return TaskMixture(
        tasks,
        collator,
        stage.config.seed,
        data.tasks_per_batch,
        data.examples_per_task,
        replica.index,
        replica.count,
        stage.config.engine.accumulation,
        sampling=data.sampling,
        task_cap=data.task_cap,
        weights=data.weights,
        dealing=data.dealing,
        workers=data.workers,
        finish=finish,
        left_out=left_out(data, stage.config.seed),
    )


def planned_steps(config: RunConfig, source: Any) -> int:
    """Optimizer steps of a run: `engine.steps`, or as many as `engine.epochs` take, rounded up.

    Raises:
        ValueError: epochs are asked for over a stream, which has no length (the recipe's rules refuse it before).
    """
    epochs = config.engine.epochs
    if epochs is None:
        return config.engine.steps
    epoch_steps = getattr(source, "epoch_steps", None)
    if epoch_steps is None:
        raise ValueError("engine.epochs over a source without epochs")
    # A product like 3 * (1 / 3) must not give a step more.
    return max(1, math.ceil(epochs * epoch_steps - 1e-9))


def validation(
    stage: Stage, strategy: Strategy, objective: Objective, batches: Sequence[Batch]
) -> Callable[[int], dict[str, float]]:
    """Figures over all ranks' validation batches: ``validation/loss`` and what else the objective reports."""

    def evaluate(step: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        for batch, terms in zip(batches, strategy.evaluate(objective, batches), strict=True):
            for name, count in objective.counts(batch).items():
                sums[f"count/{name}"] = sums.get(f"count/{name}", 0.0) + count * strategy.replica.speaks
            for name, term in terms.items():
                sums[f"{name}/{term.per}"] = sums.get(f"{name}/{term.per}", 0.0) + float(term.value)
        totals = all_reduce_sums(sums)
        figures = {
            f"validation/{name.split('/')[0]}": value / max(totals[f"count/{name.split('/')[1]}"], 1.0)
            for name, value in totals.items()
            if not name.startswith("count/")
        }
        figures["validation/loss"] = figures.pop("validation/label")
        return figures

    return evaluate


def train(
    stage: Stage,
    strategy: Strategy,
    model: nn.Module,
    objective: Objective,
    source: BatchSource,
    validation_objective: Objective | None = None,
    validation_batches: Sequence[Batch] = (),
    probe: Probe | None = None,
    begin: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs the loop for a stage; `engine.best_by` says which validation figure chooses the best checkpoint.

    `probe` looks at the model beside the losses; `begin` is done once the strategy is prepared, before any batch.

    Returns:
        The stage's summary: steps, epochs (None over a stream), training seconds, flops, best, parameters, the
        run's totals of what happened in making its batches, and the share of padding in them.
    """
    config = stage.config
    config.engine = dataclasses.replace(config.engine, steps=planned_steps(config, source))
    parts = trainable_share(model)
    stage.say(
        f"{stage.name}: {config.engine.steps} steps of {config.data.tasks_per_batch * config.data.examples_per_task} "
        f"examples, {config.engine.strategy} on {stage.ranks.world_size} processes, {config.engine.precision}; {parts}"
    )
    strategy.prepare(model, config.optimizer, config.engine.steps)
    if begin is not None:
        begin()
    peak = peak_flops(config.engine, stage.ranks.device) * stage.ranks.world_size
    monitor = Monitor(stage.run_dir, stage.name, config.engine.steps, peak, main_settings(stage))
    evaluate = None
    if validation_batches and validation_objective is not None:
        evaluate = validation(stage, strategy, validation_objective, validation_batches)
    mark = model.shared_a_mark if isinstance(model, TagiForConditionalGeneration) else None
    record = BackboneRecord(config, stage.name, mark)
    fitted = Trainer(
        strategy,
        objective,
        source,
        config.engine,
        stage.run_dir,
        monitor,
        evaluate,
        best_metric=f"validation/{config.engine.best_by}",
        best_is="min" if config.engine.best_by == "loss" else "max",
        extra_state=record,
        probe=probe,
        evaluated_together=validation_examples(config) if evaluate is not None else None,
    ).fit()
    epoch_steps = getattr(source, "epoch_steps", None)
    totals = {name.removeprefix(RUN_TOTALS): count for name, count in fitted["totals"].items()}
    padding = padding_of(totals)
    if padding:
        told = ", ".join(f"{kind} {share:.0%}" for kind, share in padding.items())
        stage.say(f"{stage.name}: share of padding: {told}")
    return {
        "steps": fitted["step"],
        "epochs": round(fitted["step"] / epoch_steps, 4) if epoch_steps else None,
        "training_seconds": round(fitted["seconds"], 1),
        "flops": fitted["flops"],
        "best": fitted["best"],
        "parameters": parts,
        "data": {name: int(count) for name, count in totals.items() if not name.startswith(TOTAL)},
        "padding": padding,
    }


def padding_of(totals: Mapping[str, float]) -> dict[str, float]:
    """Share of a run's positions that was padding: of `instruction`, `input` and `target`, and of `all` together.

    Args:
        totals: the run's, by their names without RUN_TOTALS.
    """
    lengths = {name.removeprefix(TOTAL): count for name, count in totals.items() if name.startswith(TOTAL)}
    shares = {name.removesuffix("padding_share"): share for name, share in padding_shares(lengths).items()}
    return {kind.removesuffix("_") or "all": round(share, 4) for kind, share in shares.items()}


def main_settings(stage: Stage) -> dict[str, str | float]:
    """The fields by which runs are compared, the same names for every stage."""
    config = stage.config
    model, loss, optimizer, engine = config.model, config.loss, config.optimizer, config.engine
    return {
        "stage": stage.name,
        "seed": config.seed,
        "method": model.method,
        "rank": model.rank,
        "bottleneck": model.bottleneck,
        "head": model.head,
        "a": model.a,
        "fusion": str(model.fusion),
        "also_train": model.also_train,
        "global_batch": config.data.tasks_per_batch * config.data.examples_per_task,
        "steps": engine.steps,
        "learning_rate": optimizer.learning_rate,
        "schedule": optimizer.schedule,
        "weight_decay": optimizer.weight_decay,
        "loss_kl": loss.kl,
        "loss_alignment": str(loss.alignment),
        "strategy": engine.strategy,
        "processes": stage.ranks.world_size,
        "precision": engine.precision,
    }


class BackboneRecord:
    """What of a run's model does not train, carried by its checkpoints: a run does not go on with another.

    Args:
        config: of the run.
        stage: its name; a run that starts from random weights has no backbone.
        shared_a: mark of the frozen A, with `model.a: shared`.
    """

    def __init__(self, config: RunConfig, stage: str, shared_a: str | None = None) -> None:
        self.folder, self.hash, self.shared_a = None, None, shared_a
        if stage != "backbone" and config.model.initial != "scratch":
            self.folder = study_backbone(config)
            self.hash = content_hash(self.folder)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"backbone_hash": self.hash, "shared_a": self.shared_a}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compares with a checkpoint's record.

        Raises:
            UserError: the backbone's weights, or the frozen A, have changed since.
        """
        if state.get("backbone_hash", self.hash) != self.hash:
            raise UserError(
                f"the backbone in {self.folder} is not the one that this run began with: its weights differ",
                "put the run's own backbone back into that folder, or choose another --output_dir",
            )
        if state.get("shared_a") != self.shared_a:
            raise UserError(
                "the run began with another frozen A (model.a shared): its teachers or its model.initial have changed",
                "put those back with which it began, or choose another --output_dir",
            )


def held_out_batches(stage: Stage, tasks: Sequence[Task], collator: Collator) -> list[Batch]:
    """This rank's validation batches."""
    if not tasks:
        return []
    replica = replica_of(stage.config.engine, stage.ranks)
    return evaluation_batches(tasks, collator, validation_examples(stage.config), replica.index, replica.count)
