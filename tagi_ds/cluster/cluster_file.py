"""What jobs ask a cluster for: a small YAML file, one table for all stages and exceptions for single ones."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from tagi_ds.config import STAGES
from tagi_ds.errors import UserError
from tagi_ds.strict_yaml import read_yaml

_TIME = re.compile(r"\d+|\d+:\d{2}(:\d{2})?|\d+-\d{1,2}(:\d{2}(:\d{2})?)?")
_MEMORY = re.compile(r"\d+[KMGT]?")
SHARED = ("train_teachers", "store_logits", "evaluate")
"""Stages whose work several jobs divide among themselves."""
SINGLE = ("convert",)
"""Stages that one process does alone."""


@dataclass(frozen=True)
class Resources:
    """What a stage's job asks for; a field that is None is left to the cluster's default."""

    account: str | None = None
    """--account."""
    partition: str | None = None
    """--partition; several with commas."""
    qos: str | None = None
    """--qos."""
    constraint: str | None = None
    """--constraint: features of a node, e.g. h100."""
    time: str | None = None
    """--time: the limit of one job, not of the study: a job that reaches it goes on in its next turn."""
    nodes: int = 1
    """Machines of one job."""
    gpus_per_node: int = 0
    """GPUs, and processes, of each machine; 0: `processes_per_node` on the processor."""
    gpu_type: str | None = None
    """Kind of GPU where the cluster tells them apart, e.g. a100."""
    processes_per_node: int = 1
    """Processes of each machine where there are no GPUs."""
    cpus_per_task: int | None = None
    """Cores for each process."""
    memory: str | None = None
    """--mem of each machine, e.g. 480G; 0: all there is."""
    exclude: str | None = None
    """--exclude: machines to keep away from, e.g. n[13,17]."""
    jobs: int | None = None
    """Jobs that divide the work of train_teachers, store_logits or evaluate. Default: 1; for evaluate one a method."""
    signal_s: int = 300
    """Seconds before the time limit at which a job is told to write a checkpoint and to make way."""
    deaths: int = 3
    """Times that a job may die before it is given up; making way does not count."""
    health: bool = True
    """Check the machines before each stage."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, e.g. --reservation=course."""

    @property
    def processes_of_node(self) -> int:
        """Processes of each machine, on GPUs or on its processor."""
        return self.gpus_per_node or self.processes_per_node

    @property
    def processes(self) -> int:
        """Processes of one job."""
        return self.nodes * self.processes_of_node


@dataclass(frozen=True)
class ClusterFile(Resources):
    """The whole file: resources, what prepares a job's shell, and the stages' exceptions."""

    modules: list[str] = field(default_factory=list)
    """`module load` before anything else."""
    setup: str = ""
    """Shell lines after that: activate an environment, export NCCL's variables."""
    container: str | None = None
    """Image that the processes run in; it needs the requirements, not the package."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts it: srun's --container-image, or apptainer exec."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders that the container sees, HOST[:INSIDE]; the checkout and the study's are added."""
    python: str = "python"
    """The interpreter, as the job finds it after `setup` or inside the container."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> fields above that differ for it."""

    def resources(self, stage: str) -> Resources:
        """What a stage's jobs ask for."""
        names = [each.name for each in dataclasses.fields(Resources)]
        values = {**{name: getattr(self, name) for name in names}, **self.stages.get(stage, {})}
        if stage in SINGLE:
            values |= {"nodes": 1, "gpus_per_node": min(1, values["gpus_per_node"]), "processes_per_node": 1}
        return Resources(**values)


def read_cluster_file(path: Path) -> ClusterFile:
    """Reads and checks a cluster file.

    Raises:
        UserError: it is missing or not YAML; an unknown key, named with the nearest one; a value of a wrong type or
            range.
    """
    tree = read_yaml(path) if path.is_file() else {}
    if not path.is_file():
        raise UserError(
            f"the cluster file {path} is missing", "copy launchers/slurm/cluster.yaml and fill in your account"
        )
    stages = tree.get("stages") or {}
    _check_tree(path, "", {key: value for key, value in tree.items() if key != "stages"}, ClusterFile)
    if not isinstance(stages, dict):
        raise UserError(f"{path}: stages is {stages!r}", "map names of stages to the fields that differ for them")
    for stage, fields in stages.items():
        if stage not in STAGES:
            raise UserError(f"{path}: unknown stage stages.{stage}{_near(str(stage), STAGES)}", _known(STAGES))
        if not isinstance(fields, dict):
            raise UserError(f"{path}: stages.{stage} is {fields!r}", "put the fields that differ under it")
        _check_tree(path, f"stages.{stage}.", fields, Resources)
        if fields.get("jobs") is not None and fields["jobs"] > 1 and stage not in SHARED:
            raise UserError(
                f"{path}: stages.{stage}.jobs is {fields['jobs']}, but only one job can do {stage}",
                f"jobs divide the work of {', '.join(SHARED)}; give others more nodes",
            )
    if tree.get("jobs") is not None:
        raise UserError(f"{path}: jobs stands in the common part", f"put it under a stage: {', '.join(SHARED)}")
    return ClusterFile(**{**tree, "stages": stages})


def _check_tree(path: Path, prefix: str, tree: dict[Any, Any], kind: type) -> None:
    kinds = typing.get_type_hints(kind)
    for key, value in tree.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {prefix}{key}{_near(str(key), kinds)}", _known(kinds))
        wanted = _wanted(key, value, kinds[key])
        if wanted:
            raise UserError(f"{path}: {prefix}{key} is {value!r}", f"give {wanted}")


def _wanted(key: str, value: Any, kind: Any) -> str | None:
    """What a value should be, where it is not."""
    if value is None:
        return None if type(None) in typing.get_args(kind) else "a value, or leave the key out"
    if isinstance(kind, UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is Literal:
        return None if value in typing.get_args(kind) else "one of " + ", ".join(typing.get_args(kind))
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is int:
        least = 0 if key in ("gpus_per_node", "deaths") else 1
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if good else f"a whole number of at least {least}"
    if typing.get_origin(kind) is list:
        good = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return None if good else "a list of texts"
    if key == "time":
        # YAML reads 24:00:00 as a number in base 60 unless it is quoted.
        return None if isinstance(value, str) and _TIME.fullmatch(value) else 'a quoted text: "24:00:00" or "2-00:00"'
    if key == "memory":
        return None if isinstance(value, str) and _MEMORY.fullmatch(value) else 'a text like "480G", or "0" for all'
    # A line break would end the #SBATCH line that the value stands in.
    good = isinstance(value, str) and (key == "setup" or "\n" not in value)
    return None if good else "one line of text"


def _near(key: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _known(names: typing.Iterable[str]) -> str:
    return f"known are {', '.join(names)}"
