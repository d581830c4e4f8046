"""Whether the nodes of a job can be trusted with a stage: run by ``srun`` as the stage would be, before it.

    srun python -m tagi_ds.cluster.health STAGE --config RECIPE

Every process looks at its device and its node's disks; then they compute sums together, first within each node, then
all of them. After each of these it is gathered what was found, over a connection that needs no device, and nothing
further is tried once there is a fault: it would spoil the sums of those that are well. A line
``unhealthy NODE: REASON`` is printed for each node that fails; the status is then 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tagi_ds import recipe
from tagi_ds.engine.distributed import take_ranks_from_slurm
from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable
from tagi_ds.launch import USER_ERROR_STATUS

ANSWER_S = 180.0
"""Seconds within which every process must have spoken, its start included; TAGI_DS_HEALTH_S says otherwise."""
SUM_S = 60.0
"""Seconds for a sum, which begins when all have spoken."""
_SPARE_S = 15.0
"""Beyond that, until every process has said what became of its sum."""
_LEAVE_S = 10.0
FREE_SHARE = 0.9
"""Of a device's memory; less is left where something else is at work on it."""
FREE_DISK = 2**26
"""Bytes on each disk; a checkpoint's own need is checked before training."""
UNHEALTHY_STATUS = 1
TOGETHER = "*"
"""In the place of a node where all fail together, and none can be told from the others."""
_LOCAL = "LOCAL_WORLD_SIZE"
_SUM_IN_NODE = "a sum within the node"
_SUM_OF_ALL = "a sum over all nodes"


@dataclass(frozen=True)
class Place:
    """This process among those of the check."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: str

    @classmethod
    def of_environment(cls) -> Place:
        """As srun or another launcher says."""
        take_ranks_from_slurm()
        # A task that sees one GPU alone has LOCAL_RANK 0.
        local_rank = os.environ.get("SLURM_LOCALID") or os.environ.get("LOCAL_RANK") or "0"
        rank, size, local_size = (os.environ.get(n, d) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1"), (_LOCAL, "1")))
        return cls(
            int(rank),
            int(size),
            int(local_rank),
            int(local_size),
            os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, and prints what is wrong; returns the status."""
    stage, *flags = sys.argv[1:] if arguments is None else arguments
    place = Place.of_environment()
    try:
        config = recipe.parse(stage, flags).config
        answer_s = _answer_s()
    except UserError as error:
        if place.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_STATUS
    # Not tempfile's choice, which would pass over a disk that cannot be written to.
    fault = fault_here(place, [Path(config.study_dir), Path(os.environ.get("TMPDIR", "/tmp"))])
    try:
        faults = faults_of_all(place, fault, answer_s)
    except (RuntimeError, OSError) as error:
        # Rank 0's node keeps the store and names those that do not reach it.
        print(f"[rank {place.rank}] {place.node} does not reach the job's first node: {error}", flush=True)
        return UNHEALTHY_STATUS
    if place.rank == 0:
        for node, reason in faults.items():
            print(f"all nodes: {reason}" if node == TOGETHER else f"unhealthy {node}: {reason}", flush=True)
    return UNHEALTHY_STATUS if faults else 0


def _answer_s() -> float:
    text = os.environ.get("TAGI_DS_HEALTH_S", str(ANSWER_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"TAGI_DS_HEALTH_S is {text!r}", "give it seconds, or leave it out")
    return seconds


def fault_here(place: Place, folders: Sequence[Path]) -> str | None:
    """What is wrong with this process's device or with its node's disks; None: nothing."""
    for folder in folders if place.local_rank == 0 else ():
        try:
            ensure_writable(folder)
            space = os.statvfs(folder)
        except (UserError, OSError) as error:
            return getattr(error, "problem", str(error))
        if space.f_bavail * space.f_frsize < FREE_DISK:
            return f"{space.f_bavail * space.f_frsize / 2**20:.0f} MiB are free under {folder}"
    try:
        return _device_fault(place)
    except RuntimeError as error:
        return f"device {place.local_rank}: {str(error).splitlines()[0]}"


def _device_fault(place: Place) -> str | None:
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if not promised:
        return None
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    bound = seen == 1 and place.local_size > 1
    if seen < promised and not bound:
        return f"{seen} of {promised} GPUs are visible"
    device = torch.device("cuda", 0 if bound else place.local_rank)
    free, total = torch.cuda.mem_get_info(device)
    if free < FREE_SHARE * total:
        return f"GPU {place.local_rank} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    ones = torch.ones(1024, 1024, device=device)
    if not torch.equal(ones @ ones, 1024 * ones):
        return f"GPU {place.local_rank} multiplies wrongly"
    return None


def faults_of_all(place: Place, fault: str | None, answer_s: float) -> dict[str, str]:
    """Node -> what is wrong, over all processes; what rank 0 returns counts.

    Args:
        fault: what this process has found by itself.
        answer_s: seconds within which every process must have spoken.

    Raises:
        RuntimeError: rank 0 cannot be reached.
    """
    if place.world_size == 1:
        return {place.node: fault} if fault else {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=answer_s)
    store = dist.TCPStore(address, port, place.world_size, place.rank == 0, timeout=wait, wait_for_workers=False)
    faults = _told(store, place, "here", fault, answer_s)
    for scope in (_SUM_IN_NODE, _SUM_OF_ALL):
        if not faults:
            faults = _told(store, place, scope, _sum_fault(store, place, scope), SUM_S + _SPARE_S)
    # The store ends with rank 0: it waits until all have read what they need.
    store.set(f"left/{place.rank}", "")
    if place.rank == 0:
        _await(store, [f"left/{rank}" for rank in range(place.world_size)], _LEAVE_S)
    return faults


def _told(store: dist.TCPStore, place: Place, what: str, fault: str | None, wait_s: float) -> dict[str, str]:
    """Gathers what every process found, on rank 0, which tells the others."""
    store.set(f"{what}/{place.rank}", json.dumps([place.node, fault]))
    if place.rank == 0:
        keys = [f"{what}/{rank}" for rank in range(place.world_size)]
        _await(store, keys, wait_s)
        answers = [json.loads(store.get(key)) for key in keys if store.check([key])]
        faults = judge(answers, os.environ.get("TAGI_DS_NODES", place.node).split(), wait_s)
        store.set(what, json.dumps(faults))
    # Rank 0 itself waits as long for the answers.
    store.wait([what], timedelta(seconds=2 * wait_s))
    told: dict[str, str] = json.loads(store.get(what))
    return told


def _await(store: dist.TCPStore, keys: list[str], wait_s: float) -> None:
    with contextlib.suppress(RuntimeError):
        store.wait(keys, timedelta(seconds=wait_s))


def judge(answers: Sequence[tuple[str, str | None]], nodes: Sequence[str], wait_s: float) -> dict[str, str]:
    """Node -> what is wrong with it; :data:`TOGETHER` where a sum over all nodes fails, which tells of no single one.

    Args:
        answers: (node, fault) of each process that has spoken, rank 0's among them.
        nodes: all of the job's, the first being rank 0's.
        wait_s: seconds in which the others have not spoken.
    """
    found = {node: fault for node, fault in answers if fault}
    faults = {node: fault for node, fault in found.items() if not fault.startswith(_SUM_OF_ALL)}
    spoken = {node for node, _ in answers}
    silent = [node for node in nodes if node not in spoken]
    if found and not faults and not silent:
        return {TOGETHER: next(iter(found.values()))}
    if len(silent) > 1 and len(silent) == len(nodes) - 1:
        # Nobody reaches the first node: then it is not the others that are at fault.
        return {**faults, nodes[0]: "no other node reaches it"}
    return {**faults, **dict.fromkeys(silent, f"no answer within {wait_s:g} s")}


def _sum_fault(store: dist.TCPStore, place: Place, scope: str) -> str | None:
    """What is wrong with a sum over the node's processes, or over all; None: nothing.

    It runs in a thread: where another process cannot take part, NCCL may never return.
    """
    within = scope == _SUM_IN_NODE
    rank, size = (place.local_rank, place.local_size) if within else (place.rank, place.world_size)
    if size == 1:
        return None
    found: list[str | None] = []

    def add_up() -> None:
        try:
            right = _is_right(dist.PrefixStore(f"{scope}/{place.node if within else ''}", store), place, rank, size)
            found.append(None if right else f"{scope} is wrong")
        except RuntimeError as error:
            found.append(f"{scope} fails: {str(error).splitlines()[0]}")

    thread = threading.Thread(target=add_up, daemon=True)
    thread.start()
    # torch's own error, should it come, says more.
    thread.join(SUM_S + _SPARE_S / 2)
    return found[0] if found else f"{scope} fails: it does not come within {SUM_S:g} s"


def _is_right(store: dist.Store, place: Place, rank: int, size: int) -> bool:
    """Whether a sum over a group's processes is what it should be.

    Raises:
        RuntimeError: it does not come.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=SUM_S)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    values = torch.full((2**18,), float(rank + 1), device=device)
    dist.all_reduce(values)
    right = bool((values == size * (size + 1) / 2).all())
    dist.destroy_process_group()
    return right


if __name__ == "__main__":
    # NCCL's errors are to be told here, by an exception; torch would abort the process, which then has not spoken.
    os.environ |= {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    status = main()
    sys.stdout.flush()
    # Without farewell: a sum may still hang.
    os._exit(status)
