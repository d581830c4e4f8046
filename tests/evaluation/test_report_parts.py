"""Every part of a report: there when its data are, left out when they are not, and with the figures of the files."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tagi_ds.evaluation import map_picture, pictures
from tagi_ds.evaluation.comparison import compare
from tagi_ds.evaluation.cost import WAYS
from tagi_ds.evaluation.document import Picture, Table
from tagi_ds.evaluation.pictures import CostPanel
from tagi_ds.evaluation.report import write_report
from tagi_ds.evaluation.report_answers import choose_examples, is_right
from tagi_ds.evaluation.report_costs import quality_blocks, training_costs
from tagi_ds.evaluation.report_scores import comparison_blocks, control_blocks, score_blocks, template_blocks
from tagi_ds.evaluation.results import gather_results
from tagi_ds.files import read_json, write_json
from tests.evaluation.reported import RELATIVE, adapter_map, ranked_example, write_study

Results = dict[str, dict[str, Any]]
PARTS = {
    "Scores",
    "Methods compared, task by task",
    "What the instruction is worth",
    "Over the templates: mtest11",
    "By category: unseen",
    "Learning curves",
    "Compute",
    "What answering costs",
    "Quality over cost",
    "Which tasks get like adapters: tagi",
    "How tagi answers: unseen",
    "How tagi answers: mtest11",
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_study(tmp_path)
    return tmp_path


@pytest.fixture
def results(study: Path) -> Results:
    return {path.parent.name: read_json(path) for path in sorted((study / "evaluate").glob("*/results.json"))}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, whose files are not made."""
    found: list[Figure] = []

    def noted(figure: Figure) -> bytes:
        found.append(figure)
        return b""

    for module in (pictures, map_picture):
        monkeypatch.setattr(module, "to_png", noted)
    return found


def _headings(page: Path) -> set[str]:
    return set(re.findall(r"<h2>([^<]+)</h2>", page.read_text(encoding="utf-8")))


def test_every_part_is_there_in_one_file_of_its_own(study: Path) -> None:
    page = write_report(study)
    text = page.read_text(encoding="utf-8")
    assert _headings(page) == PARTS
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\(|<script|<link|https?:""", text)
    assert len(text) < 1_000_000
    markdown = (study / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(linked) == text.count("<img ") == 6
    assert all((study / link).read_bytes().startswith(b"\x89PNG") for link in linked)
    for name in PARTS:
        assert f"## {name}" in markdown
    told = (
        "unseen is scored without malformed rows and files (7, tasks: 2); without tasks of which nothing can be read "
    )
    assert f"{told}(b); without tasks in other languages (1)." in text
    assert "mtest11 is scored without some rows of templates (1), which the published evaluation counts all" in text


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(study: Path) -> None:
        for path in (study / "evaluate").glob("*/results.json"):
            content = read_json(path)
            change(content)
            write_json(path, content)

    return edit


def _without(*names: str) -> Callable[[Path], None]:
    return _edit(lambda content: [content.pop(name, None) for name in names])


def _one_category(content: dict[str, Any]) -> None:
    content["per_category"]["unseen"] = {"all": {"rouge_l": 1.0, "exact_match": 1.0, "tasks": 6, "examples": 24}}


def _only_tagi(study: Path) -> None:
    for name in ("backbone", "untrained"):
        shutil.rmtree(study / "evaluate" / name)


def _no_metrics(study: Path) -> None:
    for path in study.glob("*/metrics.jsonl"):
        path.unlink()


@pytest.mark.parametrize(
    ("remove", "gone"),
    [
        (_without("controls"), {"What the instruction is worth"}),
        (_without("per_dataset"), {"Over the templates: mtest11"}),
        (_edit(_one_category), {"By category: unseen"}),
        (_without("flops", "cost"), {"What answering costs"}),
        (_no_metrics, {"Learning curves"}),
        (lambda study: (study / "evaluate/tagi/adapters_map.json").unlink(), {"Which tasks get like adapters: tagi"}),
        (lambda study: (study / "evaluate/tagi/predictions/mtest11.jsonl").unlink(), {"How tagi answers: mtest11"}),
        (
            _only_tagi,
            {"Methods compared, task by task"},
        ),
    ],
    ids=["controls", "templates", "categories", "cost", "curves", "map", "answers", "comparison"],
)
@pytest.mark.usefixtures("drawn")
def test_what_is_not_there_is_left_out(study: Path, remove: Callable[[Path], object], gone: set[str]) -> None:
    remove(study)
    assert _headings(write_report(study)) == PARTS - gone


@pytest.mark.usefixtures("drawn")
def test_without_any_cost_there_is_no_quality_over_cost(study: Path) -> None:
    _without("flops", "cost")(study)
    for path in study.glob("*/done.json"):
        path.unlink()
    assert _headings(write_report(study)) == PARTS - {"What answering costs", "Quality over cost", "Compute"}


def test_scores_are_of_own_instructions_and_of_every_metric(study: Path, results: Results) -> None:
    table = next(block for block in score_blocks(gather_results(study)["methods"], results) if isinstance(block, Table))
    metrics = [f"unseen: {name}" for name in ("exact match", "ROUGE-L")]
    assert list(table.head) == ["method", *metrics, "mtest11: accuracy", "mtest11: accuracy by sum"]
    assert [row[0] for row in table.rows] == ["backbone", "tagi", "untrained"]
    low, high = results["tagi"]["intervals"]["unseen"]["rouge_l"]
    assert table.rows[1][2] == f"35.0 [{low:.1f}, {high:.1f}]"
    assert table.rows[1][3] == "50.0 [50.0, 50.0]"


def test_comparisons_are_those_of_the_command(results: Results) -> None:
    (table,) = (block for block in comparison_blocks(results) if isinstance(block, Table))
    assert list(dict.fromkeys(row[0] for row in table.rows)) == [
        "tagi - backbone",
        "tagi - untrained",
        "backbone - untrained",
    ]
    found = compare(results["tagi"], results["backbone"])["unseen"]["rouge_l"]
    row = next(row for row in table.rows if row[:3] == ["tagi - backbone", "unseen", "ROUGE-L"])
    # Every task is 5 points better: of 2^6 sign flips two are as extreme.
    assert row[3:] == ["35.0", "30.0", "+5.0 [+5.0, +5.0]", f"{2 / 64:.4f}", "6"]
    assert found["p_value"] == 2 / 64


@pytest.mark.usefixtures("drawn")
def test_methods_of_unlike_tasks_are_named_not_compared(study: Path, results: Results) -> None:
    del results["untrained"]["per_task"]["unseen"]["task3"]
    write_json(study / "evaluate" / "untrained" / "results.json", results["untrained"])
    text = write_report(study).read_text(encoding="utf-8")
    assert "tagi and untrained are not compared: group unseen: only tagi has 1 of the tasks: task3." in text
    assert "tagi - backbone" in text


def test_controls_say_what_the_instruction_gained(results: Results) -> None:
    (table,) = (block for block in control_blocks(results) if isinstance(block, Table))
    assert table.rows[1] == [
        "tagi", "random", "unseen", "ROUGE-L", "35.0", "32.0", "+3.0 [+3.0, +3.0]", f"{2 / 64:.4f}", "6",
    ]  # fmt: skip


def test_templates_have_their_median_and_spread(results: Results, drawn: list[Figure]) -> None:
    (table,) = (block for block in template_blocks(results) if isinstance(block, Table))
    row = next(row for row in table.rows if row[:2] == ["super_glue/rte", "tagi"])
    assert row[2:] == ["50.0", "50.0", "47.5 to 52.5", "45.0 to 55.0", "35.0", "2"]
    (figure,) = drawn
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["super_glue/cb", "super_glue/rte"]
    assert len(figure.axes[0].patches) == 2 * 3, "a box for each data set and method"


def test_curves_have_losses_and_validation(study: Path, drawn: list[Figure]) -> None:
    write_report(study)
    figure = next(figure for figure in drawn if any("losses" in axes.get_title() for axes in figure.axes))
    lines = {axes.get_title(): {line.get_label(): line for line in axes.lines} for axes in figure.axes}
    assert list(lines) == ["backbone: losses", "backbone: right, %", "finetune: losses", "finetune: right, %"]
    assert set(lines["backbone: losses"]) == {"label", "validation loss"}, "a total of one term is that term"
    assert set(lines["finetune: losses"]) == {"kl", "label", "total", "validation loss"}
    held_out = lines["finetune: right, %"]["validation exact"]
    np.testing.assert_allclose(np.asarray(held_out.get_xydata()), [[2, 10], [4, 20], [6, 30]])
    assert held_out.get_color() == lines["finetune: right, %"]["exact"].get_color()


def test_training_costs_what_a_model_builds_on(study: Path, results: Results) -> None:
    results["meta_trained"] = results["backbone"]
    assert training_costs(study, results) == {
        "backbone": {"": 1.0},
        "tagi": {"": pytest.approx(3.5)},
        "meta_trained": {"": pytest.approx(4.5)},
    }
    (study / "meta_train" / "config.yaml").write_text(yaml.safe_dump({"model": {"initial": "scratch"}}))
    elsewhere = {"tagi": "/elsewhere/model", "backbone": str(study / "backbone" / "model")}
    (study / "evaluate" / "config.yaml").write_text(yaml.safe_dump({"evaluation": {"methods": elsewhere}}))
    del results["meta_trained"]
    assert training_costs(study, results) == {"backbone": {"": 1.0}}, "what was trained elsewhere is unknown"
    (study / "evaluate" / "config.yaml").unlink()
    results["meta_trained"] = results["backbone"]
    assert training_costs(study, results)["meta_trained"] == {"": pytest.approx(3.5)}


def test_quality_over_cost_has_every_way_of_every_method(
    study: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[list[CostPanel]] = []

    def noted(given: list[list[CostPanel]]) -> bytes:
        rows.extend(given)
        return b""

    monkeypatch.setattr("tagi_ds.evaluation.report_costs.cost_against_quality", noted)
    assert any(isinstance(block, Picture) for block in quality_blocks(study, results))
    assert [(panel.title, panel.cost, panel.score) for panel in rows[0]] == [
        ("unseen", "operations of answering, relative", "ROUGE-L, %"),
        ("mtest11", "operations of answering, relative", "accuracy, %"),
    ]
    points = rows[0][0].points
    assert points["backbone"] == [(1.0, 30.0, WAYS["concatenated"])]
    ways = ("every_batch", "once", "compiled")
    assert points["tagi"] == [(RELATIVE[way], pytest.approx(35.0), WAYS[way]) for way in ways]
    assert [cost for cost, _, _ in points["untrained"]] == [RELATIVE[way] for way in ways]
    assert set(rows[2][0].points) == {"backbone", "tagi"}
    assert rows[2][0].points["tagi"] == [(pytest.approx(3.5), pytest.approx(35.0), "")]


def test_all_points_of_the_cost_picture_are_inside(drawn: list[Figure]) -> None:
    points = {"a": [(1.0, 10.0, "x")], "b": [(0.5, 20.0, "y"), (3.0, 20.0, "z")]}
    unknown = CostPanel("other group", "cost", "score", {})
    pictures.cost_against_quality([[CostPanel("group", "cost", "score", points, {"b": (15.0, 25.0)}), unknown]])
    axes = drawn[0].axes[0]
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 3
    assert axes.get_ylim()[0] < 10
    assert axes.get_ylim()[1] > 25
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b", "x", "y", "z"]


def test_ranked_answers_are_judged_as_scored_and_the_surest_wrong_come_first() -> None:
    found = [ranked_example(f"r{n}", n % 2, float(n)) for n in range(8)]
    assert [is_right(each) for each in found] == [True, False] * 4
    chosen = choose_examples(found)
    assert [each.id for each in chosen] == ["r0", "r2", "r4", "r7", "r5", "r3"]


@pytest.mark.usefixtures("drawn")
def test_ranked_answers_show_their_choices(study: Path) -> None:
    text = write_report(study).read_text(encoding="utf-8")
    assert "-2.00  yes indeed\n-11.00  no" in text


def test_names_on_the_map_cover_nothing(drawn: list[Figure]) -> None:
    map_picture.map_picture(adapter_map())
    (figure,) = drawn
    axes = figure.axes[0]
    assert len(axes.lines) == 40
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    assert 1 <= len(boxes) <= map_picture.MOST_NAMES
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    places = axes.transData.transform(np.array(adapter_map()["points"]))
    assert not any(box.contains(*place) for box in boxes for place in places)
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(told) == 10
    assert told[-1] == "3 other categories (9)"


def test_names_are_given_from_the_outside_in() -> None:
    points = np.array([[0.0, 0.0], [-0.1, 0.0], [4.0, 0.0], [-3.0, 0.0]])
    assert map_picture.spread_order(points) == [2, 3, 0, 1]
