"""One rank that builds a strategy and then waits until every group has the run's timeout: `granted.py STRATEGY`."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.watch import operation_timeout
from tests.engine.toy import build

TIMEOUT_S, PATIENCE_S = 3600, 30


def timeouts() -> list[float]:
    """Seconds of every process group of this rank."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.start(TIMEOUT_S)
    build(EngineConfig(strategy=sys.argv[1], precision="fp32", steps=2), OptimizerConfig(), ranks)  # type: ignore[arg-type]
    assert len(timeouts()) > 1, "DeepSpeed makes groups of its own"
    asked, deadline = operation_timeout(TIMEOUT_S).total_seconds(), time.monotonic() + PATIENCE_S
    while set(timeouts()) != {asked} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(timeouts()) == {asked}, timeouts()
    distributed.leave()


if __name__ == "__main__":
    main()
