"""A step is saved before it is evaluated: an evaluation that fails costs no steps, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.checkpoint import CheckpointStore, best_checkpoint
from tagi_ds.engine.evaluated import state_of
from tagi_ds.engine.exhaustion import MemoryExhaustedError
from tagi_ds.engine.monitor import Monitor
from tagi_ds.engine.trainer import Trainer
from tests.engine.toy import ToyObjective, build

ALONE = distributed.Ranks(0, 1, 0, torch.device("cpu"))
STEPS, BEST = 12, 6
ENGINE = EngineConfig(
    strategy="single",
    precision="fp32",
    steps=STEPS,
    accumulation=1,
    log_every=1,
    evaluate_every=2,
    checkpoint_every=3,
    keep_checkpoints=1,
)
TIMES = ("seconds", "memory_gb", "_per_s", "wait_share", "tflops")


class FailedError(Exception):
    pass


def value(step: int) -> float:
    return abs(step - BEST) + 0.5


def train(run_dir: Path, evaluate: Callable[[int], float] = value, **more: Any) -> tuple[dict[str, Any], ToyObjective]:
    objective = ToyObjective()
    strategy, source = build(ENGINE, OptimizerConfig(learning_rate=2e-2), ALONE, dropout=0.2)
    monitor = Monitor(run_dir, "toy", STEPS)

    def figures(step: int) -> dict[str, float]:
        return {"validation/loss": evaluate(step)}

    return Trainer(strategy, objective, source, ENGINE, run_dir, monitor, figures, **more).fit(), objective


def failing(at: int, error: BaseException | None = None) -> Callable[[int], float]:
    def evaluate(step: int) -> float:
        if step == at:
            raise error or FailedError
        return value(step)

    return evaluate


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    """All that must not depend on interruptions."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: figure for name, figure in line.items() if not name.endswith(TIMES)} for line in lines]


def checkpoints_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: None for path in (run_dir / "checkpoints").iterdir()}
    for name in found:
        if name.startswith("step"):
            run = state_of(run_dir / "checkpoints" / name)["run"]
            found[name] = {key: run[key] for key in ("best", "unevaluated", "data")}
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    summary, _ = train(folder)
    assert summary["best"] == {"value": 0.5, "step": BEST}
    assert set(checkpoints_of(folder)) == {f"step_{BEST}", f"step_{STEPS}", "latest", "best"}
    assert best_checkpoint(folder).name == f"step_{BEST}"
    return folder


@pytest.mark.parametrize("at", [BEST, STEPS, 4], ids=["saved and best", "last", "not saved"])
def test_a_run_whose_evaluation_failed_goes_on_to_the_last_digit(at: int, unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(FailedError):
        train(tmp_path, failing(at))
    saved = at - at % 3
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{saved}\n"
    summary, objective = train(tmp_path)
    assert summary["resumed_from"] == saved
    assert objective.calls == STEPS - saved, "no step is taken again"
    assert lines_of(tmp_path) == lines_of(unbroken)
    assert checkpoints_of(tmp_path) == checkpoints_of(unbroken)
    assert best_checkpoint(tmp_path).name == f"step_{BEST}"
    assert summary["best"] == {"value": 0.5, "step": BEST}


@pytest.mark.parametrize("at", [BEST, STEPS])
def test_a_run_that_ended_between_an_evaluation_and_its_note_evaluates_again(
    at: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CheckpointStore, state: Any) -> None:
        if state.step == at:
            raise FailedError
        note(self, state)

    note = CheckpointStore.note_evaluated
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "note_evaluated", fail)
        with pytest.raises(FailedError):
            train(tmp_path)
    train(tmp_path)
    assert lines_of(tmp_path) == lines_of(unbroken)
    assert checkpoints_of(tmp_path) == checkpoints_of(unbroken)


def test_what_was_evaluated_is_not_evaluated_again(unbroken: Path) -> None:
    train(unbroken, lambda step: pytest.fail("a finished run"))


def test_an_evaluation_without_memory_says_what_helps_it(tmp_path: Path) -> None:
    refused = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 GB")
    with pytest.raises(MemoryExhaustedError) as error:
        train(tmp_path, failing(6, refused), evaluated_together=64)
    assert "the evaluation after step 6: out of memory" in str(error.value)
    assert "set evaluation.batch_examples below 64" in str(error.value)
    assert "zero3" in str(error.value)
    assert "accumulation" not in str(error.value)
    assert "activation_checkpointing" not in str(error.value)
