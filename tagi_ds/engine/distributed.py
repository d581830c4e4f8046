"""Processes of a run: who they are, and the few collective operations that the engine needs.

Works without DeepSpeed; objects travel as JSON, never pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from tagi_ds.engine.ending import LOST_PEER, LOST_STATUS, speak
from tagi_ds.engine.signs import lost
from tagi_ds.engine.watch import Watch, operation_timeout
from tagi_ds.errors import UserError


class MeetingError(UserError):
    """The processes of a run cannot meet. Another try may do: a requeued job takes another port."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run.

    Attributes:
        rank: 0 .. world_size - 1 over all machines; local_rank: the same within the machine.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs and files."""
        return self.rank == 0


_ranks: Ranks | None = None
_watch: Watch | None = None
_firsts = 0
_ASK_S = 0.3
"""Pause between two questions whether rank 0 is done."""
_HEARD_S = 10.0
_TURN_S = 3.0


def start(timeout_s: int) -> Ranks:
    """Joins the process group that the launcher describes (deepspeed, torchrun, srun), or makes a group of one.

    Called again, it returns the same ranks.

    Args:
        timeout_s: seconds after which a process that does not join a collective operation ends the run.

    Raises:
        UserError: the launcher's variables contradict each other or are incomplete.
        MeetingError: the address is not reached, its port is taken, or not all processes come.
    """
    global _ranks, _watch
    if _ranks is not None:
        return _ranks
    quieten_libraries()
    _complete_environment()
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError as error:
        raise UserError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}", "start through a launcher"
        ) from error
    device = _device(local_rank)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Ranks on one machine would otherwise each take all of its cores.
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, here)))
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=operation_timeout(timeout_s),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise MeetingError(
            f"the processes cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{str(error).splitlines()[0]}",
            "where another program has that port (EADDRINUSE) start with --master_port PORT, a free one; else see that "
            "every process has started and reaches that address",
        ) from error
    if world_size > 1:
        _watch = Watch(rank, world_size, dist.distributed_c10d._get_default_store(), timeout_s)
    _ranks = Ranks(rank, world_size, local_rank, device)
    return _ranks


def stop() -> None:
    """Leaves the process group, if this process is in one."""
    global _ranks, _watch
    if _watch is not None:
        _watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    _ranks = _watch = None


def leave(status: int = 0) -> NoReturn:
    """Leaves the process group and ends this process; the last thing that a process of several ranks does.

    Gloo's threads may drop their last tensors while the interpreter is already being taken down, which aborts the
    process (status -6) after all its work is done; so the interpreter is not taken down.
    """
    stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def at(place: str) -> None:
    """Notes where in the run this process is (`step 7`), for the message that names a rank which does not arrive."""
    if _watch is not None:
        _watch.at(place)


def end(status: int, text: str, finishing: bool = False) -> NoReturn:
    """Ends this process on an error, and with it all others of the run, with one status and one line on stderr.

    Args:
        finishing: the others are about to end likewise, and are given time for that.
    """
    if _watch is not None:
        _watch.ending.declare(status, text, finishing=finishing)
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        # The same error usually stops rank 0 too, which then speaks for all; the launcher ends the others.
        time.sleep(_TURN_S)
    speak(rank, text)
    # Exits without the process group's farewell, which would wait for ranks that are gone.
    os._exit(status)


def end_after_lost_peer() -> NoReturn:
    """Ends the run after `is_lost_peer`: names the processes that have ended, and where."""
    if _watch is None:
        end(LOST_STATUS, LOST_PEER.format("another process"))
    gone = _watch.silent()
    if not gone:
        end(LOST_STATUS, LOST_PEER.format("another process"))
    # Where rank 0 has taken the store along, the first of the rest is the one to speak.
    speaks = 0 not in gone or current().rank == min(set(range(current().world_size)) - set(gone), default=0)
    told = LOST_PEER.format(lost(gone, [_watch.place_of(rank) for rank in gone]))
    _watch.ending.declare(LOST_STATUS, told if speaks else "", lost=gone)


def current() -> Ranks:
    """The ranks of this process; before `start`, those of a process on its own."""
    return _ranks or Ranks(0, 1, 0, torch.device("cpu"))


def is_main() -> bool:
    """True on the one process that writes logs and files."""
    return current().is_main


def barrier() -> None:
    """Waits until every rank is here."""
    if current().world_size > 1:
        all_reduce_sums({})


def main_first(work: Callable[[], object]) -> None:
    """Does `work` on rank 0 while the others wait, however long it takes: no collective operation runs out of time.

    Raises:
        UserError: rank 0's, on every rank.
        RuntimeError: rank 0 has ended otherwise (`is_lost_peer`).
    """
    ranks = current()
    if ranks.world_size == 1:
        work()
        return
    with _watch.unlimited() if _watch is not None else contextlib.nullcontext():
        _first_of_all(work, ranks)


def _first_of_all(work: Callable[[], object], ranks: Ranks) -> None:
    global _firsts
    _firsts += 1
    key, store = f"tagi_ds/main_first/{_firsts}", dist.distributed_c10d._get_default_store()
    if ranks.is_main:
        try:
            work()
        except UserError as error:
            store.set(key, json.dumps([error.problem, error.mend]))
            # The store ends with this process: the others are given time to read it.
            deadline = time.monotonic() + _HEARD_S
            while store.add(f"{key}/heard", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
                time.sleep(_ASK_S)
            raise
        store.set(key, "null")
        return
    while not store.check([key]):
        time.sleep(_ASK_S)
    failure = json.loads(store.get(key))
    if failure is not None:
        store.add(f"{key}/heard", 1)
        raise UserError(*failure)


def all_reduce_sums(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all ranks, in one all-reduce of float64.

    Every rank must name the same values.

    Raises:
        RuntimeError: they named different ones.
    """
    ranks = current()
    if ranks.world_size == 1:
        return {name: float(value) for name, value in values.items()}
    names = sorted(values)
    # A checksum of the names travels along: sums of unlike things would otherwise go unnoticed.
    mark = float(zlib.crc32("\0".join(names).encode()))
    sums = torch.tensor([mark, *(float(values[name]) for name in names)], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(sums)
    reduced = sums.tolist()
    if reduced[0] != mark * ranks.world_size:
        raise RuntimeError(f"rank {ranks.rank} reduces {names}, another rank something else")
    return {name: reduced[index + 1] for index, name in enumerate(names)}


def broadcast_object(value: Any) -> Any:
    """Rank 0's JSON-able value on every rank; what the others pass is ignored."""
    return value if current().world_size == 1 else gather_objects(value if is_main() else None)[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's JSON-able value, in the order of the ranks, on every rank."""
    ranks = current()
    if ranks.world_size == 1:
        return [value]
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=ranks.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=ranks.device) for _ in range(ranks.world_size)]
    dist.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=ranks.device))
    widest = max(int(size) for size in sizes)
    padded = torch.zeros(widest, dtype=torch.uint8, device=ranks.device)
    padded[: len(text)] = text
    texts: list[Tensor] = [torch.zeros_like(padded) for _ in range(ranks.world_size)]
    dist.all_gather(texts, padded)
    return [
        json.loads(bytes(part[: int(size)].cpu().tolist()).decode()) for part, size in zip(texts, sizes, strict=True)
    ]


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective operation failed because another process has ended or did not answer in time.

    An error that was raised from such a one is one too: whoever loads in shards takes it for damage to a file.
    """
    if error.__cause__ is not None and is_lost_peer(error.__cause__):
        return True
    backends = (r"gloo.*(Connection|Broken pipe|Timed out|Socket)", r"ncclRemoteError", r"NCCL.*remote process exited")
    if isinstance(error, dist.DistNetworkError):
        # The store that rank 0 keeps is gone.
        return True
    return isinstance(error, RuntimeError) and any(re.search(told, str(error), re.DOTALL) for told in backends)


def take_ranks_from_slurm() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of a task that srun started, where no launcher has."""
    environment = os.environ
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    # `2(x3),1`: two tasks on three nodes, one on the fourth.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, nodes in counts for _ in range(int(nodes or 1))]
    node = int(environment.get("SLURM_NODEID", "0"))
    if node < len(tasks):
        environment.setdefault("LOCAL_WORLD_SIZE", str(tasks[node]))
    if torch.cuda.is_available() and torch.cuda.device_count() == 1:
        # Bound to a GPU of its own (--gpus-per-task, --gpu-bind), a task sees no other.
        environment["LOCAL_RANK"] = "0"


def _complete_environment() -> None:
    """Fills RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher left them out."""
    environment = os.environ
    take_ranks_from_slurm()
    environment.setdefault("RANK", "0")
    environment.setdefault("WORLD_SIZE", "1")
    environment.setdefault("LOCAL_RANK", "0")
    if environment["WORLD_SIZE"] == "1":
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(_free_port()))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"{environment['WORLD_SIZE']} processes, but {' and '.join(missing)} not set",
            "start with `deepspeed`, torchrun or launchers/slurm/, or export them to the first machine's name and a "
            "free port",
        )


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quieten_libraries() -> None:
    """Sets the libraries' own switches, read when they are imported; a user's setting wins."""
    if not torch.cuda.is_available():
        # DeepSpeed would look for every accelerator it knows, and report that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed calls collectives under names that torch is renaming.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # peft asks for an attribute under a name that transformers is renaming.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
