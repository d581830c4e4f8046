"""Scores predictions without a model, and compares results.

python -m tagi_ds.evaluation score PREDICTIONS.jsonl --data.sni_dir natural-instructions [--split test_tasks]
python -m tagi_ds.evaluation compare A/results.json B/results.json

PREDICTIONS holds a line {"id": INSTANCE_ID, "prediction": TEXT} for each of the first 100 instances of every task in
the split, as the benchmark's leaderboard takes it. Exit status: 0, or 2 where input is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tagi_ds.config import DataConfig
from tagi_ds.data.catalogue import evaluated_group
from tagi_ds.errors import UserError
from tagi_ds.evaluation.comparison import compare, comparison_table, intervals_of
from tagi_ds.evaluation.leaderboard import match, read_leaderboard
from tagi_ds.evaluation.metrics import METRICS, scored_tokens
from tagi_ds.evaluation.results import add_answered, require_examples
from tagi_ds.files import read_json, write_json


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        found, table = options.work(options)
        if options.output is not None:
            write_json(options.output, found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=120).print(table)
    return 0


def score(options: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """A predictions file's scores, in a results file's form, and as a table.

    Raises:
        UserError: the file is no predictions file, does not answer the split's instances, or the data are missing.
    """
    path: Path = options.predictions
    answers = read_leaderboard(path)
    tokens = scored_tokens(options.split_folder, options.tokenizer)
    data = DataConfig(
        sni_dir=options.sni_dir,
        split=options.split_folder,
        english_only=options.english_only,
        index_dir=options.index_dir,
    )
    tasks = evaluated_group(data, options.split, options.instances).tasks
    require_examples(options.split, tasks)
    predictions = match(path, answers, tasks, options.missing, options.unknown)
    results: dict[str, Any] = {"method": path.stem, "split": options.split_folder}
    add_answered(results, "test", tasks, predictions, tokens)
    results["intervals"] = intervals_of(results)
    return results, _score_table(results)


def _compare(options: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    names = (str(options.first), str(options.second))
    compared = compare(read_json(options.first), read_json(options.second), names)
    return compared, comparison_table(compared, names)


def _score_table(results: dict[str, Any]) -> Table:
    table = Table(
        title=f"{results['method']}: {results['examples']} instances, {results['empty']['test']} without text"
    )
    for head in ("", "exact match", "ROUGE-L", "instances"):
        table.add_column(head, justify="right" if head else "left")
    overall = [f"{results['metrics']['test'][metric]:.4f}" for metric in METRICS]
    table.add_row("all", *overall, str(results["examples"]))
    between = ["[{:.2f}, {:.2f}]".format(*results["intervals"]["test"][metric]) for metric in METRICS]
    table.add_row("95 % over tasks", *between, "", end_section=True)
    for part in ("per_category", "per_task"):
        for name, scores in results[part]["test"].items():
            table.add_row(name, *(f"{scores[metric]:.4f}" for metric in METRICS), str(scores["examples"]))
        table.add_section()
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tagi_ds.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("score", help="score a predictions file without a model", allow_abbrev=False)
    command.add_argument("predictions", type=Path, help='lines of {"id", "prediction"}')
    command.add_argument("--data.sni_dir", dest="sni_dir", required=True, help="folder in the benchmark's layout")
    command.add_argument("--data.split", dest="split_folder", default="default", help="folder under splits/")
    command.add_argument("--data.english_only", dest="english_only", type=_truth, default=False, help="true or false")
    command.add_argument("--data.index_dir", dest="index_dir", help="where the index is kept (default: the cache)")
    command.add_argument("--split", default="test_tasks", help="split file, without .txt (default test_tasks)")
    command.add_argument("--instances", type=_positive, default=100, help="instances a task that count (default 100)")
    command.add_argument("--evaluation.tokenizer", dest="tokenizer", help="cross-lingual track: GPT-2's tokenizer")
    command.add_argument("--missing", choices=("error", "empty"), default="error", help="instances not predicted")
    command.add_argument("--unknown", choices=("error", "ignore"), default="error", help="predictions of others")
    command.set_defaults(work=score)
    command = commands.add_parser("compare", help="paired comparison of two results files", allow_abbrev=False)
    command.add_argument("first", type=Path, metavar="A", help="a method's results.json")
    command.add_argument("second", type=Path, metavar="B", help="another's")
    command.set_defaults(work=_compare)
    for each in commands.choices.values():
        each.add_argument("--output", type=Path, metavar="FILE", help="write everything there as JSON")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give a number above 0")
    return number


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError("give true or false")
    return text == "true"


if __name__ == "__main__":
    sys.exit(main())
