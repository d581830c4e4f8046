"""Which tasks the embedded benchmark has: training, validation, and the three test groups."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tagi_ds.data.program_operations import OPERATIONS, Program, Step, Words
from tagi_ds.data.program_world import (
    FIELD_OF,
    draw_inputs,
    every_step,
)

COMPOSITIONS = 1500
"""Compositions in training."""
UNSEEN_COMPOSITIONS, VALIDATION_COMPOSITIONS, SEEN = 108, 40, 32
"""Tasks at least in these groups; SEEN of the primitives and as many of the compositions."""
TRAIN_INSTANCES, TRAIN_COMPOSITION_INSTANCES, TEST_INSTANCES, VALIDATION_INSTANCES = 100, 60, 20, 12
"""Instances a task."""
SHOWN = 3
"""Records shown in a task's instruction (two positive examples, one negative), never among its instances."""

# Training, test and validation arguments of an operation, by the kind of its arguments.
_SHARES = {
    "none": (1, 0, 0),
    "field": (5, 1, 0),
    "pair": (11, 3, 1),
    "fields": (19, 4, 2),
    "word": (30, 6, 3),
    "word_of_field": (36, 8, 4),
    "word_and_field": (36, 8, 4),
}
# One field of six held out leaves five; half of these operations keep all six.
_WHOLE = ("keep_field", "double_field", "cut_before", "name_field")


@dataclass(frozen=True)
class PlannedTask:
    """A task to write: its file's stem, its program, the instances' records and the instruction's."""

    name: str
    program: Program
    records: list[Words]
    shown: list[Words]


@dataclass(frozen=True)
class Plan:
    """The benchmark's tasks by group: train, validation, seen, unseen_arguments, unseen_compositions."""

    seed: int
    groups: dict[str, list[PlannedTask]]


def plan_benchmark(seed: int) -> Plan:
    """Draws every group's programs and records; the same for the same seed everywhere.

    Unseen arguments: a training operation with an argument that training has with other operations only.
    Unseen compositions: training primitives whose pair of operations training never has, in either order.
    """
    train, test, validation = _split_primitives(random.Random(f"{seed}/primitives"))
    train_pairs, test_pairs, validation_pairs = _split_pairs(random.Random(f"{seed}/pairs"))
    used: set[Program] = set()
    compose = _Composer(train, seed, used)
    compositions = {
        "train": compose.over(train_pairs, COMPOSITIONS, TRAIN_COMPOSITION_INSTANCES + TEST_INSTANCES),
        "unseen": compose.over(test_pairs, UNSEEN_COMPOSITIONS, TEST_INSTANCES),
        "validation": compose.over(validation_pairs, VALIDATION_COMPOSITIONS, VALIDATION_INSTANCES),
    }
    primitives = {
        "train": _drawn(train, seed, TRAIN_INSTANCES + TEST_INSTANCES),
        "unseen": _drawn(test, seed, TEST_INSTANCES),
        "validation": _drawn(validation, seed, VALIDATION_INSTANCES),
    }
    return Plan(seed, _named(primitives, compositions, random.Random(f"{seed}/seen")))


_Drawn = list[tuple[Program, list[Words]]]


def _split_primitives(rng: random.Random) -> tuple[list[Step], list[Step], list[Step]]:
    train: list[Step] = []
    test: list[Step] = []
    validation: list[Step] = []
    for name in sorted(OPERATIONS):
        operation = OPERATIONS[name]
        # Some arguments never change a record, as moving the size to the front.
        steps = [s for s in every_step(operation) if draw_inputs((s,), random.Random(repr(s)), 8) is not None]
        rng.shuffle(steps)
        n_train, n_test, n_validation = (len(steps), 0, 0) if name in _WHOLE else _SHARES[operation.arguments]
        if operation.arguments == "word_and_field":
            # A word once at most, so that the operations' training arguments spread over all words.
            steps = list({step.word: step for step in steps}.values())
        test += steps[:n_test]
        validation += steps[n_test : n_test + n_validation]
        train += steps[n_test + n_validation : n_test + n_validation + n_train]
    held_out = test + validation
    missing = sorted(set(FIELD_OF) - {step.word for step in train})
    spare = [s for name in ("insert_before", "insert_after") for s in every_step(OPERATIONS[name])]
    # Every word occurs in training, and a held-out step's word there with another operation than its own.
    wanted = [(word, "") for word in missing] + sorted((s.word, s.operation) for s in held_out if s.word)
    for word, own in wanted:
        if not any(s.word == word and s.operation != own for s in train):
            free = [s for s in spare if s.word == word and s.operation != own and s not in held_out]
            train.append(rng.choice(free))
    return sorted(train), sorted(test), sorted(validation)


def _split_pairs(rng: random.Random) -> tuple[list[tuple[str, str]], ...]:
    """Ordered pairs of operations for training, test and validation; both orders of a pair stay together."""
    names = sorted(OPERATIONS)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rng.shuffle(pairs)
    cuts = pairs[60 + 24 :], pairs[:60], pairs[60 : 60 + 24]
    return tuple([pair for a, b in part for pair in ((a, b), (b, a))] for part in cuts)


class _Composer:
    """Draws compositions of training primitives, round after round over pairs of operations."""

    def __init__(self, primitives: list[Step], seed: int, used: set[Program]) -> None:
        self._steps = {name: [s for s in primitives if s.operation == name] for name in sorted(OPERATIONS)}
        self._seed = seed
        self._used = used

    def over(self, pairs: list[tuple[str, str]], count: int, instances: int) -> _Drawn:
        """`count` compositions with records; a pair on which no composition shows both its steps is dropped."""
        drawn: _Drawn = []
        pairs = list(pairs)
        while len(drawn) < count and pairs:
            for pair in list(pairs):
                task = self._one(pair, instances, len(drawn))
                if task is None:
                    pairs.remove(pair)
                elif len(drawn) < count:
                    drawn.append(task)
        return drawn

    def _one(self, pair: tuple[str, str], instances: int, number: int) -> tuple[Program, list[Words]] | None:
        rng = random.Random(f"{self._seed}/{pair}/{number}")
        for _ in range(12):
            program = (rng.choice(self._steps[pair[0]]), rng.choice(self._steps[pair[1]]))
            if program in self._used:
                continue
            records = draw_inputs(program, rng, instances + SHOWN)
            if records is not None:
                self._used.add(program)
                return program, records
        return None


def _drawn(steps: list[Step], seed: int, count: int) -> _Drawn:
    drawn: _Drawn = []
    for step in steps:
        records = draw_inputs((step,), random.Random(f"{seed}/{step}/records"), count + SHOWN)
        if records is None:
            raise AssertionError(f"{step} changes hardly any record")
        drawn.append(((step,), records))
    return drawn


def _named(
    primitives: dict[str, _Drawn], compositions: dict[str, _Drawn], rng: random.Random
) -> dict[str, list[PlannedTask]]:
    groups: dict[str, list[PlannedTask]] = {}
    number = 0

    def name_all(drawn: _Drawn, instances: int) -> list[PlannedTask]:
        nonlocal number
        tasks = []
        for program, records in drawn:
            number += 1
            name = f"task{number:04d}_" + "_then_".join(step.operation for step in program)
            tasks.append(PlannedTask(name, program, records[SHOWN : SHOWN + instances], records[:SHOWN]))
        return tasks

    singles = name_all(primitives["train"], TRAIN_INSTANCES)
    pairs = name_all(compositions["train"], TRAIN_COMPOSITION_INSTANCES)
    groups["train"] = singles + pairs
    groups["validation"] = name_all(primitives["validation"], VALIDATION_INSTANCES)
    groups["validation"] += name_all(compositions["validation"], VALIDATION_INSTANCES)
    # The seen group: training tasks on the records behind those used for training.
    records_of = dict(primitives["train"] + compositions["train"])
    groups["seen"] = [
        PlannedTask(f"{task.name}_held_out", task.program, records_of[task.program][-TEST_INSTANCES:], task.shown)
        for tasks in (singles, pairs)
        for task in sorted(rng.sample(tasks, SEEN), key=lambda task: task.name)
    ]
    groups["unseen_arguments"] = name_all(primitives["unseen"], TEST_INSTANCES)
    groups["unseen_compositions"] = name_all(compositions["unseen"], TEST_INSTANCES)
    return groups
