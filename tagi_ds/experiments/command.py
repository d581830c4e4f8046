"""The command line of ``launchers/study.py``: what to plan, to run, to show."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tagi_ds.errors import UserError
from tagi_ds.experiments.definition import Study
from tagi_ds.experiments.estimates import Estimates, duration
from tagi_ds.experiments.nodes import Node, Plan
from tagi_ds.experiments.planning import plan_study
from tagi_ds.experiments.processes import LocalProcess, Start
from tagi_ds.experiments.report import write_study_report
from tagi_ds.experiments.runner import Outcome, Runner
from tagi_ds.experiments.study_file import check_fields, read_study
from tagi_ds.experiments.tuning import (
    chosen_values,
    first_trials,
    further_trials,
    read_chosen,
    read_tuned,
    tuning_outcome,
    tuning_rounds,
    write_tuning,
)
from tagi_ds.files import write_json

TUNING = "tuning"
"""The part that a study's `tuning` is."""
PLAN_FILE = "plan.json"
"""In the study's folder: the list of work, for whoever wants to run it elsewhere."""


def run(argv: list[str], start: Start | None = None) -> int:
    """Does what the command line asks for; returns the exit status.

    Args:
        argv: without the program's name.
        start: starts a launch; default a local process.

    Raises:
        UserError: bad input.
        KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    arguments, further = parser().parse_known_args(argv)
    study = named_study(arguments, further)
    parts = asked_parts(study, arguments.part)
    if arguments.report:
        return _report(study, parts, arguments.to)
    if arguments.list or arguments.dry_run:
        plan = _plan(study, parts, read_tuned(study))
        (_list if arguments.list else _forecast)(study, plan, arguments.jobs)
        return 0
    start = start or functools.partial(LocalProcess, ranks=study.ranks, threads=arguments.threads)
    work = functools.partial(_work, study, arguments.jobs, start)
    return _tune_and_run(study, parts, work)


def _tune_and_run(study: Study, parts: list[str], work: Callable[[Plan], Outcome]) -> int:
    """Tuning first, where it is asked for or a part needs its outcome; then the parts, then the report."""
    tuned = read_tuned(study)
    if tuned is None or TUNING in parts:
        outcome = _tune(study, work)
        if outcome is not None and not outcome.complete:
            return _failures(outcome)
        tuned = read_tuned(study)
    named = [part for part in parts if part != TUNING]
    if not named:
        return 0
    outcome = work(plan_study(study, named, tuned=tuned))
    _report(study, named)
    return _failures(outcome)


def _tune(study: Study, work: Callable[[Plan], Outcome]) -> Outcome | None:
    """Tries points of the grid until no method has another to try, and records what that chose.

    Returns:
        That of the last launches, complete or not; None where there is nothing to tune.
    """
    outcome = None
    found: dict[str, Any] = {}
    for names in tuning_rounds(study):
        assert study.tuning is not None
        trials = further = first_trials(study.tuning, names)
        while further:
            plan = plan_study(study, [], trials, chosen_values(found))
            outcome = work(plan)
            if not outcome.complete:
                return outcome
            shown = tuning_outcome(study, plan)
            further = further_trials(study.tuning, shown)
            trials = {name: (*points, *further.get(name, ())) for name, points in trials.items()}
        found = {**shown, "methods": {**found.get("methods", {}), **shown["methods"]}}
    if found:
        write_tuning(study, found)
    return outcome


def _work(study: Study, jobs: int, start: Start, plan: Plan) -> Outcome:
    estimates = _estimates(study, plan)
    # The work list as it is: a command, a folder and needs for each.
    write_json(study.folder / PLAN_FILE, [_entry(node) for node in plan.nodes.values()])
    runner = Runner(plan, study.folder, estimates, jobs, start, say=lambda text: print(text, flush=True))
    return runner.run([node.name for node in plan.nodes.values()])


def _entry(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "launcher": node.stage,
        "arguments": list(node.arguments),
        "run_folder": str(node.run_dir),
        "needs": list(node.needs),
    }


def _failures(outcome: Outcome) -> int:
    for name in outcome.failed:
        needed = sum(by == name for by in outcome.blocked.values())
        print(f"failed: {name}" + (f"; {needed} others need it" if needed else ""), flush=True)
    return 0 if outcome.complete else 1


def _report(study: Study, parts: list[str], folder: Path | None = None) -> int:
    path = write_study_report(study, [part for part in parts if part != TUNING], read_chosen(study), folder)
    print(f"report: {path}" if path else "nothing is evaluated yet: no report", flush=True)
    return 0


def _plan(study: Study, parts: list[str], tuned: Mapping[str, Mapping[str, Any]] | None) -> Plan:
    named = [part for part in parts if part != TUNING]
    if tuned is None:
        print("not tuned yet: planned with the recipe's own values in the place of the tuned ones")
    trials = None
    if study.tuning is not None and (TUNING in parts or tuned is None):
        trials = first_trials(study.tuning, study.tuning.methods)
    return plan_study(study, named, trials, tuned)


def _estimates(study: Study, plan: Plan) -> Estimates:
    own = next(iter(study.lengths.values()), (64, 64, 16))
    estimates = Estimates(plan, own, study.speed)
    estimates.learn(study.folder)
    return estimates


def _list(study: Study, plan: Plan, jobs: int) -> None:
    for node in plan.nodes.values():
        print(
            f"{'done' if node.done else 'open'}  {node.name}" + (f"  <- {' '.join(node.needs)}" if node.needs else "")
        )


def _forecast(study: Study, plan: Plan, jobs: int) -> None:
    """Counts, operations and time of each stage's launches."""
    estimates = _estimates(study, plan)
    table = Table(title=f"{study.path.name}: {len(plan.nodes)} launches for {len(plan.cells)} models to evaluate")
    for head in ("stage", "launches", "done", "TFLOP", "hours of one launch"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    stages: dict[str, list[Node]] = {}
    for node in plan.nodes.values():
        stages.setdefault(node.stage, []).append(node)
    total = left = 0.0
    for stage, nodes in stages.items():
        seconds = sum(estimates.seconds(node) for node in nodes)
        total, left = total + seconds, left + sum(estimates.seconds(node) for node in nodes if not node.done)
        flops = sum(estimates.flops(node) for node in nodes)
        done = sum(node.done for node in nodes)
        table.add_row(stage, str(len(nodes)), str(done), f"{flops / 1e12:.1f}", f"{seconds / 3600:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"about {duration(total / jobs)} with {jobs} launches at a time, {duration(left / jobs)} of it left")
    measured = estimates.is_measured
    console.print("by what launches of this study took" if measured else "by operations and the study's `speed`")


def named_study(arguments: argparse.Namespace, further: list[str]) -> Study:
    """The study's file with what the command line puts in its place.

    Args:
        arguments: of :func:`parser`.
        further: what it did not know: fields of a recipe.

    Raises:
        UserError: the file or a field is bad.
    """
    study = read_study(Path(arguments.config), arguments.study_dir, arguments.scale, arguments.recipe)
    return dataclasses.replace(study, fields=_laid_over(study.fields, _flags(further)))


def asked_parts(study: Study, asked: str | None) -> list[str]:
    """The parts that ``--part`` names, all by default.

    Raises:
        UserError: the study has no such part.
    """
    known = [*([TUNING] if study.tuning is not None else []), *study.parts]
    if asked is None:
        return known
    for name in asked.split(","):
        if name not in known:
            raise UserError(f"--part {name} is unknown", f"{study.path} has {', '.join(known)}")
    return asked.split(",")


def _flags(words: list[str]) -> dict[str, Any]:
    """--section.field VALUE, as a tree in a recipe's shape."""
    tree: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        text = value if equals else next(rest, None)
        if not word.startswith("--") or text is None:
            raise UserError(f"`{word}` on the command line belongs to nothing", "write --section.field VALUE")
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = yaml.safe_load(text)
    check_fields(tree, "the command line")
    return tree


def _laid_over(fields: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The study's fields with the command line's, which win over its entries for stages too."""
    laid = json.loads(json.dumps(fields))
    for target in (laid, *(laid.get("stages") or {}).values()):
        for section, value in flags.items():
            if isinstance(value, dict):
                target[section] = {**(target.get(section) or {}), **value}
            else:
                target[section] = value
    return laid


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="launchers/study.py",
        description="Runs a study: what is done stays done, the same command goes on. Several at once share the work.",
        epilog="Any other field of a recipe may follow as --section.field VALUE; every launch is given it.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="STUDY.yaml", help="the study's file")
    parser.add_argument("--part", metavar="NAME[,NAME]", help="parts to do, `tuning` among them; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="launches at the same time (2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (1)")
    parser.add_argument("--recipe", type=Path, help="base recipe, in the place of the file's")
    parser.add_argument("--study_dir", help="folder, in the place of the file's")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps")
    parser.add_argument("--to", type=Path, help="with --report: folder for it, in the place of the study's")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="counts, operations and time, and nothing is started")
    what.add_argument("--list", action="store_true", help="every launch, whether it is done, and what it needs")
    what.add_argument("--report", action="store_true", help="the report alone, of what is there")
    return parser
