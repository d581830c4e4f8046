"""Work that several jobs of one stage divide: every item once, and again when what it left is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tagi_ds.config import RunConfig
from tagi_ds.engine import distributed
from tagi_ds.launch import Stage
from tagi_ds.stages.sharing import agreed, items_of_this_job, traces_of

ITEMS = ["a", "b", "c"]


def stage_in(folder: Path) -> Stage:
    return Stage("evaluate", RunConfig(), distributed.current(), folder)


def do(stage: Stage, items: list[str]) -> list[str]:
    """Does what is left, each leaving a file."""
    done = []
    for item in items_of_this_job(stage, items, lambda item: (stage.run_dir / item).is_file()):
        (stage.run_dir / item).write_text(item)
        done.append(item)
    return done


def test_two_jobs_share_the_items(tmp_path: Path) -> None:
    first, second = stage_in(tmp_path), stage_in(tmp_path)
    turns = items_of_this_job(first, ITEMS, lambda item: (tmp_path / item).is_file())
    assert next(turns) == "a"
    others = items_of_this_job(second, ITEMS[:2], lambda item: (tmp_path / item).is_file())
    assert next(others) == "b", "the first one is at work on a"
    for item in ("a", "b"):
        (tmp_path / item).write_text(item)
    assert next(turns) == "c"
    (tmp_path / "c").write_text("c")
    assert list(others) == list(turns) == []
    assert do(first, ITEMS) == []


def test_what_is_gone_is_done_again(tmp_path: Path) -> None:
    stage = stage_in(tmp_path)
    assert do(stage, ITEMS) == ITEMS
    (tmp_path / "b").unlink()
    assert do(stage, ITEMS) == ["b"]


def test_an_error_gives_the_item_back(tmp_path: Path) -> None:
    stage = stage_in(tmp_path)
    turns = items_of_this_job(stage, ITEMS, lambda item: True)
    next(turns)
    assert list((tmp_path / "work").glob("a.*.claim"))
    turns.close()
    assert not list((tmp_path / "work").glob("*.claim"))
    with pytest.raises(StopIteration):
        next(turns)
    assert do(stage, ITEMS) == ITEMS


def test_what_the_first_job_says_holds_for_all_and_after_restarts(tmp_path: Path) -> None:
    said = [agreed(stage_in(tmp_path), "type", lambda answer=answer: {"type": answer}) for answer in ("a", "b")]
    assert said == [{"type": "a"}, {"type": "a"}]
    assert agreed(stage_in(tmp_path), "size", lambda: {"size": 3}) == {"size": 3}


def test_another_model_in_the_same_place_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert traces_of(tmp_path / "nowhere") == traces_of(tmp_path / "model") == []
    weights = tmp_path / "model" / "weights"
    weights.write_text("one")
    before = traces_of(tmp_path / "model")
    assert traces_of(tmp_path / "model") == before
    os.utime(weights, ns=(1, 1))
    assert traces_of(tmp_path / "model") != before
