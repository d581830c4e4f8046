"""One rank of toy runs in which something goes wrong: `perils.py RUNS`, a JSON list of {dir, engine, optimizer,
poisoned, steep, sleeps, ends, hungry, patience}: calls of the objective at which the last rank's loss or its gradient
is infinite; the call in which it falls asleep, ends or asks for too much memory; and `timeout_s` once the run is on its
way, since a busy machine may take long to start one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.objective import Term
from tagi_ds.errors import UserError
from tests.engine.toy import ToyBatch, ToyObjective, train

TOO_MUCH = 2**62
UNDER_WAY = 3


class Perilous(ToyObjective):
    """Meets its peril at given calls, each rank counting its own."""

    def __init__(self, run: dict[str, Any]) -> None:
        super().__init__()
        self.run = run

    def __call__(self, model: Any, batch: ToyBatch) -> dict[str, Term]:
        call = self.calls
        if call == UNDER_WAY and "patience" in self.run and distributed._watch is not None:
            distributed._watch.timeout_s, distributed._watch.beat_s = self.run["patience"], self.run["patience"] / 10
        if call == self.run.get("sleeps"):
            time.sleep(120)
        if call == self.run.get("ends"):
            os._exit(9)
        if call == self.run.get("hungry"):
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        terms = super().__call__(model, batch)
        label = terms["label"].value
        if call in self.run.get("poisoned", []):
            # Infinite, but by a constant: its gradient alone would show nothing.
            terms["label"] = Term(label + float("inf"), "tokens", 1.0)
        if call in self.run.get("steep", []):
            label.register_hook(lambda gradient: gradient * float("inf"))
        return terms


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.start(60)
    for run in json.loads(sys.argv[1]):
        struck = ranks.rank == ranks.world_size - 1
        objective = Perilous(run if struck else {"patience": run["patience"]} if "patience" in run else {})
        try:
            settings = OptimizerConfig(**run["optimizer"])
            train(Path(run["dir"]), EngineConfig(**run["engine"]), settings, ranks, objective=objective)
        except UserError as error:
            print(f"USER ERROR {error}", flush=True)
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            distributed.end_after_lost_peer()
    distributed.leave()


if __name__ == "__main__":
    main()
