"""What each teacher learns: the units of a store, and which of their examples a step sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from tagi_ds.config import TeacherConfig
from tagi_ds.data.examples import Example, Task, unit_of, without_categories
from tagi_ds.data.order import permutation
from tagi_ds.errors import UserError

Pair = tuple[Task, Example]


class Members(Sequence[Pair]):
    """Some examples of some tasks, read when they are asked for: memory grows with the tasks alone.

    Args:
        tasks: the tasks.
        places: positions in the concatenation of the tasks' examples.
    """

    def __init__(self, tasks: Sequence[Task], places: np.ndarray) -> None:
        self._tasks, self._places = tuple(tasks), places
        self._ends = np.cumsum([len(task.examples) for task in tasks])

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Members: ...
    def __getitem__(self, index: int | slice) -> Pair | Members:
        """One pair of task and example, or fewer members."""
        if isinstance(index, slice):
            return Members(self._tasks, self._places[index])
        place = int(self._places[index])
        number = int(np.searchsorted(self._ends, place, side="right"))
        task = self._tasks[number]
        return task, task.examples[place - int(self._ends[number] - len(task.examples))]


@dataclass(frozen=True)
class Unit:
    """What one teacher learns.

    Attributes:
        name: category, task or data set.
        train, validation: (task, example) pairs, disjoint; both hold the example of a unit that has only one.
    """

    name: str
    train: Sequence[Pair]
    validation: Sequence[Pair]


def make_units(tasks: Sequence[Task], config: TeacherConfig, seed: int) -> list[Unit]:
    """Every unit of the training tasks, in a seeded order, each with its validation share.

    Teachers are trained for the first `config.max_units` of them. Examples are not read here.

    Raises:
        UserError: a task does not say what unit it belongs to, or none of SNI's tasks does.
    """
    if config.unit == "category" and without_categories(tasks):
        raise UserError(
            f"teachers.unit category, and none of the {len(tasks)} training tasks names its own: one teacher for all",
            "set teachers.unit task, or name a checkout of natural-instructions (tasks/*.json) as data.sni_dir",
        )
    members: dict[str, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: task.name):
        name = unit_of(task, config.unit)
        if not name:
            raise UserError(
                f"task {task.name} names no {config.unit}, so it has no teacher",
                f"choose another --teachers.unit, or leave tasks without a {config.unit} out of the training split",
            )
        if len(task.examples):
            members.setdefault(name, []).append(task)
    names = sorted(members)
    units = []
    for name in (names[i] for i in permutation(len(names), seed, "teacher units", 0)):
        size = sum(len(task.examples) for task in members[name])
        order = permutation(size, seed, "teacher validation", name)
        held = min(max(1, round(config.validation_share * size)), size - 1)
        train, validation = Members(members[name], order[held:]), Members(members[name], order[:held])
        units.append(Unit(name, train, validation or train))
    return units


def draw(unit: Unit, examples: int, step: int, seed: int) -> list[Pair]:
    """The examples of a step: consecutive places in one permutation an epoch, a function of the unit alone."""
    size = len(unit.train)
    places = [divmod(position, size) for position in range(step * examples, (step + 1) * examples)]
    orders = {epoch: permutation(size, seed, f"teacher {unit.name}", epoch) for epoch in {e for e, _ in places}}
    return [unit.train[int(orders[epoch][place])] for epoch, place in places]
