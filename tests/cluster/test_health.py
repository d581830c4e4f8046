"""The check of a job's nodes: what is wrong with a node, and which node it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tagi_ds.cluster import health
from tagi_ds.cluster.health import TOGETHER, Place, fault_here, judge
from tagi_ds.engine.distributed import take_ranks_from_slurm
from tagi_ds.launch import DEFAULT_RECIPE
from tests.distributed import ROOT, run_ranks

HERE = Place(0, 1, 0, 1, "n1")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def test_a_disk_that_cannot_be_written_or_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_here(HERE, [tmp_path]) is None
    (tmp_path / "file").write_text("")
    fault = fault_here(HERE, [tmp_path, tmp_path / "file"])
    assert fault is not None
    assert fault.startswith(f"cannot write to {tmp_path / 'file'}")
    assert fault_here(Place(1, 2, 1, 2, "n1"), [tmp_path / "file"]) is None, "one process of a node looks"
    monkeypatch.setattr(health, "FREE_DISK", 2**60)
    assert "MiB are free under" in str(fault_here(HERE, [tmp_path]))


def test_a_device_that_was_promised_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert fault_here(HERE, [tmp_path]) == "0 of 8 GPUs are visible"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert fault_here(HERE, [tmp_path]) == "7 of 8 GPUs are visible"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (40 * 10**9, 80 * 10**9))
    assert fault_here(Place(3, 8, 3, 8, "n1"), [tmp_path]) == "GPU 3 has 40.0 of 80.0 GB free"

    def broken(device: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nlong explanations")

    monkeypatch.setattr("torch.cuda.mem_get_info", broken)
    fault = fault_here(Place(3, 8, 3, 8, "n1"), [tmp_path])
    assert fault == "device 3: CUDA error: uncorrectable ECC error encountered"


def test_who_is_at_fault() -> None:
    nodes, silence = ["n1", "n2", "n3"], "no answer within 60 s"
    well = [(node, None) for node in nodes]

    def judged(answers: list[Any], among: list[str] = nodes) -> dict[str, str]:
        return judge(answers, among, 60.0)

    assert judged(well) == {}
    assert judged([*well, ("n2", "hot")]) == {"n2": "hot"}
    assert judged(well[:2]) == {"n3": silence}
    assert judged(well[:1]) == {"n1": "no other node reaches it"}
    assert judged(well[:1], nodes[:2]) == {"n2": silence}
    within = [("n1", None), ("n2", "a sum within the node fails: NVLink"), ("n3", None)]
    assert judged(within) == {"n2": "a sum within the node fails: NVLink"}


@pytest.mark.parametrize("well", [[], ["n1"], ["n1", "n2"]])
def test_a_sum_over_all_nodes_that_fails_names_none_of_those_that_speak(well: list[str]) -> None:
    nodes, fault = ["n1", "n2", "n3", "n4"], "a sum over all nodes fails: timeout"
    answers = [(node, None if node in well else fault) for node in nodes]
    assert judge(answers, nodes, 60.0) == {TOGETHER: fault}
    # Who does not even say that it failed is the one.
    assert judge(answers[:3], nodes, 60.0) == {"n4": "no answer within 60 s"}


def check_ranks(folder: Path, **environment: str) -> tuple[list[int], str]:
    arguments = ["finetune", "--config", str(DEFAULT_RECIPE), "--study_dir", str(folder)]
    ended = run_ranks("tagi_ds.cluster.health", 2, arguments, check=False, env=environment)
    return ended.statuses, ended.text


def test_processes_find_each_other_and_add_up(tmp_path: Path) -> None:
    statuses, text = check_ranks(tmp_path, LOCAL_WORLD_SIZE="2", SLURMD_NODENAME="n1")
    assert statuses == [0, 0], text
    assert "unhealthy" not in text
    (tmp_path / "file").write_text("")
    statuses, text = check_ranks(tmp_path / "file", LOCAL_WORLD_SIZE="2", SLURMD_NODENAME="n1")
    assert statuses == [1, 1], text
    assert text.count(f"unhealthy n1: cannot write to {tmp_path / 'file'}") == 1


def test_a_node_whose_own_sum_fails_is_the_only_one_named(tmp_path: Path) -> None:
    ended = run_ranks(Path(__file__).with_name("broken_links.py"), 3, [str(tmp_path)], check=False, patience=30)
    assert ended.statuses == [1, 1, 1], ended.text
    assert ended.text.count("unhealthy n2: a sum within the node fails: ") == 1, ended.text
    assert "unhealthy n1" not in ended.text
    assert "all nodes" not in ended.text


def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TAGI_DS_HEALTH_S", "soon")
    assert health.main(["finetune", "--config", str(DEFAULT_RECIPE)]) == 2
    assert "TAGI_DS_HEALTH_S is 'soon'" in capsys.readouterr().err


def test_a_recipe_that_is_refused_says_nothing_of_the_node(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    words = [sys.executable, "-m", "tagi_ds.cluster.health", "finetune", "--study", str(tmp_path)]
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "unknown flag --study" in ended.stderr
    assert "unhealthy" not in ended.stdout


@pytest.mark.parametrize(
    ("tasks", "node", "size"), [("2(x2),1", "1", "2"), ("2(x2),1", "2", "1"), ("8", "0", "8"), ("", "0", None)]
)
def test_ranks_are_taken_from_slurm(tasks: str, node: str, size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        # Set and deleted: what the function sets is gone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": node,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
    }.items():
        monkeypatch.setenv(name, value)
    take_ranks_from_slurm()
    assert [os.environ.get(name) for name in RANK_VARIABLES] == ["3", "5", "1", size]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SLURM_PROCID", "4")
    take_ranks_from_slurm()
    assert os.environ["RANK"] == "0", "another launcher's word counts"
