"""A plan in words: tables for the terminal, an object for JSON, and the formulas."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from tagi_ds.plan import activations, answering, communication, memory, operations, timing
from tagi_ds.plan.advice import Candidate, Plan
from tagi_ds.plan.answering import AnsweringMemory, AnsweringPlan

GB = 1e9


def print_plan(plan: Plan, console: Console) -> None:
    """Prints parameters, work, memory and time by layout, and the advice."""
    cluster = plan.cluster
    console.print(
        f"[bold]{plan.stage}[/] on {cluster.name}: {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}, "
        f"{cluster.memory_gb:.0f} GB, {cluster.flops('bf16') / 1e12:.4g} TFLOP/s in bf16",
        highlight=False,
    )
    console.print(_parameter_table(plan))
    shown = next((c for c in (plan.recommended, *plan.candidates) if c is not None and c.work is not None), None)
    if shown is not None:
        console.print(_operation_table(shown))
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    for candidate in plan.candidates:
        if candidate.refused:
            console.print(f"{candidate.layout.title}: impossible — {'; '.join(candidate.refused)}", highlight=False)
    _print_stages(plan, console)
    for sentence in plan.advice:
        console.print(f"• {sentence}", highlight=False)


def print_answering(plan: AnsweringPlan, console: Console) -> None:
    """Prints parameters, memory by precision, and the advice for an evaluation."""
    cluster, work = plan.cluster, plan.work
    console.print(f"[bold]evaluate[/] on {cluster.name}: {cluster.gpu}, {cluster.memory_gb:.0f} GB", highlight=False)
    console.print(f"{plan.shapes.parameters:,} parameters", highlight=False)
    lengths = f"{work.instruction} | {work.source} | {work.target}"
    table = Table(title=f"Memory of one process, GB: {work.examples} x ({lengths}) tokens")
    kinds = [field.name for field in dataclasses.fields(AnsweringMemory)]
    table.add_column("precision")
    for title in (*kinds, "fits", "largest batch"):
        table.add_column(title, justify="right")
    for row in plan.rows:
        figures = [f"{getattr(row.memory, kind) / GB:.2f}" for kind in kinds]
        fits = "yes" if row.largest >= work.examples else "no"
        table.add_row(row.precision + ("*" if row is plan.chosen else ""), *figures, fits, f"{row.largest:,}")
    console.print(table)
    for sentence in plan.advice:
        console.print(f"• {sentence}", highlight=False)


def answering_dict(plan: AnsweringPlan) -> dict[str, Any]:
    """An evaluation's plan as JSON holds it: bytes and counts."""
    return {
        "stage": "evaluate",
        "cluster": dataclasses.asdict(plan.cluster),
        "parameters": plan.shapes.parameters,
        "work": dataclasses.asdict(plan.work),
        "memory": {row.precision: dataclasses.asdict(row.memory) for row in plan.rows},
        "largest_batch": {row.precision: row.largest for row in plan.rows},
        "precision": plan.chosen.precision,
        "fits": plan.fits,
        "advice": plan.advice,
    }


def print_formulas(console: Console) -> None:
    """Prints the formulas and assumptions: the docstrings of the modules that reckon."""
    for module in (activations, memory, operations, communication, timing, answering):
        console.print(f"[bold]{module.__name__.rpartition('.')[2]}[/]")
        console.print(inspect.getdoc(module), markup=False, highlight=False, soft_wrap=True)
        console.print()


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it: bytes, seconds, counts."""
    shapes = plan.shapes
    parts = ("backbone", "generator", "fusion", "trained", "frozen", "parameters")
    return {
        "stage": plan.stage,
        "cluster": dataclasses.asdict(plan.cluster),
        "parameters": {part: getattr(shapes, part) for part in parts},
        "zero3": {
            "backbone_gathered_bytes": plan.backbone_gathered,
            "backbone_gather_s": plan.backbone_gather_s,
            "break_even_tokens": plan.break_even,
        },
        "layouts": [_candidate(candidate) for candidate in plan.candidates],
        "recommended": plan.recommended.layout.title if plan.recommended else None,
        "advice": plan.advice,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    figures: dict[str, Any] = {"layout": candidate.layout.title, "refused": candidate.refused}
    if candidate.operations is None:
        return figures
    names = ("work", "expected", "memory", "traffic", "timing")
    figures |= {name: dataclasses.asdict(getattr(candidate, name)) for name in names}
    parts = candidate.operations.by_part().items()
    return figures | {
        "flops": {name: dataclasses.asdict(cost) for name, cost in parts},
        "batch": candidate.batch,
        "accumulation": candidate.accumulation,
        "fits": candidate.fits,
        "largest_micro_batch": candidate.largest,
        "stages": [[stage.start, stage.stop] for stage in candidate.stages],
    }


def _parameter_table(plan: Plan) -> Table:
    shapes, table = plan.shapes, Table(title="Parameters")
    for title in ("part", "parameters", "share"):
        table.add_column(title, justify="left" if title == "part" else "right")
    for part in ("backbone", "generator", "fusion"):
        count = getattr(shapes, part)
        if count:
            table.add_row(part, f"{count:,}", f"{count / shapes.parameters:.1%}")
    table.add_section()
    table.add_row("of them train", f"{shapes.trained:,}", f"{shapes.trained / shapes.parameters:.1%}")
    return table


def _operation_table(candidate: Candidate) -> Table:
    assert candidate.operations is not None
    assert candidate.expected is not None
    work, table = candidate.expected, Table()
    lengths = f"{work.instruction} | {work.source} | {work.target}"
    table.title = f"FLOPs of a micro-batch of {candidate.layout.title}: {work.examples} x ({lengths}) tokens"
    for title in ("part", "forward", "backward", "recomputed", "share"):
        table.add_column(title, justify="left" if title == "part" else "right")
    whole = candidate.operations.total
    for name, cost in [*candidate.operations.by_part().items(), ("whole", whole)]:
        if cost.total:
            figures = (_si(cost.forward), _si(cost.backward), _si(cost.recomputed))
            table.add_row(name, *figures, f"{cost.total / whole.total:.1%}")
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of the fullest GPU, GB")
    kinds = ["frozen", "trained", "optimizer", "gradients", "buffers", "activations", "logits", "adapters"]
    if any(candidate.memory is not None and candidate.memory.host for candidate in plan.candidates):
        kinds.append("host")
    if any(candidate.memory is not None and candidate.memory.validation for candidate in plan.candidates):
        kinds.append("validation")
    table.add_column("layout")
    for title in (*kinds, "peak", "fits", "largest micro-batch"):
        table.add_column(title, justify="right")
    for candidate in plan.candidates:
        if candidate.memory is None or candidate.work is None:
            continue
        figures = [f"{getattr(candidate.memory, kind) / GB:.2f}" for kind in kinds]
        mark = "*" if candidate is plan.recommended else ""
        fits = "yes" if candidate.fits else "no"
        peak = f"{candidate.memory.peak / GB:.2f}"
        table.add_row(candidate.layout.title + mark, *figures, peak, fits, f"{candidate.largest:,}")
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title="One optimizer step (estimate); tokens of inputs and targets")
    table.add_column("layout")
    titles = ("micro-batches", "compute ms", "exchange ms", "bubble", "optimizer ms", "step ms", "tokens/s", "MFU")
    for title in titles:
        table.add_column(title, justify="right")
    for candidate in plan.candidates:
        spent, work = candidate.timing, candidate.work
        if spent is None or work is None:
            continue
        table.add_row(
            candidate.layout.title + ("*" if candidate is plan.recommended else ""),
            f"{candidate.accumulation} x {work.examples}",
            f"{1e3 * spent.compute_s:,.1f}",
            f"{1e3 * spent.communication_s:,.1f}",
            f"{spent.bubble:.0%}",
            f"{1e3 * spent.optimizer_s:,.1f}",
            f"{1e3 * spent.step_s:,.1f}",
            f"{spent.tokens_per_s:,.0f}",
            f"{spent.mfu:.0%}",
        )
    return table


def _print_stages(plan: Plan, console: Console) -> None:
    for candidate in plan.candidates:
        if candidate.stages:
            names = [block.name.replace(".block.", " ") for block in plan.shapes.blocks]
            spans = [f"{names[stage.start]}…{names[stage.stop - 1]}" for stage in candidate.stages]
            console.print(f"{candidate.layout.title}: {' | '.join(spans)}", highlight=False)
    if plan.cluster.gpus > 1:
        console.print(
            f"Sharding the backbone gathers {plan.backbone_gathered / GB:.1f} GB a micro-batch (twice the whole, "
            f"beside the instructions' pass), {plan.backbone_gather_s:.2f} s here.",
            highlight=False,
        )


def _si(value: float) -> str:
    if value == 0:
        return "0"
    power = min(5, int(math.log10(value)) // 3)
    return f"{value / 1000**power:.1f}" + ("", "k", "M", "G", "T", "P")[power]
