"""The report's scores: tables with intervals, categories, templates of P3, controls, and methods compared pairwise."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.image import imsave

from tagi_ds.errors import UserError
from tagi_ds.evaluation.board import MOST_CATEGORIES, Scores, category_bars, category_scores
from tagi_ds.evaluation.comparison import compare, units_of
from tagi_ds.evaluation.document import Block, Heading, Paragraph, Picture, Table
from tagi_ds.evaluation.pictures import METRIC_NAMES, Interval, score_bars, template_spread
from tagi_ds.evaluation.statistics import interval

Results = Mapping[str, Mapping[str, Any]]
"""Method -> what its results file holds."""
Methods = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Method -> group -> metric -> %."""
_NONE = "-"


def words(name: str) -> str:
    """A group's name as a text has it."""
    return name.replace("_", " ")


def groups_of(methods: Methods) -> list[str]:
    """All groups, in the order in which they come."""
    return list(dict.fromkeys(group for scores in methods.values() for group in scores))


def under_own_instructions(evaluations: Results) -> dict[str, Mapping[str, Any]]:
    """The methods without the rows of controls."""
    return {name: each for name, each in evaluations.items() if each.get("instruction", "own") == "own"}


def score_intervals(evaluations: Results) -> dict[tuple[str, str, str], Interval]:
    """(method, group, metric) -> 95 % interval: the results file's own, or a bootstrap over its tasks."""
    found: dict[tuple[str, str, str], Interval] = {}
    for method, each in evaluations.items():
        for group in each.get("metrics", {}):
            for metric in each["metrics"][group]:
                kept = each.get("intervals", {}).get(group, {}).get(metric)
                if kept is not None:
                    found[method, group, metric] = (kept[0], kept[1])
                elif group in each.get("per_task", {}):
                    found[method, group, metric] = interval(units_of(each, group, metric))
    return found


def score_blocks(methods: Methods, evaluations: Results) -> Iterator[Block]:
    """Every method's scores under the tasks' own instructions."""
    controls = evaluations.keys() - under_own_instructions(evaluations).keys()
    shown = {name: scores for name, scores in methods.items() if name not in controls}
    groups, intervals = groups_of(shown), score_intervals(evaluations)
    columns = [
        (group, metric)
        for group in groups
        for metric in METRIC_NAMES
        if any(metric in scores.get(group, {}) for scores in shown.values())
    ]
    rows = [
        [
            method,
            *(
                _score(scores.get(group, {}).get(metric), intervals.get((method, group, metric)))
                for group, metric in columns
            ),
        ]
        for method, scores in shown.items()
    ]
    yield Heading("Scores")
    yield Paragraph(
        "Percent. Free answers are averaged over examples, ROUGE-L being that of the best reference; of answer choices "
        "the likeliest counts, by the mean or by the sum of its tokens' log-likelihoods, averaged over templates and "
        "then over data sets. In brackets the 95 % interval of a bootstrap over tasks (P3: over data sets): the chance "
        "of which tasks were drawn, not of the training's seed. Overlapping intervals do not say that two methods are "
        "alike; the paired comparison below does better."
    )
    for group, lacking in _missing(evaluations).items():
        yield Paragraph(f"{words(group)} lacks {', '.join(lacking)}: its average is not the published one.")
    for group, told in _left_out(evaluations).items():
        yield Paragraph(f"{words(group)} is scored without {'; without '.join(told)}.")
    yield Table(["method", *(f"{words(group)}: {METRIC_NAMES[metric]}" for group, metric in columns)], rows)
    yield Picture("scores", "Scores of every method by group", score_bars(shown, groups, intervals))


def template_blocks(evaluations: Results) -> Iterator[Block]:
    """Of P3 each data set's accuracy and its spread over the templates."""
    own = under_own_instructions(evaluations)
    for group in _task_groups(own):
        methods = {
            name: each["per_dataset"][group] for name, each in own.items() if group in each.get("per_dataset", {})
        }
        if not methods:
            continue
        yield Heading(f"Over the templates: {words(group)}")
        yield Paragraph(
            "The same examples under every wording of the task: the box holds half of the templates, the line in it is "
            "their median, the diamond their mean, which is the data set's accuracy; whiskers end at the lowest and "
            "the highest. A wide box says that the wording decides as much as the method."
        )
        rows = []
        for dataset in sorted({name for scores in methods.values() for name in scores}):
            for method, scores in methods.items():
                if dataset in scores:
                    rows.append([dataset, method, *_spread(scores[dataset])])
        yield Table(["data set", "method", "mean", "median", "quartiles", "range", "by sum", "templates"], rows)
        yield Picture(f"templates_{group}", f"Spread over templates, {words(group)}", template_spread(methods))


def category_blocks(evaluations: Results) -> Iterator[Block]:
    """Bars by category for each group that has several."""
    own = under_own_instructions(evaluations)
    for group in _task_groups(own):
        scores = category_scores(own, group)
        categories = {name for each in scores.values() for name in each}
        if len(categories) < 2:
            continue
        yield Heading(f"By category: {words(group)}")
        rest = f" Shown are the {MOST_CATEGORIES} with the most examples." if len(categories) > MOST_CATEGORIES else ""
        yield Paragraph(
            f"Averages over the examples of {len(categories)} categories.{rest} A category of one or two tasks moves "
            "by chance; each method's results.json has the numbers of tasks."
        )
        yield Picture(f"categories_{group}", f"Scores by category, {words(group)}", _category_picture(scores))


def control_blocks(evaluations: Results) -> Iterator[Block]:
    """What another instruction leaves of the scores."""
    rows = []
    for method, each in evaluations.items():
        for control, groups in each.get("controls", {}).items():
            for group, metrics in groups.items():
                for metric, found in metrics.items():
                    own = found["score"] + found["difference"]
                    cells = [f"{own:.1f}", f"{found['score']:.1f}", *_test(found)]
                    rows.append([method, control, words(group), METRIC_NAMES.get(metric, metric), *cells])
    if not rows:
        return
    yield Heading("What the instruction is worth")
    yield Paragraph(
        "The same inputs under the instruction of another task (random) or under their own with its words in another "
        "order (shuffled). The difference is what the own instruction gained: near zero, the method does not use it; "
        "below zero, the other one served better. p is the chance of a difference at least as large if the instruction "
        "made none (paired sign-flip permutation over tasks, two-sided)."
    )
    heads = ["method", "instruction", "group", "metric", "own", "other", "own - other", "p", "tasks"]
    yield Table(heads, rows)


def comparison_blocks(evaluations: Results) -> Iterator[Block]:
    """Every two methods on the tasks that both answered."""
    own = under_own_instructions(evaluations)
    # TAGI is what the others are there for.
    names = sorted(own, key=lambda name: name != "tagi")
    rows: list[list[str]] = []
    refused: list[str] = []
    for at, first in enumerate(names):
        for second in names[at + 1 :]:
            try:
                compared = compare(own[first], own[second], (first, second))
            except UserError as error:
                refused.append(f"{first} and {second} are not compared: {error.problem}.")
                continue
            for group, metrics in compared.items():
                for metric, found in metrics.items():
                    scores = [f"{found[which]:.1f}" for which in ("first", "second")]
                    label = METRIC_NAMES.get(metric, metric)
                    rows.append([f"{first} - {second}", words(group), label, *scores, *_test(found)])
    if not rows and not refused:
        return
    yield Heading("Methods compared, task by task")
    yield Paragraph(
        "The first minus the second on the same tasks, with the 95 % interval of a bootstrap over them. p is the "
        "chance of a difference at least as large if neither were better (paired sign-flip permutation over tasks, "
        "two-sided), not corrected for the number of rows: of twenty true ties one has p below 0.05."
    )
    for reason in refused:
        yield Paragraph(reason)
    if rows:
        yield Table(["methods", "group", "metric", "first", "second", "difference", "p", "tasks"], rows)


def _category_picture(scores: Scores) -> bytes:
    buffer = io.BytesIO()
    # Without the Software entry the bytes depend on the picture alone.
    imsave(buffer, category_bars(scores), format="png", metadata={"Software": None})  # type: ignore[dict-item]
    return buffer.getvalue()


def _task_groups(evaluations: Results) -> list[str]:
    """Groups that have tasks of their own; HyperT5's subset has those of its whole."""
    return list(dict.fromkeys(group for each in evaluations.values() for group in each.get("per_task", {})))


def _missing(evaluations: Results) -> dict[str, Sequence[str]]:
    found = {group: names for each in evaluations.values() for group, names in each.get("missing", {}).items()}
    return {group: names for group, names in found.items() if names}


def _left_out(evaluations: Results) -> dict[str, list[str]]:
    """Group -> what its scores are without, in words."""
    found = {group: left_out for each in evaluations.values() for group, left_out in each.get("left_out", {}).items()}
    told: dict[str, list[str]] = {}
    for group, left_out in found.items():
        malformed, cut = left_out.get("malformed", {}), left_out.get("cut", {})
        gone, foreign = left_out.get("gone", []), left_out.get("other_languages", [])
        parts = [
            (malformed, f"malformed rows and files ({sum(malformed.values())}, tasks: {len(malformed)})"),
            (gone, f"tasks of which nothing can be read ({', '.join(gone)})"),
            (foreign, f"tasks in other languages ({len(foreign)})"),
            (cut, f"some rows of templates ({len(cut)}), which the published evaluation counts all"),
        ]
        told[group] = [text for there, text in parts if there]
    return told


def _score(score: float | None, between: Interval | None) -> str:
    if score is None:
        return _NONE
    return f"{score:.1f}" if between is None else f"{score:.1f} [{between[0]:.1f}, {between[1]:.1f}]"


def _spread(found: Mapping[str, float]) -> list[str]:
    between = [f"{found[low]:.1f} to {found[high]:.1f}" for low, high in (("q1", "q3"), ("min", "max"))]
    figures = [f"{found['accuracy']:.1f}", f"{found['median']:.1f}", *between, f"{found['accuracy_unnormalised']:.1f}"]
    return [*figures, str(found["templates"])]


def _test(found: Mapping[str, Any]) -> list[str]:
    low, high = found["interval"]
    return [f"{found['difference']:+.1f} [{low:+.1f}, {high:+.1f}]", f"{found['p_value']:.4f}", str(found["tasks"])]
