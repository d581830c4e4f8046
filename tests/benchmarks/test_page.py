from __future__ import annotations

import pytest

from tagi_ds.files import read_json
from tests.benchmarks.page import DOCS, page
from tests.benchmarks.page_words import REMARKS, SECTIONS


def test_the_page_is_the_file_in_words() -> None:
    rows = read_json(DOCS / "performance.json")
    assert (DOCS / "performance.md").read_text(encoding="utf-8") == page(rows), "python tests/benchmarks/page.py"


def test_every_figure_shows_its_spread_goal_and_mark() -> None:
    machine = {"cores": 2, "processor": "P", "torch": "2", "python": "3"}
    told = {"goal": 2.0, "direction": "at_least", "machine": machine}
    first, second = list(SECTIONS[0].rows)[:2]
    rows = {first: {"ratio": 3.0, "runs": [2.5, 3.0, 3.5], **told}, second: {"ratio": 1.5, "runs": [1.5], **told}}
    text = page(rows)
    assert f"| {SECTIONS[0].rows[first]} | 3x | 3: 2.5 to 3.5 | ≥ 2x | met |" in text
    assert f"| {SECTIONS[0].rows[second]} | 1.5x | 1 | ≥ 2x | missed |" in text
    assert "Measured on 2 cores of P, Python 3, torch 2." in text


def test_a_row_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="names the rows unheard_of"):
        page({"unheard_of": {}})


def test_remarks_are_on_rows_that_there_are() -> None:
    assert set(REMARKS) <= {name for section in SECTIONS for name in section.rows}
