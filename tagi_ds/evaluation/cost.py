"""What answering costs: operations counted by torch, seconds and memory measured, on real test examples.

One task's examples are answered four ways (:data:`WAYS`), each with the same batches and as many new tokens as the
references have at the mean, so that a model that stops early looks no cheaper. The plain backbone that reads the
concatenated instruction is what the others are related to. All answer as evaluation does
(:class:`tagi_ds.model.inference.Inference`). n examples of length i under an instruction of length t cost
about n(t+i) in the first and t+ni in the others (paper, table 2: one task of 100 examples).
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Task
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.evaluation.dealing import collate_pairs, evaluating, plan_batches
from tagi_ds.evaluation.generation import GenerationSettings, model_inputs
from tagi_ds.files import read_json, write_json
from tagi_ds.model.adapter import TaskState
from tagi_ds.model.inference import Inference
from tagi_ds.model.tagi import TagiForConditionalGeneration

WAYS = {
    "concatenated": "plain backbone, instruction with every input",
    "every_batch": "TAGI, instruction with every batch",
    "once": "TAGI, instruction once a task",
    "compiled": "TAGI, compiled task",
}
"""Ways to answer: the last has read its instruction beforehand, and does not count it."""
COST_FILE = "cost.json"
"""In a method's evaluation folder: what was measured, so that it is measured once."""


def measured_cost(
    model: TagiForConditionalGeneration,
    groups: Mapping[str, Sequence[Task]],
    collators: tuple[Collator, Collator],
    settings: GenerationSettings,
    most_tasks: int,
    path: Path,
    key: str,
) -> dict[str, dict[str, Any]]:
    """The ``flops`` and the ``cost`` of a results file; of an earlier start where `path` holds them.

    Args:
        model: the TAGI model; its own backbone stands for the plain one.
        groups: group -> tasks with the examples that count.
        collators: of the forms ``hypernetwork`` and ``concatenated``.
        settings: examples a batch, and beams.
        most_tasks: tasks of each group that are measured, spread evenly over the tasks by the length of what is read.
        path: where the figures are kept.
        key: of all that the figures depend on.

    Returns:
        {"flops": {group: {"operations": {way: n}, "relative": {way: share of concatenated}, "examples": n, "per_task":
        {task: {"operations", "relative", "tokens": {"instruction", "input", "concatenated", "output": means}}}}},
        "cost": {group: {"seconds": {way: s}, "relative": {way: share}, "peak_memory": {way: bytes beyond what was
        there before, None where the system does not tell}, "device": its name}}}; operations and seconds are sums over
        the tasks, so that those with long inputs weigh most.
    """
    if path.is_file():
        kept = read_json(path)
        if kept.get("key") == key:
            return {name: kept[name] for name in ("flops", "cost")}
    measured: dict[str, dict[str, Any]] = {"flops": {}, "cost": {}}
    with evaluating(model):
        for group, tasks in groups.items():
            chosen = spread(tasks, most_tasks)
            measured["flops"][group], measured["cost"][group] = _group(model, chosen, collators, settings)
    write_json(path, {"key": key, **measured})
    return measured


def spread(tasks: Sequence[Task], most: int) -> list[Task]:
    """At most `most` tasks from evenly spaced places of the order by length; one alone is the median."""
    by_length = sorted(tasks, key=lambda task: (_length(task), task.name))
    count = min(most, len(by_length))
    return [by_length[(2 * at + 1) * len(by_length) // (2 * count)] for at in range(count)]


def cost_table(measured: dict[str, dict[str, Any]]) -> Table:
    """The figures for the console."""
    table = Table(title="what answering costs, relative to the concatenated instruction")
    for head in ("group", "way", "GFLOP an example", "operations", "seconds", "time", "peak MB"):
        table.add_column(head, justify="left" if head in ("group", "way") else "right")
    for group, flops in measured["flops"].items():
        cost = measured["cost"][group]
        for way, told in WAYS.items():
            memory = cost["peak_memory"][way]
            table.add_row(
                group,
                told,
                f"{flops['operations'][way] / flops['examples'] / 1e9:.3f}",
                f"{flops['relative'][way]:.2f}",
                f"{cost['seconds'][way]:.2f}",
                f"{cost['relative'][way]:.2f}",
                "-" if memory is None else f"{memory / 1e6:.0f}",
            )
    return table


def _length(task: Task) -> int:
    """Characters that are read for a task: its instruction and its inputs."""
    return len(task.definition) + sum(len(example.input) for example in task.examples)


def _group(
    model: TagiForConditionalGeneration,
    tasks: Sequence[Task],
    collators: tuple[Collator, Collator],
    settings: GenerationSettings,
) -> tuple[dict[str, Any], dict[str, Any]]:
    per_task: dict[str, dict[str, Any]] = {}
    seconds = dict.fromkeys(WAYS, 0.0)
    memory: dict[str, int | None] = dict.fromkeys(WAYS)
    for task in tasks:
        runs, tokens = ways_of(model, task, collators, settings)
        counted: dict[str, int] = {}
        for way, run in runs.items():
            counted[way] = operations_of(run)
            taken, peak = _timed(run[1], model.device)
            seconds[way] += taken
            memory[way] = max(peak, memory[way] or 0) if peak is not None else None
        per_task[task.name] = {"operations": counted, "relative": _relative(counted), "tokens": tokens}
    operations = {way: sum(told["operations"][way] for told in per_task.values()) for way in WAYS}
    flops = {
        "operations": operations,
        "relative": _relative(operations),
        "examples": sum(len(task.examples) for task in tasks),
        "per_task": per_task,
    }
    cost = {
        "seconds": seconds,
        "relative": _relative(seconds),
        "peak_memory": memory,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
    }
    return flops, cost


def _relative(figures: Mapping[str, float]) -> dict[str, float]:
    return {way: figure / figures["concatenated"] for way, figure in figures.items()}


Run = tuple[Callable[[], None], Callable[[], None]]
"""What comes before a way of answering and does not count, and the answering."""


def operations_of(run: Run) -> int:
    """Operations of a way of answering, counted while it answers."""
    prepare, answer = run
    prepare()
    meter = FlopMeter()
    with meter.counting():
        answer()
    return meter.flops


def ways_of(
    model: TagiForConditionalGeneration,
    task: Task,
    collators: tuple[Collator, Collator],
    settings: GenerationSettings,
) -> tuple[dict[str, Run], dict[str, float]]:
    """Every way (:data:`WAYS`) of answering a task's examples, and mean tokens of what is read and written.

    Args:
        model: in evaluation mode (:func:`tagi_ds.evaluation.dealing.evaluating`).
        task: with the examples that count.
        collators, settings: of :func:`measured_cost`.
    """
    pairs = plan_batches([(task, example) for example in task.examples], settings.batch_examples)
    beside, joined = ([collate_pairs(collator)(part).to(model.device) for part in pairs] for collator in collators)
    outputs = [int((row != -100).sum()) for batch in beside for row in batch.labels]
    new_tokens = max(1, round(sum(outputs) / len(outputs)))
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "beams": settings.beams}
    compiled: list[TaskState] = []
    instruction, mask = beside[0].instruction_ids, beside[0].instruction_attention_mask
    assert instruction is not None
    assert mask is not None

    def compile_task() -> None:
        compiled[:] = [model.compile_instructions(instruction, mask)]

    def concatenated() -> None:
        with Inference(model.backbone) as inference:
            for batch in joined:
                inference.generate(model_inputs(batch), **length)

    def answer_compiled(compile_each: bool = False) -> None:
        with Inference(model) as inference:
            for batch in beside:
                if compile_each:
                    compile_task()
                task = compiled[0]
                given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "task": task}
                inference.generate(given, **length)

    def prepare() -> None:
        compile_task()
        model.keep_instructions(compiled[0])

    def once() -> None:
        compile_task()
        answer_compiled()

    def nothing() -> None:
        """Nothing comes before."""

    runs: dict[str, Run] = {
        "concatenated": (nothing, concatenated),
        "every_batch": (nothing, lambda: answer_compiled(compile_each=True)),
        "once": (nothing, once),
        "compiled": (prepare, answer_compiled),
    }
    read = [[int(row.sum()) for batch in batches for row in batch.attention_mask] for batches in (beside, joined)]
    tokens = {
        "instruction": float(mask.sum()),
        "input": sum(read[0]) / len(read[0]),
        "concatenated": sum(read[1]) / len(read[1]),
        "output": sum(outputs) / len(outputs),
    }
    return runs, tokens


def _timed(answer: Callable[[], None], device: torch.device) -> tuple[float, int | None]:
    """Seconds, and bytes at the peak beyond those before; the counted run before it has warmed everything up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        _reset_peak()
        before = _status("VmRSS") or 0
    began = time.perf_counter()
    answer()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    return seconds, None if peak is None else max(0, peak - before)


def _reset_peak() -> None:
    """Has Linux count this process's peak from now on (proc_pid_clear_refs(5)); elsewhere there is no such count.

    What the C library keeps of freed memory is given back before, or a second run would seem to need none.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int | None:
    """Bytes of an entry of /proc/self/status, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
