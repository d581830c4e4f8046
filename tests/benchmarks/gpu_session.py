"""Steps of the benchmark on GPUs, and what is measured while they are taken."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tagi_ds.build import load_study_tokenizer, open_distillation
from tagi_ds.config import LossConfig, RunConfig
from tagi_ds.data.c4 import DocumentMixture
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Batch
from tagi_ds.encodings.instructions import open_cache
from tagi_ds.engine.costs import activities, costs_of
from tagi_ds.engine.distributed import current
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.engine.objective import BatchSource
from tagi_ds.engine.step import train_step
from tagi_ds.engine.strategy import Strategy, make_strategy
from tagi_ds.launch import Stage
from tagi_ds.objectives import TagiObjective
from tagi_ds.plan.cluster import Cluster
from tagi_ds.plan.operations import count_operations
from tagi_ds.plan.shapes import Shapes, count_model
from tagi_ds.plan.workload import Workload, workload_of
from tagi_ds.stages import hypernetwork
from tests.benchmarks.gpu_plan import planned_bytes

WARM_UP, COSTS = 3, 5


@dataclass
class Session:
    """A prepared model and its batches, step by step.

    Attributes:
        shapes: what the plan knows of the model.
        losses: of every step taken.
        tokens, instructions: of inputs and targets, and of instructions, in every step on this rank, without padding.
        seen: the steps' micro-batches on this rank, as the plan describes them.
    """

    config: RunConfig
    strategy: Strategy
    objective: TagiObjective
    source: BatchSource
    shapes: Shapes
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    instructions: list[int] = field(default_factory=list)
    seen: list[Workload] = field(default_factory=list)

    def step(self) -> None:
        """One optimizer step."""
        (batch,) = self.source.next_step()
        report = train_step(self.strategy, self.objective, [batch], len(self.losses), lambda: False)
        self.losses.append(report.metrics["loss/total"])
        self._note(batch)

    def loss_of(self, batch: Batch) -> float:
        """Label loss of a batch without dropout, in nats a token."""
        self.strategy.module.eval()
        (terms,) = self.strategy.evaluate(self.objective, [batch])
        self.strategy.module.train()
        return float(terms["label"].value) / batch.target_tokens

    @property
    def longest(self) -> Workload:
        """The micro-batch of the longest lengths so far, to which memory belongs."""
        seen = self.seen
        lengths = (max(w.instruction for w in seen), max(w.source for w in seen), max(w.target for w in seen))
        return replace(seen[0].with_lengths(lengths), counted=None)

    def _note(self, batch: Batch) -> None:
        assert batch.instruction_ids is not None
        assert batch.instruction_attention_mask is not None
        self.tokens.append(int(batch.attention_mask.sum()) + batch.target_tokens)
        self.instructions.append(int(batch.instruction_attention_mask.sum()))
        ranks, stage = current(), Path(str(self.config.output_dir)).name
        limits = workload_of(self.config, stage, ranks.world_size, ranks.device.type == "cpu")
        lengths = (batch.instruction_ids.shape[1], batch.input_ids.shape[1], batch.labels.shape[1])
        self.seen.append(replace(limits.with_lengths(lengths), counted=batch.target_tokens))

    def flops(self, first: int, after: int) -> tuple[float, float]:
        """Useful and computed operations of this rank in the steps `first` to `after`, the latter left out."""
        costs = [count_operations(self.shapes, work).total for work in self.seen[first:after]]
        return sum(cost.useful for cost in costs), sum(cost.total for cost in costs)


def open_session(config: RunConfig, stage_name: str) -> Session:
    """Builds model and batches as the stage does."""
    stage = Stage(stage_name, config, current(), Path(str(config.output_dir)))
    tokenizer, ranks = load_study_tokenizer(config), stage.ranks
    distillation = cache = None
    if stage_name == "finetune":
        tasks, _ = training_split(config.data, config.seed)
        distillation = open_distillation(config, tasks, tokenizer)
    strategy = make_strategy(config.engine, ranks)
    model = hypernetwork._build(strategy, config, None)
    source: BatchSource
    if distillation is not None:
        collator = Collator(tokenizer, config.data, "hypernetwork", config.teachers.unit)
        cache = open_cache(stage, model, tasks, [], collator, strategy)
        objective, source = hypernetwork.objective_and_source(
            stage, tasks, tokenizer, distillation, model.config.scaling, cache
        )
    else:
        objective = TagiObjective(LossConfig(), model.config.scaling)
        assert config.data.c4_dir is not None
        source = DocumentMixture(
            config.data.c4_dir, tokenizer, config.data, config.seed, ranks.rank, ranks.world_size, 1
        )
    strategy.prepare(model, config.optimizer, 1000)
    if cache is not None:
        cache.build(strategy)
    return Session(config, strategy, objective, source, count_model(config, stage_name))


def measure(config: RunConfig, stage: str, cluster: Cluster, runs: int, steps: int) -> dict[str, Any]:
    """Everything about one scenario, as JSON holds it.

    Args:
        runs, steps: so many runs of so many steps are timed.
    """
    forget()
    session = open_session(config, stage)
    kept = session.source.next_step()[0]
    before = session.loss_of(kept)
    meter = FlopMeter()
    with meter.counting():
        session.step()
    counted = meter.flops / session.flops(0, 1)[1]
    for _ in range(WARM_UP - 1):
        session.step()
    _synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, list[float]] = {name: [] for name in ("seconds", "tokens", "instructions", "useful", "computed")}
    for _ in range(runs):
        first, began = len(session.losses), time.perf_counter()
        for _ in range(steps):
            session.step()
        _synchronize()
        found["seconds"].append(time.perf_counter() - began)
        found["tokens"].append(sum(session.tokens[first:]))
        found["instructions"].append(sum(session.instructions[first:]))
        useful, computed = session.flops(first, first + steps)
        found["useful"].append(useful)
        found["computed"].append(computed)
    held, work = measured_bytes(), session.longest
    return {
        "runs": found,
        "losses": session.losses,
        "kept_batch_loss": [before, session.loss_of(kept)],
        "measured_bytes": held,
        "planned_bytes": planned_bytes(config, work, session.shapes, cluster),
        "counted_to_planned_flops": counted,
        "costs": largest_costs(session),
        "setting": {
            "strategy": config.engine.strategy,
            "gpus": cluster.gpus,
            "examples": work.examples,
            "lengths": [work.instruction, work.source, work.target],
            "recomputed": config.engine.activation_checkpointing,
            "parameters": session.shapes.parameters,
            "trained": session.shapes.trained,
            "peak_tflops": cluster.flops(config.engine.precision) / 1e12,
        },
    }


def forget() -> None:
    """Gives memory of what came before back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured_bytes() -> float | None:
    """The most that this process's GPU held, as the driver sees it; None on the processor."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return float(torch.cuda.max_memory_reserved() + outside)


def largest_costs(session: Session) -> list[dict[str, Any]]:
    """The operations that take most of a step's time of their own (tagi_ds.engine.costs.Cost)."""
    with torch.profiler.profile(activities=activities(), record_shapes=True) as profile:
        session.step()
        _synchronize()
    return [asdict(cost) for cost in costs_of(profile.key_averages(group_by_input_shape=True), COSTS).largest]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
