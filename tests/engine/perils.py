"""One rank of toy runs in which something goes wrong: `perils.py RUNS`, a JSON list of {dir, engine, optimizer,
poisoned, steep, sleeps, ends, hungry, narrow, patience, damages, apart}: calls of the objective at which the last
rank's loss or its gradient is infinite; the call in which it falls asleep, ends, asks for too much memory, or from
which on its disk takes no file above a thousand bytes; `timeout_s` once the run is on its way, since a busy machine may
take long to start one; a file that is damaged before the run begins; and whether each rank has a disk of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import disk, distributed
from tagi_ds.engine.objective import Term
from tagi_ds.errors import UserError
from tests.engine.toy import ToyBatch, ToyObjective, train

TOO_MUCH = 2**62
UNDER_WAY = 3
WIDE = resource.getrlimit(resource.RLIMIT_FSIZE)


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
        if call == self.run.get("narrow"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, WIDE[1]))
        terms = super().__call__(model, batch)
        label = terms["label"].value
        if call in self.run.get("poisoned", []):
            # Infinite, but by a constant: its gradient alone would show nothing.
            terms["label"] = Term(label + float("inf"), "tokens", 1.0)
        if call in self.run.get("steep", []):
            label.register_hook(lambda gradient: gradient * float("inf"))
        return terms


def prepared(run: dict[str, Any], ranks: distributed.Ranks) -> Path:
    """The run's folder, as this rank has it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, WIDE)
    if "damages" in run and ranks.is_main:
        with (Path(run["dir"]) / "checkpoints" / run["damages"]).open("r+b") as file:
            file.write(b"damage")
    distributed.barrier()
    if not run.get("apart"):
        return Path(run["dir"])
    disk.ARRIVES_S = 1.0
    return Path(run["dir"]) / f"disk_{ranks.rank}"


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.start(60)
    for run in json.loads(sys.argv[1]):
        folder = prepared(run, ranks)
        struck = ranks.rank == ranks.world_size - 1
        objective = Perilous(run if struck else {"patience": run["patience"]} if "patience" in run else {})
        try:
            settings = OptimizerConfig(**run["optimizer"])
            train(folder, EngineConfig(**run["engine"]), settings, ranks, objective=objective)
        except UserError as error:
            print(f"USER ERROR {error}", flush=True)
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            distributed.end_after_lost_peer()
    distributed.leave()


if __name__ == "__main__":
    main()
