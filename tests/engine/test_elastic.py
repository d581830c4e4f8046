"""Resuming on another layout: the same losses and the same examples as one unbroken process."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import OptimizerConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.checkpoint import damage_of, read_trained_parameters
from tagi_ds.engine.full_state import WEIGHTS, FullState
from tagi_ds.engine.universal import universal_folder, write_universal
from tagi_ds.engine.zero_loading import load_full_state
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tests.distributed import RankResults, run_ranks
from tests.engine.elastic import OPTIMIZER, STEPS, engine, tasks, train, write_corpus

SCRIPT = Path(__file__).with_name("elastic.py")
ALONE = distributed.Ranks(0, 1, 0, torch.device("cpu"))
RELATIVE = 1e-5


@dataclass(frozen=True)
class Setting:
    corpus: Path
    words: Path
    tokenizer: PreTrainedTokenizerBase
    unbroken: Path

    def alone(self, run_dir: Path, until: int = STEPS, optimizer: OptimizerConfig = OPTIMIZER) -> int | None:
        return train(run_dir, engine("single", 1), self.corpus, self.tokenizer, ALONE, until, optimizer)

    def ranks(self, world_size: int, runs: list[dict[str, Any]], check: bool = True) -> RankResults:
        arguments = [str(self.corpus), str(self.words), json.dumps(runs)]
        return run_ranks(SCRIPT, world_size, arguments, timeout=180, check=check)


def part(
    run_dir: Path, strategy: str, world_size: int, until: int = STEPS, deepspeed: Path | None = None, **more: Any
) -> dict[str, Any]:
    config = engine(strategy, world_size, deepspeed=str(deepspeed) if deepspeed else None)
    return {"dir": str(run_dir), "engine": asdict(config), "until": until, **more}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Setting:
    base = tmp_path_factory.mktemp("elastic")
    write_corpus(base / "corpus")
    tiny_tokenizer.save_pretrained(base / "tokenizer")
    made = Setting(base / "corpus", base / "tokenizer", tiny_tokenizer, base / "unbroken")
    made.alone(made.unbroken)
    return made


@pytest.fixture(scope="module")
def begun(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two ranks: ZeRO-2 to step 4 and there on in ZeRO-3 to step 7; ZeRO-2 and 3 each in one go and with a stop."""
    base = tmp_path_factory.mktemp("begun")
    runs = [part(base / "moved", "zero2", 2, 4), part(base / "moved", "zero3", 2, 7)]
    for name in ("zero2", "zero3"):
        runs += [part(base / name, name, 2), part(base / f"{name}_stopped", name, 2, 5)]
        runs.append(part(base / f"{name}_stopped", name, 2))
    results = setting.ranks(2, runs)
    assert [line for line in results.outputs[0].splitlines() if line.startswith(("RESUMED", "USER"))] == [
        "RESUMED None",
        "RESUMED 4",
        *["RESUMED None", "RESUMED None", "RESUMED 5"] * 2,
    ]
    told = [line for line in results.outputs[0].splitlines() if "was saved by" in line]
    assert len(told) == 1
    assert "step_4 was saved by zero2 on 2 processes, this run is zero3 on 2 processes" in told[0]
    assert "random states (dropout) are drawn anew" in told[0]
    return {path.name: path for path in base.iterdir()}


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def figures(run_dir: Path) -> dict[int, list[float]]:
    # Not the mean over micro-batches (`loss/seen`), which hold other examples in another layout.
    names = ("loss/total", "loss/label", "loss/size", "lr", "grad_norm")
    return {int(line["step"]): [line[name] for name in names] for line in metrics(run_dir)}


def assert_as_unbroken(run_dir: Path, setting: Setting) -> None:
    """Losses, norms and examples of every step; every example of the tasks once."""
    expected, found = figures(setting.unbroken), figures(run_dir)
    assert list(found) == list(range(1, STEPS + 1))
    for step, values in found.items():
        assert values == pytest.approx(expected[step], rel=RELATIVE), step
    dealt = (run_dir / "dealt.jsonl").read_text()
    assert dealt == (setting.unbroken / "dealt.jsonl").read_text()
    seen = sorted(name for line in dealt.splitlines() for name in json.loads(line)["tasks"])
    assert seen == sorted(example.id for task in tasks() for example in task.examples)


def test_strategies_follow_each_other(setting: Setting, begun: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(begun["moved"], run_dir)
    assert not list(run_dir.glob("checkpoints/*universal*")), "a form that a later checkpoint replaced is gone"
    assert setting.alone(run_dir, 10) == 7
    assert "RESUMED 10" in setting.ranks(2, [part(run_dir, "zero2", 2)]).outputs[0]
    assert_as_unbroken(run_dir, setting)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_same_layout_goes_on_bit_for_bit(strategy: str, begun: dict[str, Path]) -> None:
    whole, stopped = begun[strategy], begun[f"{strategy}_stopped"]
    assert figures(stopped) == figures(whole)
    final = f"checkpoints/step_{STEPS}"
    ours, theirs = read_trained_parameters(stopped / final), read_trained_parameters(whole / final)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_one_process_goes_on_bit_for_bit(name: str, setting: Setting, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(**{**asdict(OPTIMIZER), "name": name})
    setting.alone(tmp_path / "whole", optimizer=optimizer)
    setting.alone(tmp_path / "stopped", 5, optimizer)
    assert setting.alone(tmp_path / "stopped", optimizer=optimizer) == 5
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    assert not list((tmp_path / "stopped").rglob("*.pt"))


def test_another_optimizer_begins_anew_and_says_so(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.alone(tmp_path, 5, OptimizerConfig(**{**asdict(OPTIMIZER), "name": "adafactor"}))
    write_universal(tmp_path / "checkpoints" / "step_5", tmp_path / "other")
    shutil.rmtree(tmp_path / "checkpoints" / "step_5")
    (tmp_path / "other").rename(tmp_path / "checkpoints" / "step_5")
    assert setting.alone(tmp_path) == 5
    told = capsys.readouterr().out
    assert "was saved by single on 1 process" in told
    assert "the saved optimizer's state is of another kind and begins anew" in told


def test_the_universal_form_takes_its_origins_place(setting: Setting, begun: dict[str, Path], tmp_path: Path) -> None:
    """Written by hand, moved to where the origin was, resumed from in one process."""
    run_dir = tmp_path / "run"
    shutil.copytree(begun["moved"], run_dir)
    latest = run_dir / "checkpoints" / "step_7"
    masters = read_trained_parameters(latest)
    folder = write_universal(latest, tmp_path / "universal")
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert write_universal(latest, folder) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written, "the same form is not made twice"
    full = FullState(folder)
    assert full.kinds == [WEIGHTS, "step", "exp_avg", "exp_avg_sq"]
    for name, master in masters.items():
        assert torch.equal(full.tensor(WEIGHTS, name), master)
        assert full.tensor("exp_avg", name).shape == full.tensor("exp_avg_sq", name).shape == master.shape
        assert full.tensor("step", name) == 7
    shutil.rmtree(latest)
    shutil.copytree(folder, latest)
    assert setting.alone(run_dir) == 7
    assert_as_unbroken(run_dir, setting)


def test_what_is_damaged_is_refused(setting: Setting, begun: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(begun["moved"], run_dir)
    latest = run_dir / "checkpoints" / "step_7"
    form = write_universal(latest, universal_folder(latest))
    spoil(form / "exp_avg.safetensors")
    assert damage_of(form) is not None
    write_universal(latest, form)
    assert damage_of(form) is None, "a damaged form is made again"
    spoil(next(latest.rglob("*rank_1*optim_states.pt")))
    with pytest.raises(UserError, match=r"step_7 is damaged: deepspeed/.*optim_states.pt"):
        write_universal(latest, tmp_path / "form")
    assert not (tmp_path / "form").exists()
    with pytest.warns(UserWarning, match="step_7 is damaged"):
        assert setting.alone(run_dir, 8) == 6
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no checkpoint and would be replaced"):
        write_universal(run_dir / "checkpoints" / "step_8", tmp_path / "mine")


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_another_model_is_refused_by_what_differs(
    setting: Setting, begun: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(begun["moved"], run_dir)
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    monkeypatch.setattr("tests.engine.toy.WIDTH", 12)
    with pytest.raises(UserError, match=r"other trainable parameters: block\.0\.bias \(saved \[16\], now \[12\]\)"):
        setting.alone(run_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before


def killed_while_converting(setting: Setting, origin: Path, run_dir: Path, point: str) -> None:
    shutil.copytree(origin, run_dir)
    results = setting.ranks(1, [part(run_dir, "single", 1, kill=point)], check=False)
    assert results.statuses == [-signal.SIGKILL], results.text
    store = run_dir / "checkpoints"
    assert damage_of(store / "step_7") is None
    assert not (store / "universal_7").exists()
    assert setting.alone(run_dir) == 7
    assert_as_unbroken(run_dir, setting)
    assert not list(store.glob("*universal*"))


def test_a_kill_while_converting_leaves_the_run_whole(setting: Setting, begun: dict[str, Path], tmp_path: Path) -> None:
    killed_while_converting(setting, begun["moved"], tmp_path / "run", "before the manifest")


@pytest.mark.slow
@pytest.mark.parametrize("point", ["while writing", "before renaming"])
def test_a_kill_at_other_points_of_converting(
    point: str, setting: Setting, begun: dict[str, Path], tmp_path: Path
) -> None:
    killed_while_converting(setting, begun["moved"], tmp_path / "run", point)


@pytest.mark.slow
def test_other_deepspeed_settings_are_another_layout(setting: Setting, tmp_path: Path) -> None:
    """Smaller groups, optimizers on the CPU, and back."""
    offload: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
    groups: dict[str, Any] = {"sub_group_size": 200}
    plans = [("zero3", {}), ("zero3", groups), ("zero3", {**groups, **offload}), ("zero2", offload), ("zero2", {})]
    runs = []
    for number, (strategy, zero) in enumerate(plans):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
        runs.append(part(tmp_path / "run", strategy, 2, [3, 5, 7, 9, STEPS][number], file))
    told = [line for line in setting.ranks(2, runs).outputs[0].splitlines() if "was saved by" in line]
    assert "zero3 on 2 processes, this run is the same with parameters cut otherwise" in told[0]
    assert any("zero3 on 2 processes, this run is zero2 on 2 processes" in line for line in told)
    assert_as_unbroken(tmp_path / "run", setting)


def test_an_optimizer_on_nvme_takes_nothing_over(begun: dict[str, Path], tmp_path: Path) -> None:
    full = FullState(write_universal(begun["moved"] / "checkpoints" / "step_7", tmp_path / "form"))
    live = SimpleNamespace(optimizer=SimpleNamespace(swap_optimizer=True))
    with pytest.raises(UserError, match="cannot be taken into an optimizer that is offloaded to NVMe"):
        load_full_state(live, {}, full)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_two_one_four_and_two_ranks(strategy: str, setting: Setting, tmp_path: Path) -> None:
    for number, (world_size, until) in enumerate([(2, 3), (1, 5), (4, 9), (2, STEPS)]):
        results = setting.ranks(world_size, [part(tmp_path, strategy, world_size, until)])
        assert f"RESUMED {[None, 3, 5, 9][number]}" in results.outputs[0]
    assert_as_unbroken(tmp_path, setting)
    assert read_json(tmp_path / "checkpoints" / f"step_{STEPS}" / "state.json")["world_size"] == 2


@pytest.mark.slow
def test_every_strategy_after_every_other(setting: Setting, tmp_path: Path) -> None:
    parts = [("zero2", 2, 2), ("zero3", 4, 4), ("single", 1, 6), ("zero3", 1, 8), ("zero2", 4, 10), ("single", 1, 12)]
    for strategy, world_size, until in parts:
        setting.ranks(world_size, [part(tmp_path, strategy, world_size, until)])
    assert_as_unbroken(tmp_path, setting)
