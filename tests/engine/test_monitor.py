"""What a run reports reaches TensorBoard: each step once, whatever interrupted it; figures in closed form."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed, monitor, trainer
from tagi_ds.engine.monitor import FINAL_METRICS, Monitor
from tagi_ds.engine.probe import peak_flops
from tests.distributed import run_ranks
from tests.engine import toy

STEPS = 12
CALLS_A_STEP = 2


def events_of(run_dir: Path) -> EventAccumulator:
    """As TensorBoard itself reads a run."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def logged(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line} - {"step"}
    return {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in names}


@pytest.mark.parametrize(
    "faults",
    [
        # Before the first checkpoint, and two steps after one.
        [{"kill_call": 3}, {"kill_call": 14}],
        # The step is logged, its checkpoint is not there.
        [{"kill_save": 8}],
        [{"term_call": 13}],
    ],
    ids=["killed", "killed in saving", "stopped"],
)
def test_a_curve_has_each_step_once(faults: list[dict[str, int]], tmp_path: Path) -> None:
    engine = EngineConfig(
        strategy="single",
        precision="fp32",
        steps=STEPS,
        accumulation=CALLS_A_STEP,
        log_every=1,
        evaluate_every=3,
        checkpoint_every=4,
    )
    optimizer = OptimizerConfig(learning_rate=1e-2)
    whole = {"dir": str(tmp_path), "engine": asdict(engine), "optimizer": asdict(optimizer)}
    for fault in faults:
        ended = run_ranks(Path(toy.__file__), 1, [json.dumps([{**whole, **fault}])], check=False)
        assert ended.statuses == [0 if "term_call" in fault else -signal.SIGKILL], ended.text
    toy.train(tmp_path, engine, optimizer, distributed.Ranks(0, 1, 0, torch.device("cpu")))
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(faults) + 1
    events, lines = events_of(tmp_path), logged(tmp_path)
    assert {"loss/total", "validation/loss", "lr", "grad_norm", "seconds"} <= lines.keys()
    assert [step for step, _ in lines["loss/total"]] == list(range(1, STEPS + 1))
    assert set(events.Tags()["scalars"]) == lines.keys()
    for name, points in lines.items():
        drawn = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in drawn] == [step for step, _ in points], name
        assert [value for _, value in drawn] == pytest.approx([value for _, value in points], rel=1e-6), name


def opened(folder: Path, **settings: Any) -> Monitor:
    reports = Monitor(folder, "toy", 10, **settings)
    reports.open(0)
    return reports


def test_throughput_is_of_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(monitor, "Progress", lambda *a, **k: None)
    reports = opened(tmp_path, peak_flops=4e12)
    reports.flops_per_step = 2e12
    for step in (1, 2):
        counts = {"tokens": 30.0, "examples": 4.0, "per_example/input_tokens": 50.0, "per_example/input_padding": 6.0}
        reports.count(step, counts, 1.0)
    # Six seconds, two of which were an evaluation.
    clock[0] += 6.0
    reports.set_apart(2.0)
    reports.log(2, {"loss/total": math.nan}, 6.0, waited=1.0)
    clock[0] += 4.0
    reports.log(3, {}, 10.0)
    reports.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    figures = {
        "tokens_per_s": 15.0,
        "examples_per_s": 2.0,
        "tflops": 1.0,
        "mfu": 0.25,
        "data/input_tokens": 12.5,
        "data/input_padding": 1.5,
        "data/input_padding_share": 6 / 56,
        "data/padding_share": 6 / 56,
        "data/wait_share": 0.25,
    }
    assert {name: first[name] for name in figures} == pytest.approx(figures)
    assert first["loss/total"] is None
    assert "mfu" not in second, "no step was taken"
    assert "loss/total" not in events_of(tmp_path).Tags()["scalars"]


def test_without_a_known_peak_there_is_no_mfu(tmp_path: Path) -> None:
    reports = opened(tmp_path)
    reports.flops_per_step = 2e12
    reports.count(1, {"tokens": 1.0, "examples": 1.0}, 1.0)
    reports.log(1, {}, 1.0)
    reports.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert "tflops" in line
    assert "mfu" not in line


def test_the_peak_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    bf16, fp32 = EngineConfig(precision="bf16"), EngineConfig(precision="fp32")
    assert peak_flops(bf16, cpu) == 0.0
    assert peak_flops(EngineConfig(peak_tflops=2.5), cpu) == 2.5e12
    peaks = {
        "NVIDIA H200": 790e12,
        "NVIDIA H100 80GB HBM3": 790e12,
        "NVIDIA A100-SXM4-40GB": 250e12,
        "NVIDIA H100 PCIe": 0.0,
        "NVIDIA GH200 480GB": 0.0,
        "Tesla T4": 0.0,
    }
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(bf16, gpu) == peak, name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(fp32, gpu) == 60e12
    assert peak_flops(EngineConfig(peak_tflops=100.0), gpu) == 100e12


def test_settings_and_layout_are_there_from_the_start(tmp_path: Path) -> None:
    for start in (0, 3):
        reports = Monitor(tmp_path, "toy", 10, settings={"stage": "toy", "rank": 4})
        reports.open(start)
        reports.log(start + 1, {"loss/total": 1.0}, 1.0)
        reports.close()
    events = events_of(tmp_path)
    assert [event.step for event in events.Scalars("loss/total")] == [1, 4]
    told = events.PluginTagToContent("hparams")
    experiment = plugin_data_pb2.HParamsPluginData.FromString(told["_hparams_/experiment"]).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == list(FINAL_METRICS)
    session = plugin_data_pb2.HParamsPluginData.FromString(told["_hparams_/session_start_info"]).session_start_info
    assert session.hparams["stage"].string_value == "toy"
    assert session.hparams["rank"].number_value == 4
    for shown in events.Tensors("custom_scalars__config__"):
        layout = layout_pb2.Layout.FromString(shown.tensor_proto.string_val[0])
        assert {category.title for category in layout.category} == set(monitor.LAYOUT)


def test_memory_is_that_of_the_rank_that_holds_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks' figures come with what is gathered at a logged step in any case."""
    gathered: list[Any] = []

    def of_two(mine: Any) -> list[Any]:
        if not isinstance(mine, list):
            return [mine]
        gathered.append(mine)
        return [mine, [0.0, 123.0]]

    monkeypatch.setattr(trainer, "gather_objects", of_two)
    config = EngineConfig(strategy="single", precision="fp32", steps=2, log_every=1, checkpoint_every=0)
    toy.train(tmp_path, config, OptimizerConfig(), distributed.Ranks(0, 1, 0, torch.device("cpu")))
    assert logged(tmp_path)["memory_gb"] == [(1, 123.0), (2, 123.0)]
    assert len(gathered) == 2
    assert all(0 < own < 123 for _, own in gathered)
