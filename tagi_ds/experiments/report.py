"""A study's report: study.json with the figures, study.md and the self-contained study.html with what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tagi_ds.evaluation.document import Block, Heading, Paragraph, Picture, Table, to_html, to_markdown
from tagi_ds.experiments.collect import part_figures
from tagi_ds.experiments.definition import Study
from tagi_ds.experiments.pictures import cost_against_quality, learning_curves
from tagi_ds.experiments.planning import Tuned, plan_study
from tagi_ds.experiments.tuning import TUNING_FILE
from tagi_ds.files import read_json, whole_file, write_json, write_text

FIGURES_FILE, MARKDOWN_FILE, HTML_FILE = "study.json", "study.md", "study.html"
"""In the study's folder."""
PICTURES_FOLDER = "study_pictures"
_NONE = "-"


def write_study_report(study: Study, parts: Sequence[str], tuned: Tuned, folder: Path | None = None) -> Path | None:
    """Writes the report of what is there; parts that are not asked for keep the figures that they had.

    Args:
        study: of a study's file.
        parts: names of those to read anew.
        tuned: what tuning chose, as the parts were run with it.
        folder: takes the report; default the study's own.

    Returns:
        The HTML file's path; None where nothing is evaluated yet.

    Raises:
        UserError: a result is damaged, or the folder cannot be written to.
    """
    folder = folder or study.folder
    path = folder / FIGURES_FILE
    kept = read_json(path)["parts"] if path.is_file() else {}
    fresh = {}
    for name in parts:
        figures = part_figures(study, study.parts[name], plan_study(study, [name], tuned=tuned))
        if figures["methods"]:
            fresh[name] = figures
    figures_of = {**kept, **fresh}
    found = {
        name: {**figures_of[name], "remarks": list(part.remarks)}
        for name, part in study.parts.items()
        if name in figures_of
    }
    if not found:
        return None
    tuning = read_json(study.folder / TUNING_FILE) if (study.folder / TUNING_FILE).is_file() else None
    content = {"study": study.path.name, "tuning": tuning, "parts": found}
    write_json(path, content)
    write_document(folder, content)
    return folder / HTML_FILE


def write_document(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes Markdown, its pictures and HTML from what study.json holds.

    Raises:
        UserError: the folder cannot be written to.
    """
    title = f"Study: {content['study']}"
    blocks: list[Block] = [Heading(title, 1)]
    for name, figures in content["parts"].items():
        blocks += part_blocks(name, figures)
    if content["tuning"] is not None:
        blocks += _tuning(content["tuning"])
    for block in blocks:
        if isinstance(block, Picture):
            with whole_file(folder / PICTURES_FOLDER / f"{block.name}.png") as aside:
                aside.write_bytes(block.png)
    write_text(folder / MARKDOWN_FILE, to_markdown(blocks, Path(PICTURES_FOLDER)))
    write_text(folder / HTML_FILE, to_html(title, blocks))


def part_blocks(name: str, figures: Mapping[str, Any]) -> Iterator[Block]:
    """A part's section."""
    lengths = list(figures["lengths"])
    yield Heading(figures["title"])
    yield from _scores(figures)
    yield from map(Paragraph, figures["remarks"])
    yield from _costs(figures, lengths)
    yield Picture(f"{name}_cost", "Score over cost", cost_against_quality(figures, lengths[0] if lengths else None))
    yield from _tests(figures)
    if figures["curves"]:
        yield Heading("Learning curves on unseen validation tasks", 3)
        yield Picture(f"{name}_curves", "Validation over steps", learning_curves(figures, "validation figure"))
    yield from _controls(figures)
    yield from _categories(figures)


def _scores(figures: Mapping[str, Any]) -> Iterator[Block]:
    groups = _groups(figures)
    chance = "for other seeds and other tasks (two-way variance, Student's t; cut at 0 and 100)"
    if all(len(about["seeds"]) == 1 for about in figures["about"].values()):
        chance = "for other tasks alone (Student's t; cut at 0 and 100): one seed says nothing of others"
    yield Paragraph(
        f"Percent, averaged over tasks and seeds; in brackets the 95 % interval {chance}. The figure is named in the "
        "head; the others are in study.json."
    )
    heads = [f"{_words(group)}: {_words(_metric(figures, group))}" for group in groups]
    rows = []
    for method, scores in figures["methods"].items():
        about = figures["about"][method]
        cells = [_score(scores[group]) if group in scores else _NONE for group in groups]
        rows.append([about["title"], str(len(about["seeds"])), *cells])
    floors = figures["floors"]
    if floors:
        copied = [f"{floors[g][_metric(figures, g)]:.1f}" if g in floors else _NONE for g in groups]
        rows.append(["floor: the input copied", _NONE, *copied])
    yield Table(["method", "seeds", *heads], rows)


def _costs(figures: Mapping[str, Any], lengths: Sequence[str]) -> Iterator[Block]:
    yield Heading("What it costs", 3)
    yield Paragraph(
        "Training: the run's own steps, operations and seconds, and with all that it builds on (backbone, teachers, "
        "stored distributions, pretraining). Answering: operations relative to the same backbone that reads the "
        "instruction with every input, 100 inputs under one instruction, reckoned; and seconds, measured on the test "
        "tasks."
    )
    heads = ["method", "steps", "own TFLOP", "all TFLOP", "own s", "all s", *(f"answering, {at}" for at in lengths)]
    rows = []
    for about in figures["about"].values():
        training = [
            _number(about["steps"], 1, 0),
            *(_number(about["flops"][which], 1e12, 2) for which in ("own", "all")),
        ]
        training += [_number(about["seconds"][which], 1, 0) for which in ("own", "all")]
        answering = [f"{about['relative_inference'][at]:.2f}" for at in lengths]
        measured = [found["seconds"] for found in about["measured_answering"].values()]
        seconds = f"{sum(measured) / len(measured):.2f}" if measured else _NONE
        rows.append([about["title"], *training, *answering, seconds])
    yield Table([*heads, "answering, seconds"], rows)


def _tests(figures: Mapping[str, Any]) -> Iterator[Block]:
    rows = []
    for method, scores in figures["methods"].items():
        for group, found in scores.items():
            test = found.get("against_reference")
            if test is not None:
                figure = f"{test['difference']:+.1f}{_interval(test['interval'])}"
                values = [_p_value(test["p_value"]), _p_value(test["tasks_alone"]["p_value"])]
                about = figures["about"][method]["title"]
                rows.append([about, _words(group), figure, *values, str(test["tasks"]), str(len(test["seeds"]))])
    if not rows:
        return
    reference = figures["about"].get(figures["reference"], {}).get("title", figures["reference"])
    yield Heading(f"Against {reference}, task by task", 3)
    yield Paragraph(
        f"Method minus {reference} on the same task and seed, which is also the same backbone; interval and p for "
        "other seeds and other tasks, as above. `p, tasks` is for other tasks alone: a paired sign-flip permutation "
        "test over tasks, each task's scores averaged over these seeds. All are two-sided and not corrected for their "
        "number. One seed says nothing of others: its interval is for other tasks alone, and it has no p beside that."
    )
    yield Table(["method", "group", "difference", "p", "p, tasks", "tasks", "seeds"], rows)


def _controls(figures: Mapping[str, Any]) -> Iterator[Block]:
    if not figures["controls"]:
        return
    told = {group for controls in figures["controls"].values() for scores in controls.values() for group in scores}
    groups = [group for group in _groups(figures) if group in told]
    yield Heading("With another instruction", 3)
    yield Paragraph(
        "`random` is another task's instruction, `shuffled` the words of its own in another order: what is left of the "
        "score did not come from the instruction."
    )
    rows = []
    for method, controls in figures["controls"].items():
        for control, scores in controls.items():
            cells = [f"{scores[group]:.1f}" if group in scores else _NONE for group in groups]
            rows.append([figures["about"][method]["title"], control, *cells])
    yield Table(["method", "instruction", *map(_words, groups)], rows)


def _categories(figures: Mapping[str, Any]) -> Iterator[Block]:
    """Where each method fails: the categories that the reference finds hardest come first."""
    for group, categories in figures["categories"].items():
        methods = [method for method in figures["methods"] if any(method in found for found in categories.values())]
        order = figures["reference"] if figures["reference"] in methods else methods[0]
        yield Heading(f"Where they fail: {_words(group)}", 3)
        rows = [
            [category, *(f"{scores[method]:.0f}" if method in scores else _NONE for method in methods)]
            for category, scores in sorted(categories.items(), key=lambda item: (item[1].get(order, 0.0), item[0]))
        ]
        yield Table(["category", *(figures["about"][method]["title"] for method in methods)], rows)


def _tuning(outcome: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("Tuning")
    walked = "".join(
        f", walked from {key} {value:g} as long as the next value was better" for key, value in outcome["start"].items()
    )
    yield Paragraph(
        f"The same grid for every method{walked}, chosen by the mean of {outcome['metric']} over the seeds "
        f"{', '.join(map(str, outcome['seeds']))} on the validation tasks; an edge means that the grid ends there."
    )
    rows = []
    for method, found in outcome["methods"].items():
        for point in found["points"]:
            chosen = "chosen" if point["values"] == found["chosen"] else ""
            edge = " (edge)" if chosen and found["at_edge"] else ""
            values = ", ".join(f"{key} {value:g}" for key, value in point["values"].items())
            rows.append([method, values, f"{point['mean']:.4f}", chosen + edge])
    yield Table(["method", "values", outcome["metric"], ""], rows)


def _score(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return f"{found['mean']:.1f}"
    low, high = found["interval"]
    return f"{found['mean']:.1f} [{max(low, 0.0):.1f}, {min(high, 100.0):.1f}]"


def _interval(found: Sequence[float] | None) -> str:
    return "" if found is None else f" [{found[0]:+.1f}, {found[1]:+.1f}]"


def _p_value(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _number(value: float | None, unit: float, digits: int) -> str:
    return _NONE if value is None else f"{value / unit:.{digits}f}"


def _groups(figures: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(group for scores in figures["methods"].values() for group in scores))


def _metric(figures: Mapping[str, Any], group: str) -> str:
    return str(next(scores[group]["metric"] for scores in figures["methods"].values() if group in scores))


def _words(name: str) -> str:
    return name.replace("_", " ")
