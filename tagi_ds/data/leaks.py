"""What test tasks share with training tasks: instruction texts, inputs, categories.

A score on "unseen" tasks says little where their inputs were trained on, so the counts stand beside every score.
Texts are compared without regard to case and white space. Only digests of the smaller side are kept and the training
side is streamed past them: memory grows with the test examples alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tagi_ds.data.examples import Task

SHOWN_PAIRS = 20
"""Pairs of tasks that a report names at the most, those that share most first."""


@dataclass(frozen=True)
class SharedPair:
    """A training task and another task with something in common.

    Attributes:
        train, other: their names.
        shared: distinct texts (or categories) that both have.
    """

    train: str
    other: str
    shared: int


@dataclass(frozen=True)
class Overlap:
    """What two sets of tasks have in common, of one kind.

    Attributes:
        shared: distinct texts (or categories) found on both sides.
        train_tasks, tasks: tasks of either side that have one of them.
        examples: the other side's examples concerned: those with a shared input, or all of the concerned tasks.
        total: the other side's examples.
        pairs: the first SHOWN_PAIRS pairs of tasks, those that share most first.
    """

    shared: int
    train_tasks: int
    tasks: int
    examples: int
    total: int
    pairs: tuple[SharedPair, ...]

    @property
    def counts(self) -> dict[str, int]:
        """The numbers without the pairs, for a results file."""
        return {
            "shared": self.shared,
            "train_tasks": self.train_tasks,
            "tasks": self.tasks,
            "examples": self.examples,
            "total": self.total,
        }


@dataclass(frozen=True)
class Leaks:
    """What training tasks share with other tasks.

    Attributes:
        instruction: definitions or further wordings of them.
        input: bare inputs of examples.
        category: categories, which the published splits keep apart.
    """

    instruction: Overlap
    input: Overlap
    category: Overlap

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Kind -> numbers, for a results file."""
        return {kind: overlap.counts for kind, overlap in self.kinds()}

    def kinds(self) -> Iterator[tuple[str, Overlap]]:
        """The three kinds by name."""
        yield from (("instruction", self.instruction), ("input", self.input), ("category", self.category))


def find_group_leaks(train: Sequence[Task], groups: Mapping[str, Sequence[Task]]) -> dict[str, Leaks]:
    """Compares training tasks with each group of other tasks; a group's name -> what it shares with them.

    Args:
        train: tasks whose examples may be lazy; every example is read once, whatever the number of groups.
        groups: their examples are read once too.
    """

    def instructions(task: Task) -> Iterator[str]:
        return (text for text in (task.definition, *task.paraphrases) if text.strip())

    def inputs(task: Task) -> Iterator[str]:
        return (example.input for example in task.examples)

    def categories(task: Task) -> Iterator[str]:
        yield task.category

    instruction = _overlaps(train, groups, instructions, whole_tasks=True)
    given = _overlaps(train, groups, inputs, whole_tasks=False)
    category = _overlaps(train, groups, categories, whole_tasks=True)
    return {name: Leaks(instruction[name], given[name], category[name]) for name in groups}


def leak_counts(leaks: Mapping[str, Leaks]) -> dict[str, Any]:
    """Group -> kind -> numbers, as a results file holds them."""
    return {group: found.counts for group, found in leaks.items()}


def normalised(text: str) -> bytes:
    """16-byte digest of a text without regard to case and to runs of white space.

    128 bits: among 10^9 texts the chance that any two differ and yet agree here is below 10^-20.
    """
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _overlaps(
    train: Sequence[Task],
    groups: Mapping[str, Sequence[Task]],
    texts: Callable[[Task], Iterable[str]],
    whole_tasks: bool,
) -> dict[str, Overlap]:
    """`whole_tasks`: a shared text concerns all examples of a task, not the one that it belongs to."""
    others = [(group, task) for group, tasks in groups.items() for task in tasks]
    held: dict[bytes, Counter[int]] = {}
    for number, (_, task) in enumerate(others):
        for text in texts(task):
            held.setdefault(normalised(text), Counter())[number] += 1
    found: set[bytes] = set()
    pairs: Counter[tuple[int, int]] = Counter()
    for number, task in enumerate(train):
        own = {digest for digest in map(normalised, texts(task)) if digest in held}
        found |= own
        pairs.update((number, holder) for digest in own for holder in held[digest])
    overlaps = {}
    for group, tasks in groups.items():
        members = {number for number, (owner, _) in enumerate(others) if owner == group}
        there = {pair: count for pair, count in pairs.items() if pair[1] in members}
        concerned = {holder for _, holder in there}
        hits = [sum(count for number, count in held[digest].items() if number in members) for digest in found]
        largest = sorted(there.items(), key=lambda item: (-item[1], train[item[0][0]].name, others[item[0][1]][1].name))
        overlaps[group] = Overlap(
            shared=sum(hit > 0 for hit in hits),
            train_tasks=len({number for number, _ in there}),
            tasks=len(concerned),
            examples=sum(len(others[n][1].examples) for n in concerned) if whole_tasks else sum(hits),
            total=sum(len(task.examples) for task in tasks),
            pairs=tuple(SharedPair(train[a].name, others[b][1].name, n) for (a, b), n in largest[:SHOWN_PAIRS]),
        )
    return overlaps
