"""How a finetuning step's time grows, and what comes before the first one.

python tests/benchmarks/growth.py --output docs/performance.json --picture docs/growth.png

A T5 of 60M parameters, one thing changed at a time: tasks a batch (the examples stay as many), layers, width, rank,
instruction length. Texts are random ids of one length each, so that nothing else changes. The points of a curve
take turns; beside its time every point has its counted operations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from tagi_ds.data.examples import Batch
from tests.benchmarks.figures import compare, row, take_turns
from tests.benchmarks.speed_command import Rows, run
from tests.benchmarks.speed_study import Study, Training, count

EXAMPLES, TASKS = 16, 4
INSTRUCTION, INPUT, TARGET = 256, 128, 8
"""Tokens: about those of SNI's `Def + 2 Pos` (medians 229, 92 and 2; means 318, 125 and 2), the target padded."""
POINTS: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {
        "tasks": (1, 2, 4, 8, 16),
        "layers": (2, 4, 6, 8),
        "width": (256, 512, 768),
        "rank": (4, 16, 32, 64, 128),
        "instruction": (16, 64, 256, 1024),
    },
    "tiny": {
        "tasks": (1, 4, 16),
        "layers": (1, 2, 4),
        "width": (16, 32, 64),
        "rank": (2, 4, 8),
        "instruction": (16, 64, 256),
    },
}
UNITS = {
    "tasks": f"tasks of {EXAMPLES} examples",
    "layers": "layers of each stack",
    "width": "model width",
    "rank": "rank",
    "instruction": "tokens of an instruction",
}
PROBE = Path(__file__).with_name("growth_probe.py")


def make_batch(vocabulary: int, tasks: int, instruction: int = INSTRUCTION) -> Batch:
    """Random ids without padding: `EXAMPLES` examples of so many tasks."""
    generator = torch.Generator().manual_seed(0)

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (rows, length), generator=generator)

    inputs, instructions = ids(EXAMPLES, INPUT), ids(tasks, instruction)
    names = [f"task{at}" for at in range(tasks)]
    return Batch(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        labels=ids(EXAMPLES, TARGET),
        instruction_ids=instructions,
        instruction_attention_mask=torch.ones_like(instructions),
        task_index=torch.arange(EXAMPLES) * tasks // EXAMPLES,
        tasks=names,
        units=names,
    )


def curve(given: argparse.Namespace, name: str, points: Mapping[int, Training], told: str) -> Rows:
    """The row of a curve: its last point against its first.

    Args:
        given: the command line.
        name: what grows.
        points: its value -> what is timed.
        told: the curve in one sentence.
    """
    ways = {str(value): training for value, training in points.items()}
    flops = {value: count(way) for value, way in ways.items()}
    times = take_turns(ways, given.runs, warm=False)
    first, last = next(iter(ways)), list(ways)[-1]
    found = {
        value: {"seconds": round(statistics.median(taken.wall for taken in took), 4), "gflop": flops[value] / 1e9}
        for value, took in times.items()
    }
    more = {"points": found, "flops_ratio": round(flops[last] / flops[first], 4), "told": told}
    return {f"growth_{name}": compare(times[last], times[first], None, "at_most", **more)}


def _training(study: Study, batch: Batch, backbone: Path | None = None, **model: Any) -> Training:
    training = study.tagi_training([[batch]], study.config(backbone=backbone, **model), lambda item: item)
    tagi: Any = training.model
    # As in finetuning: instructions have been encoded before.
    encoded = tagi.encode_instructions(batch.instruction_ids, batch.instruction_attention_mask)
    training.work = [[replace(batch, instruction_encoding=encoded)]]
    return training


def tasks(study: Study, given: argparse.Namespace) -> Rows:
    """Tasks a batch at a constant number of examples."""
    vocabulary = study.size.shape["vocab_size"]
    points = {at: _training(study, make_batch(vocabulary, at)) for at in POINTS[given.size]["tasks"]}
    return curve(given, "tasks", points, "every task adds an adapter, and keys and values of one instruction")


def layers(study: Study, given: argparse.Namespace) -> Rows:
    """Layers of encoder and decoder."""
    batch = make_batch(study.size.shape["vocab_size"], TASKS)
    points = {
        at: _training(study, batch, study.make_backbone(f"layers_{at}", num_layers=at))
        for at in POINTS[given.size]["layers"]
    }
    return curve(
        given, "layers", points, "blocks, their adapters and their fusion grow alike; the output head does not"
    )


def width(study: Study, given: argparse.Namespace) -> Rows:
    """Width of the model, its heads and its feed-forward with it."""
    shape = study.size.shape
    batch, head = make_batch(shape["vocab_size"], TASKS), shape["d_kv"]
    points = {}
    for at in POINTS[given.size]["width"]:
        backbone = study.make_backbone(f"width_{at}", d_model=at, num_heads=at // head, d_ff=4 * at)
        points[at] = _training(study, batch, backbone)
    return curve(given, "width", points, "products grow with the width's square, the output head with the width")


def rank(study: Study, given: argparse.Namespace) -> Rows:
    """Rank of the generated adapters, its alpha with it."""
    batch = make_batch(study.size.shape["vocab_size"], TASKS)
    points = {at: _training(study, batch, rank=at, alpha=float(at)) for at in POINTS[given.size]["rank"]}
    return curve(given, "rank", points, "the generator's heads, and so what the optimizer steps, grow with the rank")


def instruction(study: Study, given: argparse.Namespace) -> Rows:
    """Tokens of every instruction."""
    vocabulary = study.size.shape["vocab_size"]
    points = {at: _training(study, make_batch(vocabulary, TASKS, at)) for at in POINTS[given.size]["instruction"]}
    told = "keys and values of it are made once a task, and every example's fusion and decoder attend to all of it"
    return curve(given, "instruction", points, told)


def start(study: Study, given: argparse.Namespace) -> Rows:
    """From the end of the imports to the end of the first finetuning step on a tiny model, against the imports.

    `startup` is both together, in seconds; its `imports_share` is of the CPU time.
    """
    tiny = Study(study.root / "tiny", study.sni, "tiny")
    found = []
    for at in range(given.runs):
        # A folder of its own: what is done is not done again.
        command = [sys.executable, str(PROBE), str(tiny.backbone), str(tiny.sni), str(tiny.root / f"start_{at}")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(ended.stdout + ended.stderr)
        found.append(json.loads(ended.stdout.splitlines()[-1]))
        print(f"run {at + 1}/{given.runs}", found[-1], flush=True)
    names = ("imports_s", "first_step_s", "imports_cpu_s", "first_step_cpu_s")
    told: dict[str, Any] = {name: round(statistics.median(each[name] for each in found), 3) for name in names}
    told["imported_without_need"] = found[-1]["imported_without_need"]
    shares = [each["imports_cpu_s"] / (each["imports_cpu_s"] + each["first_step_cpu_s"]) for each in found]
    return {
        "growth_start_vs_imports": row(
            [each["first_step_s"] / each["imports_s"] for each in found], 1.0, "at_most", "ratio", **told
        ),
        "startup": row(
            [each["imports_s"] + each["first_step_s"] for each in found],
            None,
            "at_most",
            imports_share=round(statistics.median(shares), 4),
            **told,
        ),
    }


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel a curve: measured seconds, and what the counted operations alone would take from the first point on."""
    curves = {name: figures for name, figures in rows.items() if "points" in figures}
    figure, axes = plt.subplots(1, max(1, len(curves)), figsize=(3.1 * max(1, len(curves)), 3.0), squeeze=False)
    for axis, (name, figures) in zip(axes[0], curves.items(), strict=False):
        points = figures["points"]
        places = [int(value) for value in points]
        seconds = [point["seconds"] for point in points.values()]
        flops = [point["gflop"] for point in points.values()]
        axis.plot(places, seconds, marker="o", label="measured")
        axis.plot(places, [seconds[0] * each / flops[0] for each in flops], "--", color="grey", label="by operations")
        kind = name.rpartition("growth_")[2]
        axis.set(title=kind, xlabel=UNITS[kind], ylim=(0, 1.08 * axis.get_ylim()[1]), xscale="log")
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds a step")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


SCENARIOS = {
    "tasks": tasks,
    "layers": layers,
    "width": width,
    "rank": rank,
    "instruction": instruction,
    "start": start,
}


def main(argv: list[str] | None = None) -> Rows:
    return run("growth of a finetuning step", __doc__, SCENARIOS, draw, argv)


if __name__ == "__main__":
    main()
