"""docs/performance.md from docs/performance.json: every figure with its goal, its spread and what it says.

python tests/benchmarks/page.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tagi_ds.files import read_json, whole_file
from tests.benchmarks.figures import reached
from tests.benchmarks.page_words import GROWTH_PICTURE, INTRODUCTION, REMARKS, SECTIONS, Section

DOCS = Path(__file__).resolve().parents[2] / "docs"
Figures = Mapping[str, Mapping[str, Any]]


def page(rows: Figures) -> str:
    """The page's text.

    Raises:
        ValueError: a row of the file that no section names, which a reader would never see.
    """
    named = {name for section in SECTIONS for name in section.rows}
    unknown = sorted(set(rows) - named)
    if unknown:
        raise ValueError(f"no section of the page names the rows {', '.join(unknown)}")
    parts = [INTRODUCTION, *(_section(section, rows) for section in SECTIONS if set(section.rows) & set(rows))]
    return "\n".join(parts).rstrip() + "\n"


def _section(section: Section, rows: Figures) -> str:
    found = {name: rows[name] for name in section.rows if name in rows}
    lines = [f"## {section.title}", "", f"`{section.command}`", ""]
    if section.picture and (DOCS / section.picture).is_file():
        lines += [f"![{section.title}]({section.picture})", ""]
    lines += ["| | figure | runs | goal | |", "|---|---|---|---|---|"]
    lines += [_row(section.rows[name], figures) for name, figures in found.items()]
    lines.append("")
    curves = {name: figures for name, figures in found.items() if "points" in figures}
    if curves:
        lines += [GROWTH_PICTURE, ""]
        lines += [_curve(section.rows[name], figures) for name, figures in curves.items()]
        lines.append("")
    remarks = [REMARKS[name] for name in found if name in REMARKS]
    lines += [f"- {remark}" for remark in remarks] + ([""] if remarks else [])
    machines = dict.fromkeys(_machine(figures["machine"]) for figures in found.values() if "machine" in figures)
    lines += [f"Measured on {machine}." for machine in machines] + [""]
    return "\n".join(lines)


def _row(words: str, figures: Mapping[str, Any]) -> str:
    value = figures["ratio"] if "ratio" in figures else figures["value"]
    unit = "x" if "ratio" in figures else ""
    goal, mark = "", ""
    if figures["goal"] is not None:
        sign = "≤" if figures["direction"] == "at_most" else "≥"
        goal, mark = f"{sign} {_number(figures['goal'])}{unit}", "met" if reached(figures) else "missed"
    runs = figures["runs"]
    spread = f"{len(runs)}: {_number(min(runs))} to {_number(max(runs))}" if len(runs) > 1 else "1"
    return f"| {words} | {_number(value)}{unit} | {spread} | {goal} | {mark} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _curve(words: str, figures: Mapping[str, Any]) -> str:
    points = ", ".join(f"{at}: {point['seconds']:.2f} s" for at, point in figures["points"].items())
    return f"- {words}: {points}. Operations grow {figures['flops_ratio']:.2f}x; {figures['told']}."


def _machine(machine: Mapping[str, Any]) -> str:
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    device = machine.get("accelerator") or f"{machine['cores']} cores of {machine['processor']}{threads}"
    versions = [f"{name} {machine[name]}" for name in ("torch", "transformers", "peft") if name in machine]
    return f"{device}, Python {machine['python']}, {', '.join(versions)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=DOCS / "performance.json")
    parser.add_argument("--output", type=Path, default=DOCS / "performance.md")
    given = parser.parse_args(argv)
    text = page(read_json(given.figures))
    with whole_file(given.output) as aside:
        aside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
