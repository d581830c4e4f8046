"""The command line that the benchmarks of speed share, and the picture of their ratios."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import transformers

from tagi_ds.engine.distributed import quieten_libraries
from tagi_ds.files import read_json
from tests.benchmarks.figures import record, show
from tests.benchmarks.speed_study import SHARED, SIZES, Study

Rows = dict[str, dict[str, Any]]
Scenario = Callable[[Study, argparse.Namespace], Rows]
Draw = Callable[[Mapping[str, Mapping[str, Any]], Path], None]


def run(
    title: str,
    description: str | None,
    scenarios: Mapping[str, Scenario],
    draw: Draw,
    argv: list[str] | None = None,
) -> Rows:
    """Measures the chosen scenarios, prints the table, and writes rows and picture where it is told to.

    Rows of another size than `small` have no goal, and say their size in their name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file whose rows of these scenarios are replaced")
    parser.add_argument("--picture", type=Path, help="PNG file of the figures")
    parser.add_argument("--only", nargs="+", choices=list(scenarios), default=list(scenarios), help="default: all")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--runs", type=int, default=5, help="of each way in turn")
    parser.add_argument("--sni", type=Path, default=SHARED / "sni", help="folder in SNI's layout")
    parser.add_argument("--c4", type=Path, default=SHARED / "c4" / "en", help="folder of C4's shards")
    given = parser.parse_args(argv)
    if not given.sni.is_dir():
        raise SystemExit(f"{given.sni} is missing: name a folder in SNI's layout with --sni")
    quieten_libraries()
    transformers.utils.logging.disable_progress_bar()
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder), given.sni, given.size)
        for name in given.only:
            print(f"{name}: {(scenarios[name].__doc__ or '').splitlines()[0]}", flush=True)
            began = time.perf_counter()
            found = scenarios[name](study, given)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            rows |= {key: {**figures, "size": given.size} for key, figures in found.items()}
    if given.size != "small":
        rows = {f"{given.size}_{name}": {**figures, "goal": None} for name, figures in rows.items()}
    show(title, rows)
    shown: Mapping[str, Mapping[str, Any]] = rows
    if given.output:
        record(given.output, rows)
        # The picture is of all that the file has of this benchmark, whichever scenarios were measured just now.
        kinds = {name.partition("_")[0] for name in rows}
        shown = {name: figures for name, figures in read_json(given.output).items() if name.partition("_")[0] in kinds}
    if given.picture:
        given.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(shown, given.picture)
    return rows


def draw_ratios(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A bar a row, its runs as dots and its goal as a line with an arrow to the side that meets it."""
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.42 * len(rows)))
    names = list(rows)[::-1]
    for place, name in enumerate(names):
        figures = rows[name]
        ratio, goal = figures.get("ratio", figures.get("value")), figures["goal"]
        axis.barh(place, ratio, height=0.55, color="tab:blue", alpha=0.75)
        axis.plot(figures["runs"], [place] * len(figures["runs"]), ".", color="black", markersize=4)
        axis.annotate(f"{ratio:.2f}", (0, place), xytext=(4, -3), textcoords="offset points", fontsize=8)
        if goal is not None:
            axis.plot([goal, goal], [place - 0.38, place + 0.38], color="tab:red", linewidth=2)
            marker = ">" if figures["direction"] == "at_least" else "<"
            axis.plot([goal], [place + 0.38], marker, color="tab:red", markersize=6)
    axis.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axis.set(
        xlabel="ratio; dots are runs, red is the goal and the side on which it is met",
        xlim=(0, 1.08 * axis.get_xlim()[1]),
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
