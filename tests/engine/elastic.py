"""The toy model on tasks and documents, whose order no layout changes; run as a script it is one rank of a run."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, EngineConfig, OptimizerConfig
from tagi_ds.data.c4 import DocumentMixture
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.mixture import TaskMixture
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.engine import distributed, universal
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.strategy import make_strategy
from tagi_ds.engine.trainer import Interrupted, Trainer
from tagi_ds.errors import UserError
from tests.engine.toy import VOCABULARY, Toy, ToyBatch, ToyObjective

STEPS, GLOBAL, WIDTH = 12, 8, 24
SIZES = (40, 3, 26, 27)
"""Examples of the tasks: together an epoch of STEPS global batches."""
DATA = DataConfig(tasks_per_batch=GLOBAL, document_tokens=WIDTH, min_part_tokens=2, shuffle_block=3)
OPTIMIZER = OptimizerConfig(learning_rate=2e-2, weight_decay=0.1, clip=0.3, warmup=0.2, schedule="cosine")


def engine(strategy: str, world_size: int, **more: Any) -> EngineConfig:
    settings: dict[str, Any] = {"precision": "fp32", "steps": STEPS, "log_every": 1, "checkpoint_every": 3, **more}
    return EngineConfig(strategy=strategy, accumulation=4 // world_size, **settings)  # type: ignore[arg-type]


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for shard, size in enumerate([31, 0, 24, 53, 21]):
        rows = [json.dumps({"text": f"lamp {shard} box {row} " * 4}) + "\n" for row in range(size)]
        (folder / f"{shard}.jsonl").write_text("".join(rows), encoding="utf-8")


def tasks() -> list[Task]:
    made = []
    for number, size in enumerate(SIZES):
        examples = tuple(Example(f"t{number}-{row}", f"lamp {row} box {number}", (f"{row}",)) for row in range(size))
        made.append(Task(name=f"t{number}", definition=f"say {number}", category="", examples=examples))
    return made


class BothSource:
    """A share of the tasks' and of the documents' global batch, as one batch of the toy model."""

    def __init__(
        self, run_dir: Path, corpus: Path, tokenizer: PreTrainedTokenizerBase, ranks: distributed.Ranks, parts: int
    ) -> None:
        share = (ranks.rank, ranks.world_size, parts)
        self.tasks = TaskMixture(tasks(), Collator(tokenizer, DATA), 5, GLOBAL, 1, *share)
        self.documents = DocumentMixture(corpus, tokenizer, DATA, 5, *share)
        self.until = STEPS
        self.dealt = run_dir / "dealt.jsonl"

    def next_step(self) -> list[ToyBatch]:
        pairs = list(zip(self.tasks.next_step(), self.documents.next_step(), strict=True))
        if self.tasks.step == self.until < STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        self._note([list(pair[0].example_ids) for pair in pairs], [list(pair[1].example_ids) for pair in pairs])
        return [_toy_batch(*pair) for pair in pairs]

    def _note(self, *ids: list[list[str]]) -> None:
        """What both global batches hold, however they are dealt to ranks and micro-batches."""
        ranks = distributed.gather_objects(ids)
        names = [sorted(name for rank in ranks for part in rank[kind] for name in part) for kind in range(len(ids))]
        if distributed.is_main():
            with self.dealt.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.tasks.step, "tasks": names[0], "documents": names[1]}) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": self.tasks.state_dict(), "documents": self.documents.state_dict()}

    def join(self, shares: list[dict[str, Any]]) -> dict[str, Any]:
        return {**shares[0], "documents": self.documents.join([share["documents"] for share in shares])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tasks.load_state_dict(state["tasks"])
        self.documents.load_state_dict(state["documents"])


def _toy_batch(tasks: Batch, documents: Batch) -> ToyBatch:
    # To one width, so that the objective's means over positions do not depend on what else is in the batch.
    rows = [
        functional.pad(ids[mask.bool()][:WIDTH] % VOCABULARY, (0, WIDTH - min(WIDTH, int(mask.sum()))), value=-1)
        for batch in (tasks, documents)
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    ids = torch.stack(rows)
    labels = ((ids * 3 + 1) % VOCABULARY).masked_fill(ids < 0, -100)
    return ToyBatch(ids.clamp(min=0), labels, [*tasks.example_ids, *documents.example_ids])


def train(
    run_dir: Path,
    config: EngineConfig,
    corpus: Path,
    tokenizer: PreTrainedTokenizerBase,
    ranks: distributed.Ranks,
    until: int = STEPS,
    optimizer: OptimizerConfig = OPTIMIZER,
) -> int | None:
    """Trains to step `until`, where a signal stops the run; returns the step from which it went on."""
    torch.manual_seed(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    strategy = make_strategy(config, ranks)
    with strategy.model_context():
        model = Toy()
    strategy.prepare(model, optimizer, config.steps)
    source = BothSource(run_dir, corpus, tokenizer, ranks, config.accumulation)
    source.until = until
    trainer = Trainer(strategy, ToyObjective(), source, config, run_dir, Monitor(run_dir, "toy", config.steps))
    resumed: list[int | None] = []
    resume = trainer._resume
    trainer._resume = lambda: (resumed.append(resume()), resumed[-1])[1]  # type: ignore[method-assign]
    try:
        trainer.fit()
    except Interrupted:
        assert trainer.state.step == until
    return resumed[0]


def killed_at(point: str) -> None:
    """Kills this process at a point of the conversion."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write = universal.write_full_state

    def first_kind(folder: Path, kinds: dict[str, Any]) -> None:
        write(folder, dict(list(kinds.items())[:1]))
        die()

    if point == "while writing":
        universal.write_full_state = first_kind
    elif point == "before the manifest":
        universal.seal = die
    else:
        replace = os.replace

        def before_renaming(source: Any, target: Any) -> None:
            if Path(target).name.startswith("universal_"):
                die()
            replace(source, target)

        os.replace = before_renaming  # type: ignore[assignment]


def main() -> None:
    """Arguments: corpus, tokenizer, a JSON list of {dir, engine, until?, kill?}."""
    corpus, words, runs = Path(sys.argv[1]), load_tokenizer(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    ranks = distributed.start(60)
    for run in runs:
        if "kill" in run:
            killed_at(run["kill"])
        try:
            resumed = train(
                Path(run["dir"]), EngineConfig(**run["engine"]), corpus, words, ranks, run.get("until", STEPS)
            )
            print(f"RESUMED {resumed}", flush=True)
        except UserError as error:
            print(f"USER ERROR {error}", flush=True)
    distributed.leave()


if __name__ == "__main__":
    main()
