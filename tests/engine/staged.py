"""A tiny TAGI with every loss on random batches; run as a script it is one rank of a run.

Arguments: BACKBONE and a JSON list of runs {dir, engine, dropout, kill_call, kill_save, term_call, poison, burst,
placed}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from tagi_ds.config import EngineConfig, LossConfig, OptimizerConfig
from tagi_ds.data.examples import Batch
from tagi_ds.divergence import FullDistributions
from tagi_ds.engine import distributed
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.objective import Term
from tagi_ds.engine.strategy import Strategy, make_strategy
from tagi_ds.engine.trainer import Interrupted, Trainer
from tagi_ds.errors import UserError
from tagi_ds.model import LowRank, Site, TagiConfig, TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone
from tagi_ds.model.head import Figures
from tagi_ds.objectives import TagiObjective
from tests.conftest import padded, stir
from tests.engine.toy import kill_while_publishing

TASKS, EACH, RANK = 4, 2, 3
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=0.5, warmup=0.2, schedule="cosine")
LOSS = LossConfig(kl=2.0, alignment="sigmoid")


def build_model(folder: Path, dropout: float) -> TagiForConditionalGeneration:
    torch.manual_seed(0)
    config = TagiConfig(rank=RANK, alpha=6.0, bottleneck=8)
    model = TagiForConditionalGeneration.from_backbone(load_backbone(folder, dropout_rate=dropout), config)
    stir(model)
    model.freeze()
    return model


def draw(generator: torch.Generator, sites: list[Site], vocabulary: int) -> Batch:
    """A global batch: every example and instruction of a length of its own, the last task without a LoRA teacher."""
    n = TASKS * EACH

    def lengths(count: int, most: int) -> list[int]:
        return torch.randint(2, most, (count,), generator=generator).tolist()

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    input_ids, attention_mask = padded(lengths(n, 12), generator)
    instruction_ids, instruction_mask = padded(lengths(TASKS, 9), generator)
    labels, real = padded(lengths(n, 6), generator)
    logits = FullDistributions(10 * normal(*labels.shape, vocabulary), torch.arange(n) % 3 > 0)
    adapters = {s.name: LowRank(normal(TASKS, RANK, s.d_in), normal(TASKS, s.d_out, RANK)) for s in sites}
    return Batch(
        input_ids,
        attention_mask,
        labels.masked_fill(real == 0, -100),
        instruction_ids,
        instruction_mask,
        torch.arange(n) // EACH,
        tasks=[f"task{i}" for i in range(TASKS)],
        teacher={"distributions": logits, "adapters": (adapters, torch.arange(TASKS) < TASKS - 1)},
    )


def part_of(batch: Batch, part: int, parts: int, step: int) -> Batch:
    """Some whole tasks of a global batch, padded to their own longest: no two parts need have one shape."""
    tasks = torch.arange(TASKS)[part::parts]
    assert batch.task_index is not None
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    rows = torch.cat([(batch.task_index == task).nonzero().flatten() for task in tasks])

    def cut(tensor: Tensor, which: Tensor, mask: Tensor) -> Tensor:
        return tensor[which, : int(mask[which].sum(1).max())]

    (adapters, present), real = batch.teacher["adapters"], (batch.labels != -100).long()
    logits: FullDistributions = batch.teacher["distributions"]
    mine = {name: LowRank(a[tasks], b[tasks]) for name, (a, b) in adapters.items()} if present[tasks].any() else {}
    length = int(real[rows].sum(1).max())
    return Batch(
        cut(batch.input_ids, rows, batch.attention_mask),
        cut(batch.attention_mask, rows, batch.attention_mask),
        cut(batch.labels, rows, real),
        cut(batch.instruction_ids, tasks, batch.instruction_attention_mask),
        cut(batch.instruction_attention_mask, tasks, batch.instruction_attention_mask),
        torch.arange(len(tasks)).repeat_interleave(EACH),
        [f"step{step}-example{int(row)}" for row in rows],
        [batch.tasks[task] for task in tasks],
        teacher={
            "distributions": FullDistributions(logits.logits[rows, :length], logits.present[rows]),
            "adapters": (mine, present[tasks]),
        },
    )


class Source:
    """Draws each global batch from Python's and numpy's own generators, so that resuming must restore them.

    With `placed` a batch is its position's, as the real sources' are: on another layout the generators begin anew.
    """

    def __init__(self, strategy: Strategy, sites: list[Site], vocabulary: int, placed: bool) -> None:
        self.replica, self.accumulation = strategy.replica, strategy.engine_config.accumulation
        self.placed = placed
        self.sites, self.vocabulary, self.position = sites, vocabulary, 0

    def next_step(self) -> list[Batch]:
        drawn = random.randrange(2**31) ^ int(np.random.randint(2**31))
        seed = 1000 + self.position if self.placed else drawn
        whole = draw(torch.Generator().manual_seed(seed), self.sites, self.vocabulary)
        self.position += 1
        first, parts = self.replica.index * self.accumulation, self.replica.count * self.accumulation
        return [part_of(whole, first + i, parts, self.position) for i in range(self.accumulation)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Faulty(TagiObjective):
    """Sends its process a signal at the start of a given micro-batch, or makes a label loss nan from one on."""

    def __init__(
        self, sites: list[Site], scaling: float, number: int | None, at: int | None, poison: int | None
    ) -> None:
        # A store's mean square: a batch's own would depend on how it is dealt.
        super().__init__(LOSS, scaling, mean_square={site.name: 4.0 for site in sites})
        self.number, self.at, self.poison, self.calls, self.judged = number, at, poison, 0, 0

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        if self.number is not None and self.calls == self.at and batch.example_ids:
            os.kill(os.getpid(), self.number)
        self.calls += bool(batch.example_ids)
        return super().inputs(batch)

    def terms(self, figures: Figures, batch: Batch, errors: Tensor | None) -> dict[str, Term]:
        terms = super().terms(figures, batch, errors)
        self.judged += bool(batch.example_ids)
        if self.poison is not None and self.judged > self.poison:
            terms["label"] = Term(terms["label"].value * float("nan"), "tokens", 1.0)
        return terms


def train(folder: Path, run: dict[str, Any], ranks: distributed.Ranks) -> dict[str, Any]:
    engine, run_dir = EngineConfig(**run["engine"]), Path(run["dir"])
    # A stage in the middle, or the last one's first replica: whoever it is, all must go down together.
    struck = ranks.rank == ranks.world_size // 2
    number = signal.SIGKILL if "kill_call" in run else signal.SIGTERM if "term_call" in run else None
    at = run.get("kill_call", run.get("term_call"))
    if "kill_save" in run:
        kill_while_publishing(run["kill_save"])
    random.seed(1)
    np.random.seed(2)
    strategy = make_strategy(engine, ranks)
    with strategy.model_context():
        model = build_model(folder, run.get("dropout", 0.0))
    model.to(strategy.dtype)
    if engine.activation_checkpointing:
        model.backbone.gradient_checkpointing_enable()
    sites, vocabulary, scaling = model.site_table, model.backbone.config.vocab_size, model.config.scaling
    strategy.prepare(model, OPTIMIZER, engine.steps)
    if run.get("burst") and struck:
        trained = next(parameter for parameter in strategy.module.parameters() if parameter.requires_grad)
        trained.register_hook(lambda gradient: gradient * float("inf"))
    torch.manual_seed(100 + ranks.rank)
    source = Source(strategy, sites, vocabulary, run.get("placed", False))
    objective = Faulty(sites, scaling, number if struck else None, at, run.get("poison"))
    held_out = draw(torch.Generator().manual_seed(77), sites, vocabulary)
    batches = [part_of(held_out, part, 4, 0) for part in range(4)][strategy.replica.index :: strategy.replica.count]
    for batch in batches:
        batch.example_ids = []

    def evaluate(step: int) -> dict[str, float]:
        terms = strategy.evaluate(objective, batches)
        values = {f"validation/{n}": float(sum(float(t[n].value) for t in terms)) for n in terms[0]}
        sums = distributed.all_reduce_sums(strategy.replica.spoken(values))
        return {**sums, "validation/loss": abs(step - 8.0)}

    monitor = Monitor(run_dir, "staged", engine.steps)
    return Trainer(strategy, objective, source, engine, run_dir, monitor, evaluate).fit()


def metrics_of(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> losses, validation sums, rate and gradient norm."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"metrics.jsonl repeats or jumbles steps: {steps}"
    kept = ("loss/", "validation/", "lr", "grad_norm")
    return {line["step"]: {name: value for name, value in line.items() if name.startswith(kept)} for line in lines}


def main() -> None:
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    disable_progress_bar()
    ranks = distributed.start(60)
    for run in runs:
        try:
            print(f"SUMMARY {json.dumps(train(folder, run, ranks))}", flush=True)
        except UserError as error:
            print(f"USER ERROR {error}", flush=True)
        except Interrupted as error:
            print(f"INTERRUPTED {error.code}", flush=True)
    distributed.leave()


if __name__ == "__main__":
    main()
