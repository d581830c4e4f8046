"""What answering with a compiled task costs beside its alternatives.

python tests/benchmarks/inference.py --output docs/performance.json --picture docs/inference_speed.png

A T5 of 60M parameters with 32,128 tokens and random weights, fp32, on SNI's test tasks of 100 examples. Every way
answers the same examples in batches of like lengths, greedily, with as many new tokens as the references have at the
mean, so that none is cheaper for stopping early. All answer by the way of evaluation and `answer.py`
(:mod:`tagi_ds.model.inference`), the alternatives too: plain T5s without any hook of ours, decoded by the same loop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from tagi_ds.build import build_tagi
from tagi_ds.data.examples import Batch, Task
from tagi_ds.evaluation.cost import operations_of, spread, ways_of
from tagi_ds.evaluation.dealing import collate_pairs, evaluating, plan_batches
from tagi_ds.evaluation.generation import GenerationSettings
from tagi_ds.model.adapter import TaskState
from tagi_ds.model.backbone import load_backbone
from tagi_ds.model.compiled import compile_task, stack
from tagi_ds.model.inference import Inference
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tests.benchmarks.figures import compare, compare_work, rates, row, take_turns
from tests.benchmarks.speed_command import Rows, draw_ratios, run
from tests.benchmarks.speed_study import Study, count
from tests.benchmarks.uncomputed import Uncomputed

TASKS, BATCH = 1, 50
COUNTED_WAYS = ("concatenated", "once", "compiled")
MIXED_TASKS, MIXED_EXAMPLES = 4, 16


@dataclass
class Asked:
    """One task's examples as the ways read them.

    Attributes:
        instruction: (1, S) ids without padding.
        bare, joined: batches of inputs alone, and behind the instruction.
        new_tokens: of every answer.
    """

    instruction: Tensor
    bare: list[Batch]
    joined: list[Batch]
    new_tokens: int


def ask(study: Study, task: Task, form: str, examples: int | None = None, batch: int = BATCH) -> Asked:
    """A task's first examples, all by default, in batches of like lengths."""
    config = study.config(form)
    parts = plan_batches([(task, task.examples[at]) for at in range(len(task.examples))][:examples], batch)
    bare, joined = (
        [collate_pairs(study.collator(kind, config))(part) for part in parts]
        for kind in ("hypernetwork", "concatenated")
    )
    ids, mask = bare[0].instruction_ids, bare[0].instruction_attention_mask
    assert ids is not None
    assert mask is not None
    instruction = ids[:, : int(mask.sum())]
    targets = sum(each.target_tokens for each in bare)
    return Asked(instruction, bare, joined, max(1, round(targets / sum(len(each.labels) for each in bare))))


def answer(inference: Inference, batches: Sequence[Batch], new_tokens: int, **more: Any) -> None:
    """Greedy answers of so many tokens to all batches."""
    for batch in batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **more}
        inference.generate(inputs, new_tokens, new_tokens)


def tagi(study: Study, **settings: Any) -> TagiForConditionalGeneration:
    """A model whose adapters and fusion are not zero, as after training."""
    model = build_tagi(study.config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.hypernetwork.named_parameters():
            if name.endswith(("b_head.weight", "o.weight")):
                nn.init.normal_(parameter, std=0.01)
    return model


def plain(study: Study, folder: Path | None = None) -> Any:
    """A T5 as transformers has it; by default the study's backbone."""
    return load_backbone(folder or study.backbone).eval()


def answering(
    model: TagiForConditionalGeneration, states: Sequence[TaskState], questions: Sequence[Asked], merge: bool = True
) -> Callable[[], None]:
    """Answers from compiled tasks; that adapters are merged, where they are, is part of every run."""

    def way() -> None:
        with Inference(model, merge=merge) as inference:
            for state, asked in zip(states, questions, strict=True):
                answer(inference, asked.bare, asked.new_tokens, task=state)

    return way


def plainly(backbone: Any, questions: Sequence[Asked], joined: bool = False) -> Callable[[], None]:
    """Answers of a plain T5 to bare inputs, or behind the instruction."""

    def way() -> None:
        with Inference(backbone) as inference:
            for asked in questions:
                answer(inference, asked.joined if joined else asked.bare, asked.new_tokens)

    return way


def concatenation(study: Study, given: argparse.Namespace) -> Rows:
    """Compiled tasks against the backbone that reads the instruction with every input, Def + 2 Pos."""
    questions = [ask(study, task, "def_2_pos") for task in spread(study.unseen, TASKS)]
    model, backbone = tagi(study), plain(study)

    states = _compiled(model, questions)
    ways = {"compiled": answering(model, states, questions), "concatenated": plainly(backbone, questions, joined=True)}
    # One batch each warms up; a whole run would take a minute.
    answer(Inference(model, merge=False), questions[0].bare[-1:], questions[0].new_tokens, task=states[0])
    answer(Inference(backbone), questions[0].joined[-1:], questions[0].new_tokens)
    times = take_turns(ways, given.runs, warm=False)
    told = _told(questions)
    told["examples_per_s"] = rates(times, told["examples"])
    figures = compare(times["concatenated"], times["compiled"], 2.5, "at_least", **told)
    return {"inference_compiled_vs_concatenation": figures}


def bare(study: Study, given: argparse.Namespace) -> Rows:
    """Compiled tasks with fusion against the backbone without instruction, as a multiple of the operations' ratio."""
    questions = [ask(study, task, "def_2_pos") for task in spread(study.unseen, TASKS)]
    model, backbone = tagi(study), plain(study)

    ways = {
        "compiled": answering(model, _compiled(model, questions), questions),
        "bare": plainly(backbone, questions),
    }
    flops = {name: count(way) for name, way in ways.items()}
    times = take_turns(ways, given.runs, warm=False)
    told = _told(questions)
    told["examples_per_s"] = rates(times, told["examples"])
    pair = (flops["compiled"], flops["bare"])
    figures = compare_work(times["compiled"], times["bare"], pair, 1.15, "at_most", **told)
    return {"inference_compiled_vs_bare_by_flops": figures}


def merged(study: Study, given: argparse.Namespace) -> Rows:
    """A merged adapter against the bare backbone, fusion and concatenation off; unmerged beside it."""
    questions = [ask(study, task, "def_2_pos") for task in spread(study.unseen, 1)]
    model, backbone = tagi(study, fusion=False, concatenate=False), plain(study)
    states = _compiled(model, questions)
    ways: dict[str, Callable[[], None]] = {
        "merged": answering(model, states, questions),
        "unmerged": answering(model, states, questions, merge=False),
        "bare": plainly(backbone, questions),
    }
    times = take_turns(ways, given.runs)
    told = _told(questions)
    return {
        "inference_merged_vs_bare": compare(times["merged"], times["bare"], 1.05, "at_most", **told),
        "inference_unmerged_vs_bare": compare(times["unmerged"], times["bare"], None, "at_most", **told),
    }


def relative_flops(study: Study, given: argparse.Namespace) -> Rows:
    """Counted operations of 100 examples a task, the instruction read once, against concatenation; all test tasks.

    The row with the goal has the tasks whose instruction and inputs fit together: where concatenation cuts, it reads
    less than what it is compared with. The row of all tasks stands beside it.
    """
    rows: Rows = {}
    settings, model = GenerationSettings(batch_examples=BATCH), tagi(study)
    for form, goal in (("def_2_pos", 0.36), ("def", None)):
        config = study.config(form)
        collators = study.collator("hypernetwork", config), study.collator("concatenated", config)
        counted: dict[str, dict[str, Any]] = {}
        # Answers have a fixed length, so that no product need be computed to be counted.
        with evaluating(model), Uncomputed():
            for task in study.unseen:
                runs, tokens = ways_of(model, task, collators, settings)
                operations = {way: operations_of(runs[way]) for way in COUNTED_WAYS}
                share = operations["once"] / operations["concatenated"]
                # The end token behind the first of the two goes.
                cut = tokens["concatenated"] < tokens["instruction"] + tokens["input"] - 1.5
                counted[task.name] = {
                    "relative": round(share, 4),
                    "cut": cut,
                    "tokens": tokens,
                    "operations": operations,
                }
                print(task.name, round(share, 4), "cut" if cut else "", tokens, flush=True)
        whole = [told for told in counted.values() if not told["cut"]]
        name = f"inference_relative_flops_{form}"
        rows[name] = _relative_row(whole, goal, per_task=counted)
        rows[f"{name}_all_tasks"] = _relative_row(list(counted.values()), None)
    return rows


def _relative_row(counted: Sequence[dict[str, Any]], goal: float | None, **more: Any) -> dict[str, Any]:
    """A count has no spread: one run, the sum over the tasks, in which those with long inputs weigh most."""
    sums = {way: sum(told["operations"][way] for told in counted) for way in COUNTED_WAYS}
    shares = [told["relative"] for told in counted]
    figures = {
        "compiled": round(sums["compiled"] / sums["concatenated"], 4),
        "mean_over_tasks": round(statistics.mean(shares), 4),
        "median_over_tasks": round(statistics.median(shares), 4),
        "tasks": len(counted),
    }
    return row([sums["once"] / sums["concatenated"]], goal, "at_most", "ratio", **figures, **more)


def mixed(study: Study, given: argparse.Namespace) -> Rows:
    """Batches whose examples are of several tasks against batches of one task each, the same examples.

    The latter with adapters merged and unmerged.
    """
    tasks = spread(study.unseen, MIXED_TASKS)
    questions = [ask(study, task, "def_2_pos", MIXED_EXAMPLES, MIXED_EXAMPLES) for task in tasks]
    new_tokens = max(asked.new_tokens for asked in questions)
    for asked in questions:
        asked.new_tokens = new_tokens
    model = tagi(study)
    collate = collate_pairs(study.collator("hypernetwork", study.config()))
    runs = [
        plan_batches(
            [(task, task.examples[at]) for at in range(min(MIXED_EXAMPLES, len(task.examples)))],
            MIXED_EXAMPLES // MIXED_TASKS,
        )
        for task in tasks
    ]
    # The longest of each task, then the next: evaluation's batches of small tasks, each task's examples in a row.
    batches = [collate([pair for part in parts for pair in part]) for parts in zip(*runs, strict=True)]
    states = _compiled(model, questions)
    state = stack(states)

    def across() -> None:
        with Inference(model) as inference:
            for batch in batches:
                answer(inference, [batch], new_tokens, task=state, task_index=batch.task_index)

    ways = {
        "mixed": across,
        "apart": answering(model, states, questions),
        "apart, unmerged": answering(model, states, questions, merge=False),
    }
    times = take_turns(ways, given.runs)
    told = _told(questions)
    told["examples_per_s"] = rates(times, told["examples"])
    merging = compare(times["apart"], times["apart, unmerged"], None, "at_most")
    told["one_task_merged_over_unmerged"] = {name: merging[name] for name in ("ratio", "cpu_ratio", "runs")}
    return {"inference_mixed_vs_one_task": compare(times["mixed"], times["apart"], None, "at_most", **told)}


def _compiled(model: TagiForConditionalGeneration, questions: Sequence[Asked]) -> list[TaskState]:
    return [compile_task(model, asked.instruction, None).state for asked in questions]


def _told(questions: Sequence[Asked]) -> dict[str, Any]:
    """What is measured, for its row: tokens a task, means."""

    def mean(batches: Sequence[Batch]) -> float:
        return round(sum(int(b.attention_mask.sum()) for b in batches) / sum(len(b.labels) for b in batches), 1)

    tokens = [
        {
            "instruction": asked.instruction.shape[1],
            "input": mean(asked.bare),
            "concatenated": mean(asked.joined),
            "output": asked.new_tokens,
        }
        for asked in questions
    ]
    examples = sum(len(batch.labels) for asked in questions for batch in asked.bare)
    return {"tasks": len(questions), "examples": examples, "tokens": tokens}


SCENARIOS = {
    "concatenation": concatenation,
    "bare": bare,
    "merged": merged,
    "relative_flops": relative_flops,
    "mixed": mixed,
}


def main(argv: list[str] | None = None) -> Rows:
    return run("inference", __doc__, SCENARIOS, draw_ratios, argv)


if __name__ == "__main__":
    main()
