"""What a training step of TAGI costs beside its alternatives.

python tests/benchmarks/train.py --output docs/performance.json --picture docs/train_speed.png

A T5 of 60M parameters with 32,128 tokens and random weights, fp32, on SNI's texts (prompt, truncation 1024 | 128). All
ways of a scenario share backbone, attention kernel, engine, optimizer and the way of padding; they take turns on the
same batches. A step is all of it: collation, reading of stores, forward, backward, AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tagi_ds.build import build_tagi, open_distillation
from tagi_ds.config import LossConfig, RunConfig
from tagi_ds.data.c4 import DocumentMixture
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.collate import TaskChunk, pad_ids
from tagi_ds.data.examples import Batch, Task
from tagi_ds.engine.distributed import current
from tagi_ds.launch import Stage
from tagi_ds.stages import hypernetwork, store_logits
from tagi_ds.teachers.logit_teacher import ReadingCollator, TeacherReader
from tests.benchmarks.distillation_study import make_parameter_store
from tests.benchmarks.figures import compare, compare_work, rates, row, take_turns
from tests.benchmarks.speed_command import Rows, draw_ratios, run
from tests.benchmarks.speed_study import Study, Training, chunk_of, count
from tests.benchmarks.step_memory import peaks
from tests.benchmarks.whole_logits import WholeLogits

TASKS, EXAMPLES, BATCHES = 2, 8, 2
DOCUMENTS = 4


def finetuning(study: Study, given: argparse.Namespace) -> Rows:
    """TAGI's finetuning against meta-training with the instruction in every input, whole model and LoRA."""
    work, config = study.chunks(TASKS, EXAMPLES, BATCHES), study.config()
    beside, joined = study.collator("hypernetwork", config), study.collator("concatenated", config)
    steps = [[chunks] for chunks in work]
    ways = {
        "tagi": study.tagi_training(steps, config, beside, _tasks_of(work)),
        "encoding": study.tagi_training(steps, config, beside),
        "whole": study.plain_training(steps, study.config(), joined, lora=False),
        "lora": study.plain_training(steps, study.config(), joined, lora=True),
    }
    told = {**study.lengths(work, config), "trained_parameters": {name: way.trained() for name, way in ways.items()}}
    times = take_turns(ways, given.runs, BATCHES)
    told["examples_per_s"] = rates(times, TASKS * EXAMPLES)
    return {
        "train_finetune_vs_meta_whole": compare(times["whole"], times["tagi"], 3.0, "at_least", **told),
        "train_finetune_vs_meta_lora": compare(times["lora"], times["tagi"], 2.0, "at_least", **told),
        "train_encoding_in_the_step_vs_once": compare(times["encoding"], times["tagi"], None, "at_least", **told),
    }


def _tasks_of(work: list[list[TaskChunk]]) -> list[Task]:
    return [chunk.task for chunks in work for chunk in chunks]


def distillation(study: Study, given: argparse.Namespace) -> Rows:
    """A whole step with both teachers' stores against the naive form.

    Naively every example's instruction is encoded in the step and its adapter generated anew, the teacher runs there
    too, and losses are taken from logits of all positions and tokens. Each task is a micro-batch of its own on both
    sides, as dealing by length has it: in one batch half of the inputs' positions would be padding.
    """
    chosen = [[chunk.task.name for chunk in chunks] for chunks in study.chunks(TASKS, EXAMPLES, BATCHES)]
    config = _with_stores(study, [name for names in chosen for name in names])
    tasks = {task.name: task for task in training_split(config.data, config.seed)[0]}
    work = [[chunk_of(tasks[name], EXAMPLES) for name in names] for names in chosen]
    online = dataclasses.replace(config, loss=dataclasses.replace(config.loss, logits="online"))
    ways = {"stores": _distilled(study, config, work), "naive": _distilled(study, online, work)}
    flops = {name: count(way) for name, way in ways.items()}
    times = take_turns(ways, given.runs, BATCHES, warm=False)
    told = {**study.lengths(work, config), "examples_per_s": rates(times, TASKS * EXAMPLES)}
    told["flops_ratio"] = round(flops["naive"] / flops["stores"], 4)
    return {"train_distilled_vs_naive": compare(times["naive"], times["stores"], 4.0, "at_least", **told)}


def _with_stores(study: Study, names: list[str]) -> RunConfig:
    """The configuration of a study over these tasks whose stores are made."""
    root = study.root / "distillation"
    (root / "sni" / "splits" / "default").mkdir(parents=True)
    (root / "sni" / "tasks").symlink_to((study.sni / "tasks").resolve())
    (root / "sni" / "splits" / "default" / "train_tasks.txt").write_text("\n".join(names), encoding="utf-8")
    config = study.config()
    config.study_dir, config.data.sni_dir = str(root), str(root / "sni")
    config.loss = LossConfig(kl=5.0, alignment="sigmoid")
    config.teachers.unit, config.data.max_instances, config.evaluation.batch_examples = "task", EXAMPLES, EXAMPLES
    store_logits.run(Stage("store_logits", config, current(), root / "store_logits"))
    make_parameter_store(config, training_split(config.data, config.seed)[0])
    return config


def _distilled(study: Study, config: RunConfig, work: list[Any]) -> Training:
    """Training with the teachers that the configuration names; ungrouped where one of them runs in the step."""
    tasks, _ = training_split(config.data, config.seed)
    teachers = open_distillation(config, tasks, study.tokenizer)
    model = build_tagi(config)
    stage = Stage("finetune", config, current(), study.root)
    objective, _ = hypernetwork.objective_and_source(stage, tasks, study.tokenizer, teachers, model.config.scaling)
    collator = study.collator("hypernetwork", config)
    if teachers.online is not None:
        reader = TeacherReader(study.tokenizer, config.data, 0, config.seed)
        collator = ReadingCollator(reader, study.tokenizer, config.data, "hypernetwork", "task")

    def make(chunks: Any) -> Batch:
        batch = collator(chunks)
        return teachers.attach(batch if teachers.online is None else ungrouped(batch))

    cache = study.cache_of(_tasks_of(work), config, model) if teachers.online is None else None
    if teachers.online is not None:
        objective = WholeLogits.of(objective)
    return Training(model, objective, make, [[[chunk] for chunk in chunks] for chunks in work], cache)


def as_it_is(batch: Batch) -> Batch:
    """A batch that is made before."""
    return batch


def ungrouped(batch: Batch) -> Batch:
    """The same examples, each with an instruction of its own."""
    assert batch.task_index is not None
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    owners = batch.task_index.tolist()
    return dataclasses.replace(
        batch,
        instruction_ids=batch.instruction_ids[batch.task_index],
        instruction_attention_mask=batch.instruction_attention_mask[batch.task_index],
        task_index=torch.arange(len(owners)),
        tasks=[batch.tasks[owner] for owner in owners],
        units=[batch.units[owner] for owner in owners],
    )


def lora(study: Study, given: argparse.Namespace) -> Rows:
    """TAGI's finetuning against peft's LoRA on the bare inputs, as a multiple of the counted operations' ratio."""
    work, config = study.chunks(TASKS, EXAMPLES, BATCHES), study.config()
    beside, bare = study.collator("hypernetwork", config), study.collator("input_only", config)
    steps = [[chunks] for chunks in work]
    ways = {
        "on": study.tagi_training(steps, config, beside, _tasks_of(work)),
        "off": study.tagi_training(steps, study.config(fusion=False), beside, _tasks_of(work)),
        "lora": study.plain_training(steps, study.config(), bare, lora=True),
    }
    told = {**study.lengths(work, config), "trained_parameters": {name: way.trained() for name, way in ways.items()}}
    flops = {name: count(way) for name, way in ways.items()}
    times = take_turns(ways, given.runs, BATCHES, warm=False)
    return {
        f"train_vs_lora_by_flops_fusion_{name}": compare_work(
            times[name], times["lora"], (flops[name], flops["lora"]), 1.15, "at_most", **told
        )
        for name in ("on", "off")
    }


def pretraining(study: Study, given: argparse.Namespace) -> Rows:
    """A step on a | b | c against peft's LoRA that reads a and b in one and predicts c."""
    if not given.c4.is_dir():
        raise SystemExit(f"{given.c4} is missing: name a folder of C4's shards with --c4")
    config = study.config()
    config.data.tasks_per_batch = DOCUMENTS
    source = DocumentMixture(given.c4, study.tokenizer, config.data, config.seed)
    work = [source.next_step()[0] for _ in range(BATCHES)]
    source.close()
    ways = {
        "tagi": study.tagi_training([[batch] for batch in work], config, as_it_is),
        "lora": study.plain_training([[batch] for batch in work], study.config(), joined, lora=True),
    }
    flops = {name: count(way) for name, way in ways.items()}
    times = take_turns(ways, given.runs, BATCHES, warm=False)
    masks = {"a": "instruction_attention_mask", "b": "attention_mask"}
    tokens = {part: sum(int(getattr(batch, name).sum()) for batch in work) for part, name in masks.items()}
    tokens["c"] = sum(batch.target_tokens for batch in work)
    told = {"documents": DOCUMENTS * BATCHES, "tokens": tokens, "flops_ratio": round(flops["tagi"] / flops["lora"], 4)}
    return {"train_pretrain_vs_lora": compare(times["tagi"], times["lora"], 1.25, "at_most", **told)}


def joined(batch: Batch) -> Batch:
    """The same tokens for a seq2seq model: each row's instruction and input as one source."""
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    # The end token behind the first part goes: an ordinary source has one.
    rows = [
        torch.cat([a[a_mask.bool()][:-1], b[b_mask.bool()]]).numpy()
        for a, a_mask, b, b_mask in zip(
            batch.instruction_ids, batch.instruction_attention_mask, batch.input_ids, batch.attention_mask, strict=True
        )
    ]
    ids, mask = pad_ids(rows)
    return Batch(ids, mask, batch.labels, task_index=batch.task_index, tasks=batch.tasks, units=batch.units)


def grouping(study: Study, given: argparse.Namespace) -> Rows:
    """16 tasks of one example against one task of 16, on the same inputs and targets."""
    rows: Rows = {}
    for form in ("def_2_pos", "def"):
        config = study.config(form)
        work = study.chunks(2 * EXAMPLES, 1)
        apart = study.collator("hypernetwork", config)(work[0])
        ways = {
            "apart": study.tagi_training([[apart]], config, as_it_is, _tasks_of(work)),
            "together": study.tagi_training([[with_tasks(apart, 1)]], config, as_it_is, _tasks_of(work)),
        }
        flops = {name: count(way) for name, way in ways.items()}
        times = take_turns(ways, given.runs, warm=False)
        told = {**study.lengths(work, config), "flops_ratio": round(flops["apart"] / flops["together"], 4)}
        rows[f"train_16x1_vs_1x16_{form}"] = compare(times["apart"], times["together"], 1.6, "at_most", **told)
    return rows


def with_tasks(batch: Batch, tasks: int) -> Batch:
    """The same inputs and targets under fewer of the batch's instructions, those of medium length for one task."""
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    lengths = batch.instruction_attention_mask.sum(1)
    order = lengths.argsort(stable=True)
    kept = order[[(2 * at + 1) * len(order) // (2 * tasks) for at in range(tasks)]]
    width = -(-int(lengths[kept].max()) // 8) * 8
    examples = len(batch.labels)
    return dataclasses.replace(
        batch,
        instruction_ids=batch.instruction_ids[kept, :width],
        instruction_attention_mask=batch.instruction_attention_mask[kept, :width],
        task_index=torch.arange(examples) * tasks // examples,
        tasks=[batch.tasks[at] for at in kept.tolist()],
        units=[batch.units[at] for at in kept.tolist()],
    )


def memory(study: Study, given: argparse.Namespace) -> Rows:
    """Peak memory and time of a step with stored distributions against the same step with full logits."""
    # Made here, so that the processes find it.
    assert study.backbone.is_dir()
    examples, targets = study.size.grid
    rows: Rows = {}
    # Beside it once with activations recomputed in the backward pass, without which they outweigh the logits.
    for name, recompute, runs, goal in (("", False, given.runs, 0.6), ("_recomputed", True, 1, None)):
        found: dict[str, list[dict[str, float]]] = {"own": [], "full": []}
        for at in range(runs):
            for form, figures in found.items():
                figures.append(peaks(study, form, recompute))
            print(f"run {at + 1}/{runs}", {form: figures[-1] for form, figures in found.items()}, flush=True)
        pairs = list(zip(found["own"], found["full"], strict=True))
        told = {"examples": examples, "target_tokens": targets, "vocabulary": study.size.shape["vocab_size"]}
        told["own_peak_gb"] = [round(figures["peak"] / 1e9, 4) for figures in found["own"]]
        goals = {"peak": goal, "beyond_model": None, "seconds": None}
        rows |= {
            f"train_full_logits_{figure}{name}": row(
                [a[figure] / b[figure] for a, b in pairs], wanted, "at_most", "ratio", **told
            )
            for figure, wanted in goals.items()
        }
    return rows


SCENARIOS = {
    "finetuning": finetuning,
    "distillation": distillation,
    "lora": lora,
    "pretraining": pretraining,
    "grouping": grouping,
    "memory": memory,
}


def main(argv: list[str] | None = None) -> Rows:
    return run("training", __doc__, SCENARIOS, draw_ratios, argv)


if __name__ == "__main__":
    main()
