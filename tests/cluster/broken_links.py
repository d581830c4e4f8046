"""One of three processes on two nodes, the second of which cannot add up: `broken_links.py FOLDER`.

There one process's sum fails, and the other's never comes back, as with NCCL.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch.distributed as dist

from tagi_ds.cluster import health
from tagi_ds.launch import DEFAULT_RECIPE

RANK = int(os.environ["RANK"])
PLACES = {0: ("n1", "0", "1"), 1: ("n2", "0", "2"), 2: ("n2", "1", "2")}
all_reduce = dist.all_reduce


def broken(tensor: Any, *arguments: Any, **named: Any) -> Any:
    if RANK == 1:
        raise RuntimeError("NVLink is broken")
    if RANK == 2:
        time.sleep(100)
    return all_reduce(tensor, *arguments, **named)


def main() -> int:
    os.environ["SLURMD_NODENAME"], os.environ["SLURM_LOCALID"], os.environ["LOCAL_WORLD_SIZE"] = PLACES[RANK]
    os.environ["TAGI_DS_NODES"] = "n1 n2"
    health.SUM_S = 5.0
    dist.all_reduce = broken
    return health.main(["finetune", "--config", str(DEFAULT_RECIPE), "--study_dir", sys.argv[1]])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
