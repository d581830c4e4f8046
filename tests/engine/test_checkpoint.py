from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import EngineConfig, LossConfig, OptimizerConfig
from tagi_ds.data.c4 import DocumentMixture
from tagi_ds.engine import trainer as trainer_module
from tagi_ds.engine.checkpoint import CheckpointStore
from tagi_ds.engine.distributed import Ranks, current
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.objective import joined_state
from tagi_ds.engine.single import SingleStrategy
from tagi_ds.engine.strategy import Replica
from tagi_ds.engine.trainer import Trainer
from tagi_ds.files import read_json
from tagi_ds.teachers.distillation import Distillation, DistilledSource
from tests.distributed import run_ranks
from tests.engine.joining import CONFIG
from tests.engine.toy import ToyObjective, ToySource, build


class Sharing(ToySource):
    """Each rank knows its own lane alone."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "lanes": {str(self.rank): self.position}}

    def join(self, shares: list[dict[str, Any]]) -> dict[str, Any]:
        return {**shares[0], "lanes": {name: at for share in shares for name, at in share["lanes"].items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.loaded = state


def test_shares_are_equal_or_joined() -> None:
    source: Any = ToySource(0, 1, 1)
    assert joined_state(source, [{"position": 1}, {"position": 1}]) == {"position": 1}
    with pytest.raises(RuntimeError, match="differs between ranks"):
        joined_state(source, [{"position": 1}, {"position": 2}])
    sharing = Sharing(0, 2, 1)
    shares = [Sharing(rank, 2, 1).state_dict() for rank in range(2)]
    expected = {"position": 0, "lanes": {"0": 0, "1": 0}}
    assert joined_state(sharing, shares) == expected
    attach = Distillation(None, None, LossConfig()).attach
    assert joined_state(DistilledSource(sharing, attach), shares) == expected
    with pytest.raises(RuntimeError, match="differs between ranks"):
        joined_state(DistilledSource(source, attach), [{"position": 1}, {"position": 2}])


def test_a_checkpoint_keeps_the_joined_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(strategy="single", precision="fp32", steps=2, checkpoint_every=2)
    ranks: Ranks = current()
    other = {"position": 2, "lanes": {"1": 2}}

    def fit(steps: int) -> Sharing:
        engine.steps = steps
        strategy, _ = build(engine, OptimizerConfig(), ranks)
        source = Sharing(0, 1, 1)
        Trainer(strategy, ToyObjective(), source, engine, tmp_path, Monitor(tmp_path, "toy", steps)).fit()
        return source

    # The other of two replicas is played here.
    monkeypatch.setattr(SingleStrategy, "replica", Replica(0, 2, True))
    gather = trainer_module.gather_objects
    monkeypatch.setattr(
        trainer_module,
        "gather_objects",
        lambda value: [*gather(value), other] if isinstance(value, dict) and "lanes" in value else gather(value),
    )
    fit(2)
    joined = {"position": 2, "lanes": {"0": 2, "1": 2}}
    assert read_json(tmp_path / "checkpoints" / "step_2" / "state.json")["run"]["data"] == joined
    other["position"] = 4
    assert fit(4).loaded == joined


def test_throughput_does_not_count_the_time_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(strategy="single", precision="fp32", steps=2, checkpoint_every=1)
    strategy, source = build(engine, OptimizerConfig(), current())
    apart: list[float] = []
    monkeypatch.setattr(Monitor, "set_apart", lambda self, seconds: apart.append(seconds))
    monkeypatch.setattr(CheckpointStore, "save", lambda self, strategy, state: time.sleep(0.1))
    Trainer(strategy, ToyObjective(), source, engine, tmp_path, Monitor(tmp_path, "toy", 2)).fit()
    assert sum(apart) >= 0.2


def test_documents_go_on_over_two_one_and_two_ranks(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    folder, words = tmp_path / "corpus", tmp_path / "tokenizer"
    folder.mkdir()
    tiny_tokenizer.save_pretrained(words)
    for shard, size in enumerate([9, 0, 4, 13, 1]):
        rows = [json.dumps({"text": f"lamp {shard} box {row} " * 4}) + "\n" for row in range(size)]
        (folder / f"{shard}.jsonl").write_text("".join(rows), encoding="utf-8")
    alone = DocumentMixture(folder, tiny_tokenizer, CONFIG, 4)
    for world, steps in ((2, 3), (1, 4), (2, 2)):
        words_of_rank = [str(folder), str(words), str(tmp_path / "state.json"), str(steps)]
        run_ranks(Path(__file__).with_name("joining.py"), world, words_of_rank)
        found = read_json(tmp_path / "state.json")
        assert found["dealt"] == [alone.next_step()[0].example_ids for _ in range(steps)]
        assert found["data"] == alone.state_dict()
