"""One rank, two ranks, and an interruption in between: the same results, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tagi_ds.evaluation import dealing
from tagi_ds.evaluation.predictions import Prediction, read_predictions
from tagi_ds.files import read_json
from tagi_ds.model import TagiForConditionalGeneration
from tests.distributed import run_ranks
from tests.evaluation import evaluated


def _files(folder: Path) -> dict[str, bytes]:
    """What an evaluation leaves, but for the seconds."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("rank")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if "timing" not in path.name}


def _interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    append, written = dealing.append, []

    def failing(handle: object, predictions: list[Prediction]) -> None:
        if len(written) == batches:
            raise KeyboardInterrupt
        written.append(predictions)
        append(handle, predictions)  # type: ignore[arg-type]

    monkeypatch.setattr(dealing, "append", failing)


def test_the_same_bytes_from_one_rank_from_two_and_after_interruptions(
    tiny_tagi: TagiForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, alone, broken = (tmp_path / name for name in ("model", "alone", "broken"))
    tiny_tagi.save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    results = evaluated.run(tiny_tagi, alone, model)
    assert set(results["metrics"]) == {"open", "choices"}
    assert len({found.prediction for found in read_predictions(alone / "predictions" / "open.jsonl")}) > 1
    # One interruption among the freely answered, leaving an odd number of batches, one among the ranked.
    for batches in (2, 9):
        with monkeypatch.context() as patch:
            _interrupt_after(batches, patch)
            with pytest.raises(KeyboardInterrupt):
                evaluated.run(tiny_tagi, broken, model)
    assert (broken / "predictions" / "choices.rank0.jsonl").is_file()
    two = [tmp_path / name for name in ("two", "broken")]
    sharded = tmp_path / "sharded"
    run_ranks(Path(evaluated.__file__), 2, [str(model), *map(str, (*two, sharded))], timeout=200)
    expected = _files(alone)
    assert {"results.json", "predictions/open.jsonl", "leaderboard/open.jsonl"} <= set(expected)
    for folder in two:
        assert _files(folder) == expected
    answers = [read_predictions(folder / "predictions" / "open.jsonl") for folder in (alone, sharded)]
    assert [found.prediction for found in answers[0]] == [found.prediction for found in answers[1]]
    runs = [read_json(sharded / f"rank{rank}.json") for rank in range(2)]
    assert runs[0]["encoder"] == runs[1]["encoder"] > 0, "sharded parameters are gathered by all or by none"
    once = [read_json(two[0] / f"rank{rank}.json")["encoder"] for rank in range(2)]
    assert max(once) < runs[0]["encoder"], "each instruction is encoded once where nothing is sharded"
