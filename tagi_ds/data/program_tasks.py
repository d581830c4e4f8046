"""Writes the embedded benchmark: record-rewriting tasks in Super-NaturalInstructions' format.

``python -m tagi_ds.data.program_tasks FOLDER --seed 0`` writes ``tasks/``, ``splits/default/``, ``c4/en/`` (a corpus
in C4's format about the same world) and ``tokenizer/``. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tagi_ds.data.program_operations import OPERATIONS, Program, Words
from tagi_ds.data.program_plan import Plan, PlannedTask, plan_benchmark
from tagi_ds.data.program_world import FIELDS, apply_step, run_program, word_program
from tagi_ds.data.tokenizer import train_tokenizer
from tagi_ds.files import whole_folder

SPLIT_FILES = {
    "train": "train_tasks",
    "validation": "validation_tasks",
    "seen": "test_seen",
    "unseen_arguments": "test_unseen_arguments",
    "unseen_compositions": "test_unseen_compositions",
}
"""Group of tasks -> name of its split file, without ``.txt``."""

SHARDS = 4
VOCABULARY = 600
PROMPT_TEXT = "Definition: Positive Negative Example 1 2 - Input: Output: Now complete the following example -"


def generate(folder: Path, seed: int = 0, documents_per_shard: int = 2000) -> Plan:
    """Writes the benchmark; an existing folder is replaced as a whole.

    Args:
        folder: to hold tasks/, splits/, c4/ and tokenizer/.
        seed: of every choice.
        documents_per_shard: documents in each of the corpus's four shards.

    Returns:
        What was written: every task of every group with its program and records.

    Raises:
        UserError: the folder cannot be written.
    """
    plan = plan_benchmark(seed)
    with whole_folder(folder) as aside:
        (aside / "tasks").mkdir()
        for tasks in plan.groups.values():
            for task in tasks:
                (aside / "tasks" / f"{task.name}.json").write_text(_to_json(task_json(task)), encoding="utf-8")
        splits = {SPLIT_FILES[group]: [task.name for task in tasks] for group, tasks in plan.groups.items()}
        splits["test_tasks"] = splits["test_unseen_arguments"] + splits["test_unseen_compositions"]
        (aside / "splits/default").mkdir(parents=True)
        for name, names in splits.items():
            (aside / f"splits/default/{name}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        _write_corpus(aside / "c4/en", plan.groups["train"], seed, documents_per_shard)
        train_tokenizer(_tokenizer_texts(plan.groups["train"]), aside / "tokenizer", VOCABULARY)
    return plan


def task_json(task: PlannedTask) -> dict[str, Any]:
    """One task in the form of an SNI task file."""
    answers = [" ".join(run_program(task.program, record)) for record in task.records]
    inputs = [" ".join(record) for record in task.records]
    shown = [" ".join(record) for record in task.shown]
    shown_answers = [" ".join(run_program(task.program, record)) for record in task.shown]
    return {
        "Contributors": ["tagi_ds"],
        "Source": ["program_tasks"],
        "URL": ["https://github.com/allenai/natural-instructions"],
        "Categories": [category_of(task.program)],
        "Reasoning": [],
        "Definition": word_program(task.program),
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Instruction_language": ["English"],
        "Domains": ["Records"],
        "Positive Examples": [
            {"input": x, "output": y, "explanation": "this follows the definition"}
            for x, y in zip(shown[:2], shown_answers[:2], strict=True)
        ],
        "Negative Examples": [
            {"input": shown[2], "output": shown[2], "explanation": "the words are as they were in the input"}
        ],
        "Instances": [
            {"id": f"{task.name}-{number}", "input": x, "output": [y]}
            for number, (x, y) in enumerate(zip(inputs, answers, strict=True))
        ],
        "Instance License": ["Apache 2.0"],
    }


def category_of(program: Program) -> str:
    """A primitive task's operation, or the families of a composition's two steps, in words."""
    if len(program) == 1:
        return program[0].operation.replace("_", " ").capitalize()
    first, second = (OPERATIONS[step.operation].family for step in program)
    return f"{first.capitalize()} then {second}"


def floors(tasks: Iterable[PlannedTask]) -> dict[str, float]:
    """Exact match in percent, averaged over tasks, of not solving them.

    Returns:
        `copy`: the input repeated. `first_step`, `second_step`: that step alone (primitives count 0).
    """
    scores: dict[str, list[float]] = {"copy": [], "first_step": [], "second_step": []}
    for task in tasks:
        hits = dict.fromkeys(scores, 0)
        for record in task.records:
            answer = run_program(task.program, record)
            hits["copy"] += answer == record
            if len(task.program) == 2:
                hits["first_step"] += answer == apply_step(task.program[0], record)
                hits["second_step"] += answer == apply_step(task.program[1], record)
        for name, count in hits.items():
            scores[name].append(100 * count / len(task.records))
    return {name: sum(values) / max(1, len(values)) for name, values in scores.items()}


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _write_corpus(folder: Path, tasks: list[PlannedTask], seed: int, per_shard: int) -> None:
    """Documents whose beginning helps to predict their end: a training task and its worked lines."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        rows = []
        for number in range(per_shard):
            rng = random.Random(f"{seed}/document/{shard}/{number}")
            text = _description(rng.choice(tasks), rng) if rng.random() < 0.15 else _worked(rng.choice(tasks), rng)
            day = f"2024-{1 + number % 12:02d}-{1 + number % 28:02d}T00:00:00Z"
            rows.append(_to_json({"text": text, "timestamp": day, "url": f"https://example.org/{shard}/{number}"}))
        path = folder / f"c4-train.{shard:05d}-of-{SHARDS:05d}.json.gz"
        # A fixed time and no name in the header keep the bytes the same from run to run.
        with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
            packed.write("".join(rows).encode("utf-8"))


def _worked(task: PlannedTask, rng: random.Random) -> str:
    lines = [
        f"{' '.join(record)} -> {' '.join(run_program(task.program, record))}"
        for record in rng.sample(task.records, rng.randint(3, 6))
    ]
    return rng.choice(word_program(task.program)) + ".\n" + "\n".join(lines)


def _description(task: PlannedTask, rng: random.Random) -> str:
    return "\n".join(_described(record) for record in rng.sample(task.records, rng.randint(2, 4)))


def _described(record: Words) -> str:
    parts = [f"the {name} is {word}" for word in record for name, words in FIELDS.items() if word in words]
    return f"{' '.join(record)}: {', '.join(parts)}."


def _tokenizer_texts(tasks: list[PlannedTask]) -> Iterable[str]:
    """Training texts; every word often enough to become a piece of its own."""
    texts = [text for task in tasks for text in word_program(task.program)]
    for task in tasks:
        texts += [" ".join(record) for record in task.records[:10]] + [_described(task.records[0])]
    sample = task_json(tasks[0])
    texts += [f"{PROMPT_TEXT} {item['explanation']} ->" for item in sample["Positive Examples"]] * 200
    texts += [f"{PROMPT_TEXT} {item['explanation']} ->" for item in sample["Negative Examples"]] * 200
    words = sorted({word for text in texts for word in re.findall(r"\w+", text)})
    # A run of equal words cannot form longer pieces, so the word itself is what saves most.
    return texts + [f"{word} {word} {word}" for word in words for _ in range(100)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the embedded benchmark.")
    parser.add_argument("folder", type=Path, help="folder to write; replaced as a whole")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    plan = generate(arguments.folder, arguments.seed)
    for group, tasks in plan.groups.items():
        figures = ", ".join(f"{name} {value:.1f}" for name, value in floors(tasks).items())
        print(f"{SPLIT_FILES[group]}: {len(tasks)} tasks; exact match of {figures}")
    print(f"written to {arguments.folder}")


if __name__ == "__main__":
    main()
