"""The command line of the plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tagi_ds import recipe
from tagi_ds.errors import UserError
from tagi_ds.files import write_json
from tagi_ds.plan.advice import make_plan
from tagi_ds.plan.answering import plan_answering
from tagi_ds.plan.cluster import read_cluster
from tagi_ds.plan.report import answering_dict, print_answering, print_formulas, print_plan, to_dict

STAGES = ("pretrain", "finetune", "meta_train", "backbone")
"""Stages that train."""
EVALUATE = "evaluate"


def run(argv: list[str], default_recipe: Path) -> None:
    """Plans what the command line asks for and prints it.

    Args:
        argv: without the program's name.
        default_recipe: where there is no ``--config``.

    Raises:
        UserError: a recipe, cluster or backbone that cannot be planned, or a JSON file that cannot be written.
    """
    own, fields = _parser().parse_known_args(argv)
    console = Console()
    if own.explain:
        print_formulas(console)
        return
    if own.stage not in (*STAGES, EVALUATE):
        raise UserError(f"--stage {own.stage} is not planned", f"the stages are {', '.join((*STAGES, EVALUATE))}")
    lengths = None if own.lengths is None else _lengths(own.lengths)
    cluster = read_cluster(own.cluster)
    config = recipe.parse(own.stage, fields, default_recipe).config
    shown = console if console.is_terminal else Console(width=160)
    if own.stage == EVALUATE:
        answering = plan_answering(config, cluster)
        print_answering(answering, shown)
        content = answering_dict(answering)
    else:
        plan = make_plan(config, own.stage, cluster, lengths)
        print_plan(plan, shown)
        content = to_dict(plan)
    if own.json is not None:
        write_json(own.json, content)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launchers/plan.py",
        description="Says what a recipe will need on a cluster and how fast it can be: parameters, memory, FLOPs, "
        "communication, step time, strategy. Loads no weights.",
        epilog="Any field of the recipe may follow as --section.field VALUE, as for the launchers of the stages. "
        "Example: python launchers/plan.py --config launchers/recipes/sni_xl.yaml --cluster 8xH100",
        allow_abbrev=False,
    )
    parser.add_argument("--cluster", default="1xH100", help="[NODESx]GPUSxKIND, or a YAML file (default: 1xH100)")
    parser.add_argument(
        "--stage", default="finetune", help=f"one of {', '.join((*STAGES, EVALUATE))} (default: finetune)"
    )
    parser.add_argument(
        "--lengths",
        metavar="I,S,T",
        help="expected padded tokens of instruction, source and target for the times; memory takes the recipe's limits",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    parser.add_argument("--explain", action="store_true", help="print the formulas and assumptions instead")
    return parser


def _lengths(text: str) -> tuple[int, int, int]:
    words = text.split(",")
    if len(words) != 3 or not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise UserError(f"--lengths {text} is not three lengths", "write instruction,source,target, e.g. 128,256,16")
    instruction, source, target = (int(word) for word in words)
    return instruction, source, target
