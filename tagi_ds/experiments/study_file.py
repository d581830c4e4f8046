"""Reading a study's file, strictly: an unknown key is refused with the nearest that there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tagi_ds.config import STAGES
from tagi_ds.errors import UserError
from tagi_ds.experiments.definition import Part, Speed, Study, Tree, Tuning, Variant, flat
from tagi_ds.methods import APPROACHES
from tagi_ds.recipe import SECTIONS, field_types
from tagi_ds.strict_yaml import read_yaml

OPTIONAL_STAGES = ("pretrain",)
"""What a variant may go `without`; distillation is left out by its weights in the loss."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.]*")


def read_study(path: Path, study_dir: str | None = None, scale: float = 1.0, recipe: Path | None = None) -> Study:
    """Reads and checks a study's file; its fields are checked where its launches are planned.

    Args:
        path: the file.
        study_dir: in the place of the file's.
        scale: multiplies every number of steps.
        recipe: in the place of the file's.

    Raises:
        UserError: a key is unknown, missing or of the wrong type; the text names file, place and the nearest key.
    """
    tree = read_yaml(path)
    place = str(path)
    _known(
        tree,
        ("recipe", "study_dir", "benchmark_seed", "ranks", "lengths", "averages", "speed", "set", "tuning", "parts"),
        place,
        needed=("recipe", "study_dir", "parts"),
    )
    recipe = recipe or path.parent / _typed(tree["recipe"], str, f"{place}: recipe")
    if not recipe.is_file():
        raise UserError(f"{place}: the recipe {recipe} is missing", "name one relative to the study's file")
    check_fields(tree.get("set"), f"{place}: set")
    benchmark_seed = tree.get("benchmark_seed")
    if benchmark_seed is not None:
        _typed(benchmark_seed, int, f"{place}: benchmark_seed")
    parts = {
        name: _part(_name(name, f"{place}: parts"), value, f"{place}: parts.{name}")
        for name, value in _table(tree["parts"], f"{place}: parts").items()
    }
    if not parts:
        raise UserError(f"{place}: parts is empty", "name at least one part with its variants")
    tuning = _tuning(tree["tuning"], parts, f"{place}: tuning") if tree.get("tuning") is not None else None
    for part in parts.values():
        for variant in part.variants.values():
            if variant.tuned_as is not None:
                tuned = () if tuning is None else tuning.methods
                _one_of(variant.tuned_as, tuned, f"{place}: parts.{part.name}.variants.{variant.name}.tuned_as")
    return Study(
        path,
        recipe,
        Path(study_dir or _typed(tree["study_dir"], str, f"{place}: study_dir")),
        benchmark_seed,
        _at_least(tree.get("ranks", 1), 1, f"{place}: ranks"),
        _lengths(tree.get("lengths"), f"{place}: lengths"),
        _speed(tree.get("speed"), f"{place}: speed"),
        tree.get("set") or {},
        tuning,
        parts,
        scale,
        _averages(tree.get("averages"), f"{place}: averages"),
    )


def _part(name: str, value: Any, place: str) -> Part:
    tree = _table(value, place)
    known = ("title", "seeds", "reference", "lengths", "remarks", "variants")
    _known(tree, known, place, needed=("seeds", "reference", "variants"))
    variants = {
        _name(key, f"{place}.variants"): _variant(key, entry, f"{place}.variants.{key}")
        for key, entry in _table(tree["variants"], f"{place}.variants").items()
    }
    for variant in variants.values():
        others = [name for name in variants if name != variant.name]
        if variant.compute_of is not None:
            _one_of(variant.compute_of, others, f"{place}: {variant.name}.compute_of")
        if variant.logit_teacher_of is not None:
            teachers = [name for name in others if variants[name].method == "meta_training"]
            _one_of(variant.logit_teacher_of, teachers, f"{place}: {variant.name}.logit_teacher_of")
    reference = _one_of(tree["reference"], variants, f"{place}.reference")
    title = _typed(tree.get("title", name), str, f"{place}.title")
    remarks = [
        _typed(text, str, f"{place}.remarks") for text in _typed(tree.get("remarks", []), list, f"{place}.remarks")
    ]
    lengths = _lengths(tree.get("lengths"), f"{place}.lengths")
    return Part(name, title, _seeds(tree["seeds"], place), reference, variants, lengths, tuple(remarks))


def _variant(name: str, value: Any, place: str) -> Variant:
    tree = _table(value, place)
    known = ("method", "title", "without", "compute_of", "logit_teacher_of", "tuned_as", "set")
    _known(tree, known, place, needed=("method",))
    method = _one_of(tree["method"], APPROACHES, f"{place}.method")
    without = _typed(tree.get("without", []), list, f"{place}.without")
    for stage in without:
        _one_of(stage, OPTIONAL_STAGES, f"{place}.without")
    if tree.get("compute_of") is not None and APPROACHES[method].trained_in != "meta_train":
        raise UserError(f"{place}: compute_of with the method {method}", "only meta-training is given others' compute")
    if tree.get("logit_teacher_of") is not None and method != "tagi":
        raise UserError(f"{place}: logit_teacher_of with the method {method}", "only TAGI learns from distributions")
    check_fields(tree.get("set"), f"{place}.set")
    default = APPROACHES[method].title if name == method else name.replace("_", " ")
    title = _typed(tree.get("title", default), str, f"{place}.title")
    links = tree.get("compute_of"), tree.get("logit_teacher_of"), tree.get("tuned_as")
    return Variant(name, method, title, tuple(without), *links, tree.get("set") or {})


def _tuning(value: Any, parts: Mapping[str, Part], place: str) -> Tuning:
    tree = _table(value, place)
    _known(tree, ("part", "seeds", "methods", "grid", "start"), place, needed=("seeds", "methods", "grid"))
    part = None if tree.get("part") is None else _one_of(tree["part"], parts, f"{place}.part")
    trained = [name for name, approach in APPROACHES.items() if approach.trained_in is not None]
    if part is not None:
        own = parts[part].variants.values()
        trained += [variant.name for variant in own if variant.method in trained and variant.name not in trained]
    methods = _typed(tree["methods"], list, f"{place}.methods")
    for method in methods:
        _one_of(method, trained, f"{place}.methods")
    grid = {}
    for key, values in _table(tree["grid"], f"{place}.grid").items():
        _one_of(key, field_types(), f"{place}.grid")
        if not isinstance(values, list) or not values:
            raise UserError(f"{place}.grid.{key} is not a list of values", "write [first, second]")
        grid[key] = tuple(values)
    start = _table(tree.get("start"), f"{place}.start")
    for key, value in start.items():
        if list(grid) != [key] or value not in grid[key]:
            raise UserError(
                f"{place}.start.{key} {value!r} is no value of a grid of that one field",
                "start at a value of the grid, which has one field; or leave start out, and every point is tried",
            )
    return Tuning(_seeds(tree["seeds"], place), tuple(methods), grid, part, start)


def check_fields(tree: Any, place: str) -> None:
    """Checks the names of sections, fields and stages in a recipe's shape; types are checked with the launches.

    Raises:
        UserError: one is unknown; the text names the nearest.
    """
    table = _table(tree, place)
    stages = _table(table.get("stages"), f"{place}.stages")
    for name in stages:
        _one_of(name, STAGES, f"{place}.stages")
    for prefix, layer in ((place, {k: v for k, v in table.items() if k != "stages"}), *_entries(stages, place)):
        for section in SECTIONS:
            _table(layer.get(section), f"{prefix}.{section}")
        for key in flat(layer):
            _one_of(key, [*field_types(), *SECTIONS], prefix)


def _entries(stages: Tree, place: str) -> Iterable[tuple[str, Tree]]:
    for name, entry in stages.items():
        yield f"{place}.stages.{name}", _table(entry, f"{place}.stages.{name}")


def _known(tree: Tree, allowed: Iterable[str], place: str, needed: Iterable[str] = ()) -> None:
    for key in tree:
        _one_of(key, allowed, place)
    for key in needed:
        if tree.get(key) is None:
            raise UserError(f"{place}: {key} is missing", f"a study's file needs {', '.join(needed)} there")


def _one_of(value: Any, allowed: Iterable[str], place: str) -> str:
    names = list(allowed)
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        listed = ", ".join(names) if len(names) <= 20 else "a recipe's fields, which --help of any launcher lists"
        raise UserError(f"{place}: {value!r} is unknown{hint}", f"choose from {listed}")
    return str(value)


def _table(value: Any, place: str) -> Tree:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{place} = {value!r} is not a table", "put its keys under it")
    return value


def _typed(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {str: "text", int: "a whole number", list: "a list"}
        raise UserError(f"{place} = {value!r} is not {names[kind]}", "mend it in the study's file")
    return value


def _at_least(value: Any, least: int, place: str) -> int:
    if _typed(value, int, place) < least:
        raise UserError(f"{place} is {value}", f"give {least} or more")
    return int(value)


def _seeds(value: Any, place: str) -> tuple[int, ...]:
    seeds = _typed(value, list, f"{place}.seeds")
    if not seeds or len(set(map(repr, seeds))) < len(seeds):
        raise UserError(f"{place}.seeds is {seeds}", "give different whole numbers, at least one")
    return tuple(_at_least(seed, 0, f"{place}.seeds") for seed in seeds)


def _lengths(value: Any, place: str) -> dict[str, tuple[int, int, int]]:
    found = {}
    for name, at in _table(value, place).items():
        where = f"{place}.{_name(name, place, free=True)}"
        if not isinstance(at, list) or len(at) != 3:
            raise UserError(f"{where} = {at!r} is not [instruction, input, target]", "give three numbers of tokens")
        first, second, third = (_at_least(number, 1, where) for number in at)
        found[name] = (first, second, third)
    return found


def _averages(value: Any, place: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, groups in _table(value, place).items():
        named = [_typed(group, str, f"{place}.{name}") for group in _typed(groups, list, f"{place}.{name}")]
        if len(named) < 2 or len(set(named)) < len(named):
            raise UserError(f"{place}.{name} is {named}", "name at least two groups of tasks, each once")
        found[_name(name, place)] = tuple(named)
    return found


def _speed(value: Any, place: str) -> Speed:
    tree = _table(value, place)
    _known(tree, ("flops_per_s", "start_s", "stages"), place)
    stages = _table(tree.get("stages"), f"{place}.stages")
    for name in stages:
        _one_of(name, ("benchmark", *STAGES), f"{place}.stages")
    numbers = {**{key: tree[key] for key in ("flops_per_s", "start_s") if key in tree}}
    for key, number in {**numbers, **stages}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise UserError(f"{place}: {key} = {number!r} is not a number above 0", "mend it in the study's file")
    return Speed(**numbers, stages=stages)


def _name(value: Any, place: str, free: bool = False) -> str:
    if not isinstance(value, str) or not (free or _NAME.fullmatch(value)):
        raise UserError(f"{place}: {value!r} is no name", "use small letters, digits, _ and .; it names folders")
    return value
