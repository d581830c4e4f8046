"""Which points of a grid are tried: all, or those of a walk from its start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ds.experiments import command
from tagi_ds.experiments.definition import Tuning
from tagi_ds.experiments.nodes import Node
from tagi_ds.experiments.tuning import first_trials, further_trials
from tests.experiments.studies import Launches, tree_of

RATE = "optimizer.learning_rate"


class Liking(Launches):
    """Finetuning likes small rates, meta-training large ones."""

    def finish(self, node: Node) -> int:
        if node.config is not None:
            rate = node.config.optimizer.learning_rate
            self.best = {**self.best, node.name: rate if node.stage == "meta_train" else 1 - rate}
        return super().finish(node)


def walked(scores: list[float], start: int, metric: str = "validation/exact") -> list[int]:
    """Places in the order in which they are tried."""
    tuning = Tuning((0,), ("hint",), {RATE: tuple(range(len(scores)))}, start={RATE: start})
    trials = first_trials(tuning, ["hint"])["hint"]
    while True:
        tried = [point[0][1] for point in trials]
        points = [{"values": dict(point), "mean": scores[point[0][1]]} for point in trials]
        further = further_trials(tuning, {"metric": metric, "methods": {"hint": {"points": points}}})
        if not further:
            return tried
        trials = (*trials, *further["hint"])
        assert len(trials) <= len(scores)


@pytest.mark.parametrize(
    ("scores", "start", "expected"),
    [
        ([1, 2, 3, 4, 5], 1, [1, 2, 3, 4]),
        ([1, 2, 3, 2, 9], 1, [1, 2, 3]),
        ([5, 4, 3, 2, 1], 2, [2, 3, 1, 0]),
        ([1, 4, 3, 2, 1], 2, [2, 3, 1, 0]),
        ([1, 2, 2, 2], 1, [1, 2, 0]),
        ([1, 2], 1, [0, 1]),
        ([2, 1], 1, [0, 1]),
        ([7], 0, [0]),
    ],
)
def test_a_walk_goes_on_while_the_next_value_is_better(scores: list[float], start: int, expected: list[int]) -> None:
    assert walked(scores, start) == expected
    assert walked([-score for score in scores], start, "validation/loss") == expected, "of a loss, less is better"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_a_walk_ends_at_a_value_whose_neighbours_are_not_better(scores: list[float], data: st.DataObject) -> None:
    tried = walked(scores, data.draw(st.integers(0, len(scores) - 1)))
    assert len(set(tried)) == len(tried)
    assert sorted(tried) == list(range(min(tried), max(tried) + 1)), "no value is leapt over"
    highest = max(scores[place] for place in tried)
    around = [{at - 1, at, at + 1} & set(range(len(scores))) for at in tried if scores[at] == highest]
    assert any(places <= set(tried) for places in around)


def test_every_method_walks_its_own_way_and_the_record_says_how(tmp_path: Path) -> None:
    tuning: dict[str, Any] = {"seeds": [0], "methods": ["hint", "meta_training"], "start": {RATE: 2e-3}}
    tuning["grid"] = {RATE: [1e-3, 2e-3, 4e-3, 8e-3]}
    path = tmp_path / "study.yaml"
    variants = {"hint": {"method": "hint"}, "meta_training": {"method": "meta_training"}}
    parts = {"main": {"seeds": [0], "reference": "hint", "variants": variants}}
    path.write_text(yaml.safe_dump(tree_of(tmp_path, tuning=tuning, parts=parts)))
    told = ["--config", str(path), "--part", "tuning"]
    assert command.run(told, Liking()) == 0
    found = json.loads((tmp_path / "study" / "tuning.json").read_text())
    rates = {m: [each["values"][RATE] for each in about["points"]] for m, about in found["methods"].items()}
    assert rates == {"hint": [1e-3, 2e-3, 4e-3], "meta_training": [2e-3, 4e-3, 8e-3]}, "in the grid's order"
    assert found["methods"]["meta_training"]["at_edge"] == [RATE]
    assert found["methods"]["hint"]["chosen"] == {RATE: 1e-3}
    assert found["start"] == {RATE: 2e-3}
    again = Liking()
    assert command.run(told, again) == 0
    assert not again.started
