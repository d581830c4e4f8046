"""A study's file: a recipe, seeds, and named parts whose variants are fields laid over the recipe.

    recipe: quickstart.yaml             the base, found beside the study's file
    study_dir: runs/study
    benchmark_seed: 0                   writes the embedded benchmark for the study; left out: the recipe names its data
    ranks: 1                            processes of one launch
    lengths: {name: [instruction, input, target]}      tokens at which answering is reckoned, the study's own first
    averages: {unseen: [group, group]}  groups of tasks that are also reported together, each with the same weight
    speed: {flops_per_s: 1.5e10, start_s: 12, stages: {evaluate: 25}}       assumed until launches were measured
    set: {...}                          fields of every launch, in a recipe's shape, ``stages`` included
    tuning: {part: main, seeds: [...], methods: [...], grid: {optimizer.learning_rate: [...]}, start: {...}}
    parts:
      main: {seeds: [...], reference: tagi, variants: {tagi: {method: tagi, set: {...}}}, lengths: {}, remarks: []}

Later layers win wholly: the recipe's common part, its stage's entry, the study's ``set``, what makes the method, what
tuning chose, the variant's ``set`` (of both: the common part, then the stage's entry).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tagi_ds.recipe import SECTIONS

Tree = Mapping[str, Any]
"""Fields in a recipe's shape."""
Point = tuple[tuple[str, Any], ...]
"""Of a tuning grid: (field, value) pairs."""


@dataclass(frozen=True)
class Variant:
    """One row of a part's table.

    Attributes:
        name: unique in its part.
        method: of :data:`tagi_ds.methods.APPROACHES`.
        title: of the row.
        without: stages of the method that are left out.
        compute_of: another variant of the part; `engine.steps` is then what makes both cost the same in training.
        logit_teacher_of: another variant of the part, meta-trained as a whole: its model is the logit teacher.
        tuned_as: what it has of the tuning: another's values, by the name under which they were tuned; None: those of
            its own name, else of its method.
        fields: laid over everything else.
    """

    name: str
    method: str
    title: str
    without: tuple[str, ...] = ()
    compute_of: str | None = None
    logit_teacher_of: str | None = None
    tuned_as: str | None = None
    fields: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Variants over seeds, one table.

    Attributes:
        name: for ``--part``.
        title: of the report's section.
        seeds: of every variant.
        reference: the variant with which the others are compared task by task.
        variants: the rows in order, by name.
        lengths: at which answering is reckoned in this part beside the study's, this part's own first.
        remarks: paragraphs of the report's section: what the figures say, and what they do not.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    reference: str
    variants: Mapping[str, Variant]
    lengths: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """The one grid that every method gets; the mean of `engine.best_by` on the validation tasks chooses.

    Attributes:
        seeds: over which the mean is taken.
        methods: that are tuned, each in the stage in which it is trained: methods by themselves, or variants of `part`.
            One that is given another's compute is tuned after that one, with what was chosen for it.
        grid: dotted field -> its values.
        start: of a grid of one field: the value at which every method begins. It goes on from there to the next value
            as long as that is better, upwards first. Empty: every method tries every point.
        part: whose variants are meant where one has a method's name; a logit teacher among them is then one with the
            recipe's own values.
    """

    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    grid: Mapping[str, tuple[Any, ...]]
    part: str | None = None
    start: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """What is assumed of a machine before launches were measured on it.

    Attributes:
        flops_per_s: that one launch computes.
        start_s: seconds until a launch takes its first step.
        stages: seconds of launches without steps.
    """

    flops_per_s: float = 1.5e10
    start_s: float = 12.0
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """All of a study's file; `recipe` is the base recipe's path."""

    path: Path
    recipe: Path
    folder: Path
    benchmark_seed: int | None
    ranks: int
    lengths: Mapping[str, tuple[int, int, int]]
    speed: Speed
    fields: Tree
    tuning: Tuning | None
    parts: Mapping[str, Part]
    scale: float = 1.0
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def lengths_of(self, part: Part) -> dict[str, tuple[int, int, int]]:
        """At which answering is reckoned in a part: its own first, then the study's."""
        return {**part.lengths, **self.lengths}


def leaves(tree: Tree, stage: str) -> dict[str, Any]:
    """The fields that a tree in a recipe's shape sets for a stage, by dotted name."""
    common = {name: value for name, value in tree.items() if name != "stages"}
    return flat(common) | flat((tree.get("stages") or {}).get(stage) or {})


def flat(tree: Tree) -> dict[str, Any]:
    """A layer's fields by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if name in SECTIONS:
            found |= {f"{name}.{inner}": leaf for inner, leaf in (value or {}).items()}
        else:
            found[name] = value
    return found
