"""What goes wrong in the loop: losses that are not finite, ranks that do not arrive, memory and disks that are full."""

from __future__ import annotations

import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed, exhaustion
from tagi_ds.engine.disk import writing_told
from tagi_ds.engine.exhaustion import MemoryExhaustedError, memory_told, require_space
from tagi_ds.engine.objective import Term, loss_share
from tagi_ds.engine.signs import Sign, complaint, sides
from tagi_ds.engine.step import NonFiniteError
from tagi_ds.errors import UserError
from tests.distributed import RankResults, run_ranks
from tests.engine.perils import Perilous
from tests.engine.toy import losses_of, train

PERILS = Path(__file__).with_name("perils.py")
ALONE = distributed.Ranks(0, 1, 0, torch.device("cpu"))
OPTIMIZER = OptimizerConfig(learning_rate=2e-2, weight_decay=0.1, clip=0.3, schedule="constant")
LEFT_OUT: dict[str, Any] = {"poisoned": [5], "steep": [9]}
"""Calls of a rank with two micro-batches a step: one of the third step, one of the fifth."""
STEPS = 7


def engine(strategy: str, **changes: Any) -> EngineConfig:
    settings = {"precision": "fp32", "steps": STEPS, "accumulation": 2, "log_every": 1, "checkpoint_every": 3}
    return EngineConfig(strategy=strategy, **{**settings, "nonfinite": "skip", **changes})  # type: ignore[arg-type]


def perilous(strategy: str, folder: Path, *runs: dict[str, Any]) -> RankResults:
    described = [
        {"dir": str(folder / str(number)), "optimizer": asdict(OPTIMIZER), "engine": asdict(engine(strategy)), **run}
        for number, run in enumerate(runs)
    ]
    return run_ranks(PERILS, 2, [json.dumps(described)], timeout=120, check=False)


def figures(run_dir: Path) -> dict[int, tuple[Any, ...]]:
    return losses_of(run_dir)


# Not finite.


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_step_left_out_leaves_no_trace(strategy: str, tmp_path: Path) -> None:
    # Of one process the third and the last micro-batch of four are those of the second rank.
    lone = Perilous({"poisoned": [4 * 2 + 3], "steep": [4 * 4 + 3]})
    train(tmp_path / "single", engine("single", accumulation=4), OPTIMIZER, ALONE, objective=lone)
    limited = asdict(engine(strategy, nonfinite_limit=2))
    results = perilous(strategy, tmp_path, LEFT_OUT, {"poisoned": [2, 4, 6], "engine": limited})
    assert results.statuses == [0, 0], results.text
    ours, single = figures(tmp_path / "0"), figures(tmp_path / "single")
    assert sorted(ours) == list(range(1, STEPS + 1))
    for step, values in single.items():
        for mine, theirs in zip(ours[step], values, strict=True):
            assert mine == (None if theirs is None else pytest.approx(theirs, rel=1e-5)), f"step {step}"
    assert single[3][0] is None
    assert single[5][0] is not None, "the fifth step's loss is finite, its gradient is not"
    assert single[5][-1] is None
    text = results.outputs[0]
    assert "OVERFLOW" not in results.text, "the run says it itself"
    assert "step 3: the loss is nan (examples step3-example3, step3-example7); the step was not taken" in text
    assert "step 5: the gradient's norm is not finite (examples step5-example0" in text
    lines = [json.loads(line) for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("data/steps_left_out", 0) for line in lines] == [0, 0, 1, 1, 2, 2, 2]
    # The second run's second and third steps are bad one after the other.
    assert "USER ERROR step 3: the loss is nan" in text
    assert "nor were the 1 before it" in text


def test_steps_left_out_apart_from_each_other_do_not_stop_the_run(tmp_path: Path) -> None:
    config = engine("single", accumulation=1, nonfinite_limit=2, steps=6)
    train(tmp_path / "apart", config, OPTIMIZER, ALONE, objective=Perilous({"poisoned": [0, 2, 4]}))
    assert sorted(figures(tmp_path / "apart")) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(NonFiniteError, match="nor were the 1 before it"):
        train(tmp_path / "row", config, OPTIMIZER, ALONE, objective=Perilous({"poisoned": [2, 3]}))


@given(
    value=st.floats(allow_nan=True, allow_infinity=True, width=32),
    weight=st.sampled_from([0.5, 2.0]),
    constant=st.booleans(),
)
def test_a_share_that_is_not_finite_has_no_finite_gradient(value: float, weight: float, constant: bool) -> None:
    leaf = torch.ones(3, requires_grad=True)
    total = leaf.sum() + value if constant else leaf.sum() * value
    share = loss_share({"a": Term(total, "n", weight)}, {"n": 4.0})
    share.backward()
    assert leaf.grad is not None
    if torch.isfinite(share):
        expected = weight / 4 * (1.0 if constant else value)
        torch.testing.assert_close(leaf.grad, torch.full((3,), expected))
    else:
        assert leaf.grad.isnan().all()


# Ranks that do not arrive.


def test_a_rank_that_falls_asleep_is_named_in_time(tmp_path: Path) -> None:
    results = perilous("zero3", tmp_path, {"sleeps": 5, "patience": 3})
    assert results.statuses[0] == 1, results.text
    assert results.statuses[1] != 0, "ended by its own watch, or with the run"
    text = "\n".join(results.outputs)
    assert text.count("error: ") == 1, text
    assert "error: rank 1 did not arrive: it is at step 3, perils.py:" in text
    assert "rank 0 waits for it at step 3" in text
    assert "for more than 3 s" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_rank_that_ends_is_named(tmp_path: Path) -> None:
    results = perilous("zero2", tmp_path, {"ends": 5})
    assert results.statuses == [1, 9], results.text
    assert "error: rank 1 (last seen at step 3) of this run has ended" in results.outputs[0]


def sign(*begun: int, place: str = "step 4", idle: float = 9.0, groups: str = "abc") -> Sign:
    return Sign(1, place, "x.py:1 (f)", dict(zip(groups, begun, strict=False)), idle)


@pytest.mark.parametrize(
    ("signs", "waiting", "late"),
    [
        ({0: sign(5), 1: sign(4), 2: sign(5)}, [0, 2], [1]),
        ({0: sign(5), 1: sign(5)}, [], []),
        # Rank 1 is late for rank 0 because it waits for rank 2 in another group.
        ({0: sign(5, groups="a"), 1: sign(4, 3), 2: sign(4, 2)}, [0, 1], [2]),
        # Groups that a rank is not in say nothing of it.
        ({0: sign(7, groups="a"), 1: sign(7, groups="a"), 2: sign(3, groups="b"), 3: sign(2, groups="b")}, [2], [3]),
    ],
)
def test_who_waits_for_whom(signs: dict[int, Sign], waiting: list[int], late: list[int]) -> None:
    assert sides(signs) == (waiting, late)


def test_the_complaint_names_rank_place_and_time() -> None:
    text = complaint({0: sign(5), 1: sign(4, place="step 3"), 2: sign(5)}, [0, 2], [1], {1}, 30)
    assert "rank 1 did not arrive: it has ended or does not answer, last seen at step 3" in text
    assert "ranks 0 and 2 wait for it at step 4" in text
    assert "more than 30 s" in text
    assert "mend: " in text


# Memory and disks.


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_what_goes_wrong_with_one_ranks_files_is_told_by_all(strategy: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    results = perilous(
        strategy,
        tmp_path,
        {"dir": run, "narrow": 7},
        {"dir": run},
        {"dir": run, "damages": "step_7/deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"},
        {"apart": True},
    )
    assert results.statuses == [0, 0], results.text
    for text in results.outputs:
        told = [line for line in text.splitlines() if line.startswith("USER ERROR")]
        assert len(told) == 2, results.text
        assert "USER ERROR cannot write " in told[0]
        assert ".step_6.part/deepspeed/zero_pp_rank_1_mp_rank_00_" in told[0]
        assert " lacks what rank 1 on " in told[1]
        assert told[1].count("(deepspeed/zero_pp_rank_1_mp_rank_00_") == 1
    # The first run's last whole checkpoint, and with the damage to step 7 the one before it.
    assert [line.split(": ")[1] for line in results.outputs[0].splitlines() if "goes on" in line] == [
        "goes on from step 3",
        "goes on from step 6",
    ]
    assert "step_7 is damaged (deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt is not as" in results.outputs[0]
    assert sorted(path.name for path in Path(run, "checkpoints").iterdir()) == ["best", "latest", "step_6", "step_7"]
    assert sorted(figures(Path(run))) == list(range(1, STEPS + 1))


def test_every_writer_on_a_full_disk_names_its_file(tmp_path: Path) -> None:
    values = torch.zeros(10_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writers: list[Callable[[Path], object]] = [
        lambda file: torch.save(values, file),
        lambda file: torch.save(values, file, _use_new_zipfile_serialization=False),
        lambda file: save_file({"values": values}, file),
        lambda file: file.write_bytes(bytes(10_000)),
    ]
    for number, write in enumerate(writers):
        file = tmp_path / str(number)
        try:
            # The disk's own refusal, without a disk to fill.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            with pytest.raises(UserError, match=f"cannot write {file}: ") as caught, writing_told(file):
                write(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "free space" in caught.value.mend
    with pytest.raises(RuntimeError, match="another"), writing_told(tmp_path):
        raise RuntimeError("another")


def test_memory_that_does_not_suffice_gives_advice(tmp_path: Path) -> None:
    config = engine("single", accumulation=1)
    with pytest.raises(MemoryExhaustedError, match="step 3: out of memory") as caught:
        train(tmp_path, config, OPTIMIZER, ALONE, objective=Perilous({"hungry": 2}))
    for words in ("engine.accumulation above 1", "activation_checkpointing true", "zero3", "launchers/plan.py"):
        assert words in caught.value.mend


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), RuntimeError("CUDA out of memory")]
)
def test_every_kind_of_exhaustion_is_told(error: Exception) -> None:
    with pytest.raises(MemoryExhaustedError, match="loading: out of memory"), memory_told("loading", EngineConfig()):
        raise error
    with pytest.raises(RuntimeError, match="another"), memory_told("loading", EngineConfig()):
        raise RuntimeError("another")


def test_advice_names_what_is_left_to_do() -> None:
    shard = EngineConfig(strategy="zero3", activation_checkpointing=True)
    assert "zero3_offload.json" in exhaustion.memory_advice(shard)
    assert "activation_checkpointing" not in exhaustion.memory_advice(shard)


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_found_before_the_last_checkpoint_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine("single", accumulation=1, steps=3)
    train(tmp_path, config, OPTIMIZER, ALONE)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    size = sum(len(content) for path, content in before.items() if path.parent.name == "step_3")
    config.steps = 6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size))
    with pytest.raises(UserError, match=r"checkpoint in .* takes about .* GB are free there"):
        train(tmp_path, config, OPTIMIZER, ALONE)
    assert {path: path.read_bytes() for path in before} == before
    asked = []

    def filling(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**9, 0, 10**9 if len(asked) == 1 else size)

    monkeypatch.setattr(shutil, "disk_usage", filling)
    with pytest.raises(UserError, match="earlier checkpoints are as they were"):
        train(tmp_path, config, OPTIMIZER, ALONE)
    assert max(figures(tmp_path)) == 5, "the disk was full only for the last step's checkpoint"
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.undo()
    train(tmp_path, config, OPTIMIZER, ALONE)
    assert (tmp_path / "checkpoints" / "step_6" / "manifest.json").is_file()


def test_a_disk_without_room_stops_a_run_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Perilous({})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="--output_dir"):
        train(tmp_path / "run", engine("single"), OPTIMIZER, ALONE, objective=objective)
    assert objective.calls == 0
    with pytest.raises(UserError, match="takes about 5 GB"):
        require_space(tmp_path / "not" / "there" / "yet", 5 * 10**9)
