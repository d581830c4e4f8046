"""A tiny next-token model with a frozen part, its data and objective; run as a script it is one rank of a run."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.checkpoint import CheckpointStore
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.objective import Term
from tagi_ds.engine.strategy import Strategy, make_strategy
from tagi_ds.engine.trainer import Interrupted, Trainer
from tagi_ds.errors import UserError

VOCABULARY, WIDTH, EXAMPLES, LENGTH = 23, 16, 8, 7


class Toy(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(dropout))
        self.out = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for frozen in (self.embedding, self.head):
            frozen.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        return self.head(embedded + self.out(self.block(embedded)))


@dataclass
class ToyBatch:
    ids: Tensor
    labels: Tensor
    example_ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> ToyBatch:
        return ToyBatch(self.ids.to(device), self.labels.to(device), self.example_ids)


class ToySource:
    """Draws each global batch from Python's and numpy's own generators, so that resuming must restore them."""

    def __init__(self, rank: int, world_size: int, accumulation: int) -> None:
        self.rank, self.world_size, self.accumulation, self.position = rank, world_size, accumulation, 0

    def next_step(self) -> list[ToyBatch]:
        generator = torch.Generator().manual_seed(random.randrange(2**31) ^ int(np.random.randint(2**31)))
        ids = torch.randint(VOCABULARY, (EXAMPLES, LENGTH), generator=generator)
        labels = (ids * 3 + 1) % VOCABULARY
        # Unequal numbers of target tokens: a mean of means would give another loss.
        for row in range(EXAMPLES):
            labels[row, 1 + (row * 5 + self.position) % LENGTH :] = -100
        names = [f"step{self.position + 1}-example{row}" for row in range(EXAMPLES)]
        self.position += 1
        parts = self.world_size * self.accumulation
        mine = range(self.rank * self.accumulation, (self.rank + 1) * self.accumulation)
        return [ToyBatch(ids[i::parts], labels[i::parts], names[i::parts]) for i in mine]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class ToyObjective:
    def __init__(self) -> None:
        self.calls = 0

    def counts(self, batch: ToyBatch) -> dict[str, float]:
        return {"tokens": float((batch.labels != -100).sum()), "examples": float(len(batch.ids))}

    def __call__(self, model: Any, batch: ToyBatch) -> dict[str, Term]:
        self.calls += 1
        logits = model(batch.ids)
        nll = functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum")
        size = logits.float().square().mean(dim=(1, 2)).sum()
        return {
            "label": Term(nll, "tokens", 1.0),
            "size": Term(size, "examples", 0.01),
            "seen": Term(logits.detach().float().abs().mean(), None, 0.0),
        }


def build(
    engine: EngineConfig, optimizer: OptimizerConfig, ranks: distributed.Ranks, dropout: float = 0.0
) -> tuple[Strategy, ToySource]:
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)
    strategy = make_strategy(engine, ranks)
    with strategy.model_context():
        model = Toy(dropout)
    strategy.prepare(model, optimizer, engine.steps)
    torch.manual_seed(100 + ranks.rank)
    return strategy, ToySource(ranks.rank, ranks.world_size, engine.accumulation)


def train(
    run_dir: Path,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    ranks: distributed.Ranks,
    dropout: float = 0.0,
    objective: ToyObjective | None = None,
) -> tuple[dict[str, Any], Strategy]:
    strategy, source = build(engine, optimizer, ranks, dropout)

    def evaluate(step: int) -> dict[str, float]:
        return {"validation/loss": abs(step - 8.0)}

    monitor = Monitor(run_dir, "toy", engine.steps)
    trainer = Trainer(strategy, objective or ToyObjective(), source, engine, run_dir, monitor, evaluate)
    return trainer.fit(), strategy


def losses_of(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """Step -> what must not depend on interruptions: losses, rate and gradient norm."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/total", "loss/label", "loss/size", "loss/seen", "lr", "grad_norm")
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"metrics.jsonl repeats or jumbles steps: {steps}"
    return {line["step"]: tuple(line[name] for name in names) for line in lines}


class Struck(ToyObjective):
    """Sends its process a signal in the forward of a given call."""

    def __init__(self, at_call: int, number: int) -> None:
        super().__init__()
        self.at_call, self.number = at_call, number

    def __call__(self, model: Any, batch: ToyBatch) -> dict[str, Term]:
        if self.calls == self.at_call:
            os.kill(os.getpid(), self.number)
        return super().__call__(model, batch)


class Poisoned(ToyObjective):
    """Multiplies the loss by nan from a given call on."""

    def __init__(self, at_call: int) -> None:
        super().__init__()
        self.at_call = at_call

    def __call__(self, model: Any, batch: ToyBatch) -> dict[str, Term]:
        terms = super().__call__(model, batch)
        if self.calls > self.at_call:
            terms["label"] = Term(terms["label"].value * float("nan"), "tokens", 1.0)
        return terms


def kill_while_publishing(step: int) -> None:
    """Kills the process when the parts of that step's checkpoint are written, but not yet its manifest."""
    publish = CheckpointStore._publish

    def killing(self: CheckpointStore, strategy: Strategy, state: Any, *others: Any) -> None:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, strategy, state, *others)

    CheckpointStore._publish = killing  # type: ignore[method-assign]


def main() -> None:
    """Argument: a JSON list of runs {dir, engine, optimizer, dropout, kill_call, term_call, kill_save, poison}."""
    runs = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    ranks = distributed.start(60)
    for run in runs:
        rank_is_struck = ranks.rank == ranks.world_size - 1
        objective = ToyObjective()
        if "kill_call" in run and rank_is_struck:
            objective = Struck(run["kill_call"], signal.SIGKILL)
        if "term_call" in run and rank_is_struck:
            objective = Struck(run["term_call"], signal.SIGTERM)
        if "poison" in run and rank_is_struck:
            objective = Poisoned(run["poison"])
        if "kill_save" in run:
            kill_while_publishing(run["kill_save"])
        try:
            optimizer = OptimizerConfig(**run.get("optimizer", {}))
            summary, _ = train(
                Path(run["dir"]), EngineConfig(**run["engine"]), optimizer, ranks, run.get("dropout", 0.0), objective
            )
            print(f"SUMMARY {json.dumps(summary)}", flush=True)
        except UserError as error:
            print(f"USER ERROR {error}", flush=True)
        except Interrupted as error:
            print(f"INTERRUPTED {error.code}", flush=True)
    distributed.leave()


if __name__ == "__main__":
    main()
