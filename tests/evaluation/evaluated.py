"""A small evaluation of a saved TAGI model: a group that is answered freely and one that is ranked.

Run as a script by several ranks: ``evaluated.py MODEL OUT...`` evaluates into each OUT folder in turn, the last time as
if parameters were sharded, and notes in ``OUT/rank<k>.json`` how often this rank's model ran.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tagi_ds.config import DataConfig, EvaluationConfig
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Example, Task
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.engine import distributed
from tagi_ds.evaluation.dealing import collate_pairs
from tagi_ds.evaluation.results import evaluate
from tagi_ds.model import TagiForConditionalGeneration

CHOICES = ("lamp", "the bell again", "chair", "say")
DATA = DataConfig(prompt="plain", max_source_tokens=64, max_target_tokens=6)


def groups() -> dict[str, list[Task]]:
    """Nine batches of three rows each freely answered, and ranked ones of unlike sizes."""

    def example(name: str, number: int, ranked: bool) -> Example:
        text = f"say the {CHOICES[number % 4]} " * (1 + number % 3)
        choices = CHOICES[: 2 + number % 3] if ranked else ()
        return Example(f"{name}-{number}", text, (CHOICES[number % 2],), choices)

    def task(at: int, ranked: bool) -> Task:
        name = f"{'ranked' if ranked else 'open'}{at}"
        examples = tuple(example(name, number, ranked) for number in range(9))
        return Task(name, f"{CHOICES[at]} or chair?", "c", examples, source=f"s{at}")

    return {"open": [task(at, False) for at in range(3)], "choices": [task(at, True) for at in range(3)]}


def run(model: TagiForConditionalGeneration, folder: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """Evaluates `model` into `folder`."""
    tokenizer = load_tokenizer(tokenizer_folder)
    collator = Collator(tokenizer, DATA, "hypernetwork")
    return evaluate(
        model,
        tokenizer,
        groups(),
        collate_pairs(collator),
        EvaluationConfig(batch_examples=4),
        DATA.max_target_tokens,
        folder,
        "tagi",
        "default",
        {"model": "x"},
        {"instruction": "own"},
        lambda text: collator.encode(text, "target"),
        progress=False,
    )


def count_runs(model: TagiForConditionalGeneration) -> list[str]:
    """A list that grows by a word with every run of the backbone's encoder and head."""
    runs: list[str] = []
    for name in ("encoder", "lm_head"):
        getattr(model.backbone, name).register_forward_hook(lambda *_, name=name: runs.append(name))
    return runs


def main() -> None:
    """One rank."""
    torch.set_num_threads(1)
    distributed.start(timeout_s=100)
    model_folder, *outputs = map(Path, sys.argv[1:])
    model = TagiForConditionalGeneration.from_pretrained(model_folder)
    runs = count_runs(model)
    for folder in outputs:
        runs.clear()
        if folder == outputs[-1]:
            next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
        run(model, folder, model_folder)
        note = {"encoder": runs.count("encoder"), "all": len(runs)}
        (folder / f"rank{distributed.current().rank}.json").write_text(json.dumps(note))
    distributed.leave()


if __name__ == "__main__":
    main()
