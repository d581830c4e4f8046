"""The launches of a study, and what they are for.

A node's identity is the hash of the fields that matter to its stage and of the identities of what it needs, so
whatever is the same for several variants or parts is launched once, and a study's file may change without losing what
still holds. Nodes are plain: a command, a folder, names of other nodes. Whoever can run commands in that order can run
a study.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tagi_ds import run_folder
from tagi_ds.config import RunConfig
from tagi_ds.experiments.definition import Point

BENCHMARK = "benchmark"
"""The stage, so to speak, that writes the embedded benchmark."""
NODES_FOLDER = "nodes"
"""Of a study's folder."""


@dataclass(frozen=True)
class Node:
    """One launch.

    Attributes:
        name: of its folder; readable, and unique by its end.
        stage: names the launcher, or :data:`BENCHMARK`.
        home: what the launcher takes for its study's folder; nothing else lies there.
        arguments: of the launcher.
        needs: names of the nodes that must be done before.
        identity: hash of what decides its outcome.
        config: resolved; None for the benchmark.
        price_of: nodes whose training compute decides its number of steps; its own start is not among them.
    """

    name: str
    stage: str
    home: Path
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    identity: str
    config: RunConfig | None = field(default=None, compare=False)
    price_of: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The stage's run folder."""
        return self.home / self.stage

    @property
    def model(self) -> Path:
        """The model folder that a training or converting node leaves."""
        return self.run_dir / "model"

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        if self.stage == BENCHMARK:
            return (self.run_dir / "tokenizer").is_dir()
        return run_folder.is_done(self.run_dir)

    def summary(self) -> dict[str, Any]:
        """What the launch recorded at its end; empty for the benchmark."""
        return {} if self.stage == BENCHMARK else run_folder.done_summary(self.run_dir)


@dataclass(frozen=True)
class Cell:
    """One variant with one seed.

    Attributes:
        part, variant, seed: which.
        trained: the node whose run is the model; None where nothing is trained.
        evaluated: the node that evaluates it.
        training: every node that its training took, those that it shares included.
    """

    part: str
    variant: str
    seed: int
    trained: str | None
    evaluated: str
    training: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One point of the tuning grid for one method and seed, and the node that was trained there."""

    method: str
    point: Point
    seed: int
    trained: str


@dataclass
class Plan:
    """All nodes, each behind what it needs, and what they are for."""

    nodes: dict[str, Node] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    def closure(self, names: Iterable[str]) -> tuple[str, ...]:
        """The named nodes with all that they need, in order."""
        wanted: set[str] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name not in wanted:
                wanted.add(name)
                left += self.nodes[name].needs
        return tuple(name for name in self.nodes if name in wanted)
