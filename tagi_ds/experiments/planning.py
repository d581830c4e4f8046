"""From a study's file to its nodes: the way of each variant and seed, from data to an evaluated model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.experiments.chain import Chain
from tagi_ds.experiments.definition import Part, Point, Study, Variant
from tagi_ds.experiments.nodes import BENCHMARK, NODES_FOLDER, Cell, Node, Plan, Trial
from tagi_ds.experiments.relevance import goes_to, relevant_fields
from tagi_ds.methods import APPROACHES
from tagi_ds.processes import check_processes
from tagi_ds.recipe import configured, read_recipe, resolve, typed_flags
from tagi_ds.recipe_rules import check

Tuned = Mapping[str, Mapping[str, Any]]
"""Method, or variant -> the grid's fields with the chosen values."""


def plan_study(
    study: Study,
    parts: Sequence[str],
    tuning: Mapping[str, Sequence[Point]] | None = None,
    tuned: Tuned | None = None,
) -> Plan:
    """Plans some parts of a study.

    Args:
        study: of a study's file.
        parts: names of those to plan, in order.
        tuning: method -> points of the grid at which it is tried; these are planned too.
        tuned: what tuning chose; without it every method has the recipe's own values.

    Raises:
        UserError: fields that are unknown or do not fit together; the text names the variant.
    """
    planner = Planner(study, tuned or {})
    if tuning:
        planner.add_trials(tuning)
    for name in parts:
        planner.add_part(study.parts[name])
    return planner.plan


class Planner:
    """Plans variant by variant; what is the same is planned once."""

    def __init__(self, study: Study, tuned: Tuned) -> None:
        self.study, self.tuned = study, tuned
        self.plan = Plan()
        self._recipes: dict[str, dict[str, Any]] = {}
        self._parsed: dict[tuple[str, tuple[tuple[str, str], ...]], RunConfig] = {}

    def add_trials(self, trials: Mapping[str, Sequence[Point]]) -> None:
        """Plans some methods at some points of the tuning grid, for every seed."""
        tuning = self.study.tuning
        assert tuning is not None
        variants = {} if tuning.part is None else self.study.parts[tuning.part].variants
        for method, points in trials.items():
            variant = variants.get(method) or Variant(method, method, method)
            # A teacher is not waited for: it has the recipe's own values. The compute of others is that of the tuned.
            others = {} if variant.compute_of is None else self.tuned
            for point in points:
                for seed in tuning.seeds:
                    trained = self._chain(variants, variant, seed, others, dict(point)).trained()
                    self.plan.trials.append(Trial(method, point, seed, trained.name))

    def add_part(self, part: Part) -> None:
        """Plans every variant and seed of a part."""
        # All variants of one seed before the next seed: a study that is cut short has whole comparisons.
        for seed in part.seeds:
            for variant in part.variants.values():
                chain = self._chain(part.variants, variant, seed, self.tuned)
                try:
                    self.plan.cells.append(self._cell(part, chain))
                except UserError as error:
                    place = f"{self.study.path}: parts.{part.name}.variants.{variant.name}"
                    raise UserError(f"{place}: {error.problem}", error.mend) from error

    def _chain(
        self,
        variants: Mapping[str, Variant],
        variant: Variant,
        seed: int,
        tuned: Tuned,
        own: Mapping[str, Any] | None = None,
    ) -> Chain:
        """The launches of a variant behind those of the variants that it names.

        Args:
            variants: among which these are.
            variant, seed: which.
            tuned: what tuning chose for each.
            own: in the place of what it chose for this one.
        """
        price: tuple[str, ...] = ()
        if variant.compute_of is not None:
            price = self._training(self._chain(variants, variants[variant.compute_of], seed, tuned))
        teacher = None
        if variant.logit_teacher_of is not None:
            teacher = self._chain(variants, variants[variant.logit_teacher_of], seed, tuned).trained()
        if own is None:
            own = tuned.get(variant.tuned_as or variant.name, tuned.get(variant.method, {}))
        return Chain(self, variant, APPROACHES[variant.method], seed, own, price, teacher)

    def _cell(self, part: Part, chain: Chain) -> Cell:
        trained = chain.trained() if chain.approach.trained_in else None
        name = None if trained is None else trained.name
        evaluated = chain.evaluated().name
        return Cell(part.name, chain.variant.name, chain.seed, name, evaluated, self._training(chain))

    def _training(self, chain: Chain) -> tuple[str, ...]:
        """Every node that the training took."""
        trained = chain.trained() if chain.approach.trained_in else None
        if trained is not None and trained.config is not None and trained.config.model.initial == "scratch":
            # The backbone gave its tokenizer alone.
            return (trained.name,)
        start = chain.backbone() if trained is None else trained
        names = self.plan.closure([] if start is None else [start.name])
        return tuple(name for name in names if self.plan.nodes[name].stage != BENCHMARK)

    def node(
        self,
        stage: str,
        label: str,
        seed: int,
        fields: Mapping[str, Any],
        wired: Mapping[str, tuple[Any, Node | None]],
        price_of: tuple[str, ...] = (),
    ) -> Node:
        """The launch of a stage, new or as planned before.

        Args:
            stage: names the launcher.
            label: what its name says beside the stage.
            seed: of the run.
            fields: that the study sets, by dotted name; what does not matter to the stage is left out.
            wired: field -> its value, and the node that leaves what it names.
            price_of: see :class:`Node`.
        """
        own = {key: value for key, value in fields.items() if key not in wired and goes_to(key, stage)}
        if "model.backbone" in own and own["model.backbone"] is None:
            del own["model.backbone"]
        config = dataclasses.replace(self.config(stage, own, wired), seed=seed)
        check_processes(config, stage, self.study.ranks)
        needed = [node for _, node in wired.values() if node is not None]
        needed += [self.plan.nodes[name] for name in price_of]
        content = {
            "stage": stage,
            "fields": {k: v for k, v in relevant_fields(config, stage).items() if k not in wired},
            "wired": {
                key: value if node is None else [node.identity, _inside(value, node)]
                for key, (value, node) in wired.items()
            },
            "price_of": sorted(self.plan.nodes[name].identity for name in price_of),
        }
        identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        name = "-".join([stage, *([label] if label else []), f"s{seed}", identity[:8]])
        if name not in self.plan.nodes:
            home = self.study.folder / NODES_FOLDER / name
            index = str(self.study.folder / "index")
            data = dataclasses.replace(config.data, index_dir=index)
            config = dataclasses.replace(config, study_dir=str(home), output_dir=str(home / stage), data=data)
            words = [f"--{key}={_text(value)}" for key, value in sorted(own.items())]
            words += [f"--{key}={_text(value)}" for key, (value, _) in wired.items()]
            words += [f"--seed={seed}", f"--scale={self.study.scale}", f"--study_dir={home}"]
            words += [f"--data.index_dir={index}"]
            arguments = ("--config", str(self.study.recipe), *words)
            needs = tuple(dict.fromkeys(node.name for node in needed))
            self.plan.nodes[name] = Node(name, stage, home, arguments, needs, identity, config, price_of)
        return self.plan.nodes[name]

    def config(self, stage: str, own: Mapping[str, Any], wired: Mapping[str, tuple[Any, Node | None]]) -> RunConfig:
        """The resolved configuration; seeds and folders of other nodes do not change how it is read."""
        flags = {key: _text(value) for key, value in own.items()}
        told = stage, tuple(flags.items())
        if told not in self._parsed:
            # What a launcher does with the same recipe and flags, but the recipe is read once for many.
            values = {**self._recipe(stage), **typed_flags(flags), "scale": self.study.scale}
            self._parsed[told] = resolve(configured(values), stage)
            check(self._parsed[told], stage)
        config = dataclasses.replace(self._parsed[told])
        for key, (value, _) in wired.items():
            section, _, name = key.partition(".")
            setattr(config, section, dataclasses.replace(getattr(config, section), **{name: value}))
        return config

    def _recipe(self, stage: str) -> dict[str, Any]:
        if stage not in self._recipes:
            self._recipes[stage] = read_recipe(self.study.recipe, stage)
        return self._recipes[stage]

    @functools.cached_property
    def benchmark(self) -> Node | None:
        """Writes the embedded benchmark, where the study asks for it."""
        seed = self.study.benchmark_seed
        if seed is None:
            return None
        identity = hashlib.sha256(f"{BENCHMARK}/{seed}".encode()).hexdigest()
        name = f"{BENCHMARK}-s{seed}-{identity[:8]}"
        home = self.study.folder / NODES_FOLDER / name
        words = (str(home / BENCHMARK), "--seed", str(seed))
        self.plan.nodes[name] = Node(name, BENCHMARK, home, words, (), identity)
        return self.plan.nodes[name]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _inside(value: Any, node: Node) -> Any:
    """A wired value without the folder of the node that it lies in, so that studies can be moved."""
    if isinstance(value, dict):
        return {name: _inside(path, node) for name, path in value.items()}
    return str(Path(value).relative_to(node.home)) if Path(value).is_relative_to(node.home) else value
