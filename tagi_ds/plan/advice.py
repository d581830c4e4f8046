"""From a recipe and a cluster to a plan: every layout reckoned, the fastest that fits recommended, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tagi_ds.config import RunConfig
from tagi_ds.plan.cluster import Cluster
from tagi_ds.plan.communication import Traffic, backbone_gather, collective_s, traffic_of
from tagi_ds.plan.layout import Layout, accumulation_of, batch_problem, layouts, refusals
from tagi_ds.plan.memory import Memory, largest_fitting, memory_of
from tagi_ds.plan.operations import Operations, count_operations
from tagi_ds.plan.shapes import Shapes, count_model
from tagi_ds.plan.stages import balance
from tagi_ds.plan.timing import Timing, compute_seconds, time_of, unit_costs
from tagi_ds.plan.workload import Workload, expected_work, validation_work, workload_of

_ALIKE = 0.95
"""Layouts within this share of the fastest one's tokens a second are as fast as it."""


@dataclass(frozen=True)
class Candidate:
    """One layout, reckoned.

    Attributes:
        layout: what it is.
        refused: why it cannot run; the figures below are then None.
        batch: what the recipe's global batch lacks for it, or None.
        work: the longest micro-batch, to which memory belongs.
        expected: the micro-batch of the expected lengths, to which traffic, timing and operations belong.
        accumulation: micro-batches a step that it is reckoned with.
        largest: most examples of a micro-batch that fit; 0: not even one.
        stages: blocks of each pipeline stage.
    """

    layout: Layout
    refused: list[str]
    batch: str | None = None
    work: Workload | None = None
    expected: Workload | None = None
    memory: Memory | None = None
    traffic: Traffic | None = None
    timing: Timing | None = None
    operations: Operations | None = None
    accumulation: int = 1
    largest: int = 0
    stages: list[range] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether it can run, and its micro-batch fits."""
        return self.work is not None and self.largest >= self.work.examples


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster.

    Attributes:
        stage: the launched stage.
        recommended: the simplest of the fastest candidates that fit; None where none does.
        backbone_gathered: bytes of gathering a sharded backbone for a forward and a backward pass.
        backbone_gather_s: seconds of that on this cluster.
        break_even: tokens of a GPU's micro-batch from which computing takes longer than ZeRO-3's gathering.
        advice: sentences.
    """

    stage: str
    cluster: Cluster
    shapes: Shapes
    candidates: list[Candidate]
    recommended: Candidate | None
    backbone_gathered: float
    backbone_gather_s: float
    break_even: float
    advice: list[str]


def make_plan(config: RunConfig, stage: str, cluster: Cluster, lengths: tuple[int, int, int] | None = None) -> Plan:
    """Reckons every layout of a recipe on a cluster; loads nothing.

    Args:
        config: resolved.
        stage: pretrain, finetune, meta_train or backbone.
        lengths: expected padded lengths (instruction, source, target) for the times; see
            :func:`tagi_ds.plan.workload.expected_work`. Memory always belongs to the recipe's limits.

    Raises:
        UserError: the backbone is not known, or a DeepSpeed JSON cannot be read.
    """
    shapes = count_model(config, stage)
    candidates = [_reckon(layout, config, stage, shapes, cluster, lengths) for layout in layouts(config, cluster)]
    fitting = [candidate for candidate in candidates if candidate.fits and candidate.timing is not None]
    best = _recommended(fitting)
    work = workload_of(config, stage, cluster.gpus, cluster.is_cpu)
    gathered = backbone_gather(shapes, work.element)
    break_even = _break_even(shapes, expected_work(config, stage, work, lengths), cluster)
    plan = Plan(
        stage,
        cluster,
        shapes,
        candidates,
        best,
        gathered,
        collective_s(cluster, gathered, cluster.gpus),
        break_even,
        [],
    )
    return replace(plan, advice=_advise(plan, config))


def _recommended(fitting: Sequence[Candidate]) -> Candidate | None:
    """The simplest of the fastest: estimates do not tell layouts apart that differ by a few per cent.

    By tokens a second rather than seconds: layouts whose batch does not divide are reckoned with a larger one.

    Args:
        fitting: in the order of :func:`tagi_ds.plan.layout.layouts`, pipelines last.
    """
    speeds = [candidate.timing.tokens_per_s for candidate in fitting if candidate.timing is not None]
    return next((c for c, speed in zip(fitting, speeds, strict=True) if speed >= _ALIKE * max(speeds)), None)


def _reckon(
    layout: Layout,
    config: RunConfig,
    stage: str,
    shapes: Shapes,
    cluster: Cluster,
    lengths: tuple[int, int, int] | None,
) -> Candidate:
    reasons = refusals(layout, config, shapes, stage)
    if reasons:
        return Candidate(layout, reasons)
    accumulation = accumulation_of(layout, config)
    config = replace(config, engine=replace(config.engine, accumulation=accumulation))
    work = replace(workload_of(config, stage, layout.replicas, cluster.is_cpu), sharded=layout.strategy == "zero3")
    expected = expected_work(config, stage, work, lengths)
    operations, traffic = count_operations(shapes, expected), traffic_of(shapes, expected, layout, cluster)
    stages = balance(unit_costs(shapes, operations), layout.stages) if layout.strategy == "pipeline" else []
    return Candidate(
        layout=layout,
        refused=[],
        batch=batch_problem(layout, config),
        work=work,
        expected=expected,
        memory=memory_of(shapes, work, layout, cluster, accumulation, stages, validation_work(config, stage, work)),
        traffic=traffic,
        timing=time_of(shapes, expected, operations, traffic, layout, cluster, accumulation, stages),
        operations=operations,
        accumulation=accumulation,
        largest=_largest(shapes, work, layout, cluster, accumulation, stages),
        stages=stages,
    )


def _largest(
    shapes: Shapes, work: Workload, layout: Layout, cluster: Cluster, accumulation: int, stages: list[range]
) -> int:
    """Most examples whose peak is within the GPU's memory; the peak grows with them."""

    def fits(examples: int) -> bool:
        peak = memory_of(shapes, work.sized(examples), layout, cluster, accumulation, stages).peak
        return peak <= cluster.memory

    return largest_fitting(fits)


def _break_even(shapes: Shapes, work: Workload, cluster: Cluster) -> float:
    """Computing grows with the tokens, gathering does not: where both take equally long."""
    layout = Layout("zero3", cluster.gpus)
    gather_s = traffic_of(shapes, work, layout, cluster).gather_s
    flops = count_operations(shapes, replace(work, sharded=True)).total.total
    return work.trained_tokens * gather_s / compute_seconds(flops, cluster, work.precision)


def _advise(plan: Plan, config: RunConfig) -> list[str]:
    best, said = plan.recommended, []
    if best is None:
        return [_nothing_fits(plan, config)]
    assert best.timing is not None
    assert best.work is not None
    said.append(
        f"Run {best.layout.title}: the simplest of the fastest that fit, {best.timing.tokens_per_s:,.0f} tokens/s, "
        f"MFU {best.timing.mfu:.0%}."
    )
    if best.batch:
        said.append(f"Its batch does not divide: {best.batch}.")
    if config.engine.strategy != best.layout.strategy:
        said.append(f"The recipe says engine.strategy {config.engine.strategy}.")
    if best.accumulation != config.engine.accumulation:
        said.append(f"Set engine.accumulation {best.accumulation}, where the recipe says {config.engine.accumulation}.")
    said += _about_validation(plan, best, config)
    said += _about_replication(plan)
    if best.largest > best.work.examples:
        said.append(
            f"Up to {best.largest} examples a micro-batch fit where {best.work.examples} are asked for"
            + ("; recomputation could be switched off first." if config.engine.activation_checkpointing else ".")
        )
    return said


def _about_validation(plan: Plan, best: Candidate, config: RunConfig) -> list[str]:
    """What to do where a validation batch does not fit, whatever fits a step."""
    assert best.work is not None
    step, room = best.work, plan.cluster.memory
    work = validation_work(config, plan.stage, step)
    if best.memory is None or work is None or best.memory.validation <= room:
        return []

    def fits(examples: int) -> bool:
        smaller = replace(work, examples=examples, tasks=min(work.tasks, examples))
        found = memory_of(plan.shapes, step, best.layout, plan.cluster, best.accumulation, best.stages, smaller)
        return found.validation <= room

    largest = largest_fitting(fits, work.examples)
    mend = f"set evaluation.batch_examples {largest}" if largest else "set data.validation_tasks 0 and name no split"
    return [
        f"A validation batch of {work.examples} examples at their longest takes {best.memory.validation / 1e9:.1f} GB "
        f"of {plan.cluster.memory_gb:.0f}: {mend}."
    ]


def _about_replication(plan: Plan) -> list[str]:
    named = {candidate.layout.title: candidate for candidate in plan.candidates}
    zero2, zero3, hpz = (named.get(name) for name in ("zero2", "zero3", "zero3 + hpZ"))
    if plan.cluster.gpus == 1 or zero2 is None or zero3 is None or zero2.timing is None or zero3.timing is None:
        return []
    ratio = zero3.timing.step_s / zero2.timing.step_s
    said = []
    if zero2.fits:
        verdict = "replicate the frozen backbone (zero2)" if ratio > 1 else "sharding it costs nothing here"
        said.append(f"A step of zero3 takes {ratio:.2f} times one of zero2: {verdict}.")
    elif zero3.fits:
        said.append("The replicated backbone does not fit: shard it (zero3).")
    said.append(
        f"zero3 breaks even at {plan.break_even:,.0f} tokens a GPU and micro-batch; "
        f"the recipe has {zero3.expected.trained_tokens if zero3.expected else 0:,} on {plan.cluster.name}."
    )
    if hpz is not None and hpz.timing is not None:
        gain = zero3.timing.step_s / hpz.timing.step_s
        verdict = "use it where zero3 is used" if hpz.fits and gain > 1.02 else "it is not worth its memory here"
        said.append(f"hpZ makes a step of zero3 {gain:.2f} times as fast: {verdict}.")
    return said


def _nothing_fits(plan: Plan, config: RunConfig) -> str:
    reckoned = [candidate for candidate in plan.candidates if candidate.memory is not None]
    least = min(reckoned, key=lambda c: c.memory.peak if c.memory else 0.0, default=None)
    if least is None or least.memory is None:
        return "No layout can run; the table says why."
    ways = [] if config.engine.activation_checkpointing else ["engine.activation_checkpointing true"]
    ways += ["more engine.accumulation", "shorter data.max_source_tokens", "offload (a zero3 JSON with offload_param)"]
    return (
        f"Nothing fits: {least.layout.title} comes nearest with {least.memory.peak / 1e9:.1f} GB of "
        f"{plan.cluster.memory_gb:.0f}. Try {', '.join(ways)}, or more GPUs."
    )
