"""The report: every number that it shows comes from the study's files."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tagi_ds.errors import UserError
from tagi_ds.evaluation.predictions import Prediction, PredictionStore
from tagi_ds.evaluation.report import results_table, write_report
from tagi_ds.files import write_json
from tagi_ds.run_folder import mark_done

GROUPS = ("seen", "unseen_arguments", "unseen_compositions")
RESULTS = {
    "methods": {
        "untrained": {group: {"exact_match": 0.0, "rouge_l": 1.25} for group in GROUPS},
        "meta_trained": {group: {"exact_match": 64.04, "rouge_l": 80.0} for group in GROUPS},
        "tagi": {group: {"exact_match": 71.5, "rouge_l": 88.8} for group in GROUPS[:2]},
    },
    "steps": {"finetune": 300},
    "seconds": {"finetune": 12.5, "install": 60},
}


def _evaluation(study: Path, method: str, per_task: dict[str, Any], predictions: list[Prediction]) -> None:
    folder = study / "evaluate" / method
    metrics = {"seen": {"exact_match": 50.0, "rouge_l": 75.0}}
    write_json(folder / "results.json", {"method": method, "metrics": metrics, "per_task": {"seen": per_task}})
    PredictionStore(folder / "predictions", "seen").finish(predictions)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_json(tmp_path / "results.json", RESULTS)
    per_task = {
        f"task{at}": {"exact_match": 100.0 * at, "rouge_l": 50.0 + 50 * at, "examples": 3, "instruction": f"do <{at}>"}
        for at in range(2)
    }
    predictions = [
        Prediction(f"e{n}", f"task{n % 2}", f"input {n}", "yes" if n % 2 else f"bad | answer {n}", ("yes",), 0.1, "k")
        for n in range(12)
    ]
    _evaluation(tmp_path, "tagi", per_task, predictions)
    (tmp_path / "finetune").mkdir()
    lines = [{"step": 1, "loss/label": 3.0, "lr": 1.0}, {"step": 2, "loss/label": 2.0, "loss/kl": 0.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "loss/la'
    (tmp_path / "finetune" / "metrics.jsonl").write_text(text, encoding="utf-8")
    mark_done(tmp_path / "finetune", {"steps": 300, "seconds": 12.5, "flops": 3.2e12})
    mark_done(tmp_path / "backbone", {"steps": 40, "seconds": 5.0})
    return tmp_path


def test_the_report_shows_scores_compute_and_examples(study: Path) -> None:
    page = write_report(study)
    assert page == study / "report.html"
    text = page.read_text(encoding="utf-8")
    markdown = (study / "report.md").read_text(encoding="utf-8")
    for shown in (text, markdown.replace("\\", "")):
        for part in ("meta_trained", "64.0", "71.5 [0.0, 100.0]", "88.8 [50.0, 100.0]", "3.20e+12", "300", "12.5"):
            assert part in shown
        assert shown.index("backbone") < shown.index("finetune"), "stages in the order in which they run"
        assert "install" in shown
        assert "unseen compositions" in shown
    assert "do &lt;0&gt;" in text
    assert "<0>" not in text, "texts of the data set are escaped"
    assert "bad \\| answer 0" in markdown


def test_the_page_needs_no_other_file_and_the_markdown_finds_its_pictures(study: Path) -> None:
    text = write_report(study).read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (study / "report.md").read_text(encoding="utf-8"))
    assert [(study / link).read_bytes() for link in linked] == pictures
    assert len(pictures) == 2
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_examples_are_right_and_wrong_ones(study: Path) -> None:
    text = write_report(study).read_text(encoding="utf-8")
    assert text.count("<td>right</td>") == text.count("<td>wrong</td>") == 3


def test_rows_have_as_many_cells_as_the_head(study: Path) -> None:
    write_report(study)
    tables = re.findall(r"(?:^\|.*\n)+", (study / "report.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_without_a_studys_results_the_methods_own_are_gathered(study: Path) -> None:
    (study / "results.json").unlink()
    assert "50.0 [0.0, 100.0]" in write_report(study).read_text(encoding="utf-8")


def test_a_report_needs_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results"):
        write_report(tmp_path)


def test_a_damaged_metrics_line_is_named(study: Path) -> None:
    (study / "finetune" / "metrics.jsonl").write_text('{"step": 1}\nbroken\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        write_report(study)


def test_the_reports_bytes_depend_on_the_study_alone(study: Path) -> None:
    first = write_report(study).read_bytes()
    assert write_report(study).read_bytes() == first


def test_the_console_table() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(results_table(RESULTS))
    lines = captured.get().splitlines()
    meta = next(line for line in lines if "meta_trained" in line)
    assert meta.count("64.0 / 80.0") == 3
    tagi = next(line for line in lines if "tagi" in line)
    assert tagi.count("71.5 / 88.8") == 2
    assert any("unseen compositions" in line for line in lines)
