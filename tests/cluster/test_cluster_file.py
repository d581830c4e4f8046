"""What a cluster file may say, and what it is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tagi_ds.cluster.cluster_file import read_cluster_file
from tagi_ds.config import STAGES
from tagi_ds.errors import UserError
from tests.distributed import ROOT


def read(folder: Path, text: str) -> object:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return read_cluster_file(path)


def test_the_example_holds() -> None:
    example = read_cluster_file(ROOT / "launchers" / "slurm" / "cluster.yaml")
    assert example.resources("finetune").gpus_per_node == 8
    assert example.resources("train_teachers").jobs == 4
    assert example.resources("train_teachers").gpus_per_node == 1
    convert = example.resources("convert")
    assert (convert.nodes, convert.gpus_per_node, convert.time) == (1, 1, "1:00:00")


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_on_a_part_of_a_node_does_not_ask_for_all_of_its_memory(stage: str) -> None:
    example = read_cluster_file(ROOT / "launchers" / "slurm" / "cluster.yaml")
    asked = example.resources(stage)
    assert (asked.memory == "0") == (asked.gpus_per_node == example.gpus_per_node), asked


def test_exceptions_win_and_one_process_converts(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "nodes: 4\ngpus_per_node: 0\nprocesses_per_node: 3\nqos: long\nstages:\n  pretrain: {nodes: 8, qos: null}\n"
    )
    cluster = read_cluster_file(path)
    assert (cluster.resources("finetune").nodes, cluster.resources("finetune").qos) == (4, "long")
    assert (cluster.resources("pretrain").nodes, cluster.resources("pretrain").qos) == (8, None)
    assert (cluster.resources("convert").nodes, cluster.resources("convert").processes_per_node) == (1, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partion: gpu", ["unknown key partion (did you mean partition?)"]),
        ("stages: {finetune: {gpu_per_node: 4}}", ["stages.finetune.gpu_per_node (did you mean gpus_per_node?)"]),
        ("stages: {finetun: {nodes: 4}}", ["stages.finetun (did you mean finetune?)"]),
        ("stages: {finetune: {setup: x}}", ["unknown key stages.finetune.setup"]),
        ("stages: [finetune]", ["stages is ['finetune']"]),
        ("stages: {finetune: 4}", ["stages.finetune is 4"]),
        ("time: 24:00:00", ["time is 86400", '"24:00:00"']),
        ("time: tomorrow", ["time is 'tomorrow'"]),
        ("memory: 480", ["memory is 480", '"480G"']),
        ("nodes: 0", ["nodes is 0", "at least 1"]),
        ("nodes: true", ["nodes is True", "whole number"]),
        ("nodes: null", ["nodes is None"]),
        ("health: maybe", ["health is 'maybe'", "true or false"]),
        ("modules: cuda", ["modules is 'cuda'", "a list of texts"]),
        ("container_runtime: docker", ["container_runtime is 'docker'", "pyxis, apptainer"]),
        ('account: "a\\n#SBATCH --evil"', ["account is", "one line"]),
        ("jobs: 4", ["jobs stands in the common part", "train_teachers"]),
        ("stages: {finetune: {jobs: 4}}", ["stages.finetune.jobs is 4", "only one job can do finetune"]),
        ("nodes: 1\nnodes: 2", ["the key `nodes` twice"]),
    ],
)
def test_refusals_name_key_and_mend(text: str, told: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, text)
    assert str(tmp_path / "cluster.yaml") in str(refused.value)
    assert all(part in str(refused.value) for part in told), str(refused.value)
    assert refused.value.mend


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml is missing"):
        read_cluster_file(tmp_path / "nowhere.yaml")


def test_an_empty_file_asks_for_nothing_special(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("")
    assert read_cluster_file(path).resources("finetune").nodes == 1
