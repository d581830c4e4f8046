"""From a recipe to a plan: communication, stages, recommendation, refusals, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ds import recipe
from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.plan.advice import Candidate, Plan, make_plan
from tagi_ds.plan.cluster import Cluster, read_cluster
from tagi_ds.plan.communication import backbone_gather, collective_s
from tagi_ds.plan.shapes import count_model
from tagi_ds.plan.stages import balance
from tagi_ds.plan.timing import stage_costs
from tests.distributed import ROOT


def read(name: str, *flags: str, stage: str = "finetune") -> RunConfig:
    return recipe.parse(stage, ["--config", str(ROOT / f"launchers/recipes/{name}.yaml"), *flags]).config


def plan_of(name: str, cluster: str, *flags: str) -> Plan:
    return make_plan(read(name, *flags), "finetune", read_cluster(cluster))


def named(plan: Plan, title: str) -> Candidate:
    return next(candidate for candidate in plan.candidates if candidate.layout.title == title)


def test_gathering_11_billion_takes_what_the_design_says() -> None:
    gathered = backbone_gather(count_model(read("sni_xxl"), "finetune"), 2)
    assert round(gathered / 1e9, 1) == 44.5
    assert round(collective_s(read_cluster("8xH100"), gathered, 8), 1) == 0.1
    # Many nodes with one adapter of 50 GB/s each.
    one_adapter = Cluster("far", "h100", 64, 8, 85, 790, 60, 3350, 450, 50)
    assert round(collective_s(one_adapter, gathered, 512), 1) == 0.9
    assert collective_s(one_adapter, gathered, 512, within_node=True) < 0.1


def test_large_gpus_replicate_the_frozen_backbone_and_small_ones_shard_it() -> None:
    large = plan_of("sni_xxl", "8xH100", "--data.tasks_per_batch", "8")
    assert large.recommended is not None
    assert large.recommended.layout.title == "zero2"
    # 26 GB of weights beside what trains do not fit into 24 GB.
    small = make_plan(
        read("sni_xxl", "--data.tasks_per_batch", "8"),
        "finetune",
        Cluster("small", "other", 1, 8, 24, 100, 20, 1000, 50, 12),
    )
    assert not named(small, "zero2").fits
    assert small.recommended is not None
    assert small.recommended.layout.strategy == "zero3"
    assert any("does not fit: shard it" in sentence for sentence in small.advice)


def test_hpz_pays_where_the_network_is_slow() -> None:
    slow = Cluster("slow", "h100", 4, 8, 85, 790, 60, 3350, 450, 25)
    plan = make_plan(read("sni_xxl", "--data.tasks_per_batch", "32"), "finetune", slow)
    plain, hpz = named(plan, "zero3"), named(plan, "zero3 + hpZ")
    assert plain.timing is not None
    assert hpz.timing is not None
    assert hpz.timing.step_s < 0.7 * plain.timing.step_s
    assert hpz.memory is not None
    assert plain.memory is not None
    assert hpz.memory.peak > plain.memory.peak
    assert plain.traffic is not None
    assert hpz.traffic is not None
    # From each node's copy, forward and backward; what trains has none after the optimizer's step.
    assert hpz.traffic.gathered == plain.traffic.gathered
    assert hpz.traffic.gather_s == pytest.approx(collective_s(slow, hpz.traffic.gathered, 32, within_node=True))
    trained = 2 * count_model(read("sni_xxl"), "finetune").trained
    across, within = collective_s(slow, trained, 32), collective_s(slow, trained, 32, within_node=True)
    assert hpz.traffic.updated_s == pytest.approx(across - within)
    assert hpz.traffic.updated_s > 0


def test_at_the_break_even_zero3_gathers_as_long_as_it_computes() -> None:
    config = read("sni_xxl", "--data.tasks_per_batch", "8", "--engine.activation_checkpointing", "false")
    cluster = Cluster("slow", "h100", 1, 8, 2000, 790, 60, 3350, 50, 50)
    plan = make_plan(config, "finetune", cluster)
    per_example = config.data.max_source_tokens + config.data.max_target_tokens
    config.data.tasks_per_batch = 8 * round(plan.break_even / per_example)
    at = named(make_plan(config, "finetune", cluster), "zero3")
    assert at.timing is not None
    assert at.traffic is not None
    assert at.timing.compute_s == pytest.approx(at.traffic.gather_s, rel=0.1)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    def planned(tasks: int) -> Plan:
        flags = ("--engine.accumulation", "1", "--data.tasks_per_batch", str(tasks))
        return plan_of("sni_base", "1xA100-40G", *flags)

    found = named(planned(1), "single")
    again, more = planned(found.largest), planned(found.largest + 1)
    assert found.largest > 1
    assert named(again, "single").fits
    assert not named(more, "single").fits


def test_what_cannot_run_is_said_with_the_reason() -> None:
    plan = plan_of("sni_xl", "6xH100", "--engine.accumulation", "1")
    assert "one process" in named(plan, "single").refused[0]
    assert "no multiple of 4 stages" in named(plan, "pipeline 4 x 1").refused[0]
    batch = named(plan, "zero2").batch
    assert batch is not None
    assert "tasks_per_batch 8 is no multiple of 6 replicas" in batch
    trained = plan_of("sni_xl", "8xH100", "--model.also_train", "embeddings")
    assert "embeddings" in named(trained, "pipeline 2 x 4").refused[0]
    factored = plan_of("sni_xl", "1xH100", "--engine.strategy", "single", "--optimizer.name", "adafactor")
    assert all(c.refused for c in factored.candidates if c.layout.strategy != "single")


def test_each_layout_has_the_micro_batches_that_its_share_divides_into() -> None:
    # 16 tasks, two micro-batches a step: over 16 GPUs one is left for each.
    plan = plan_of("sni_base", "2x8xH100")
    assert {named(plan, title).accumulation for title in ("zero2", "zero3")} == {1}
    assert named(plan, "zero2").batch is None
    assert any("Set engine.accumulation 1, where the recipe says 2" in sentence for sentence in plan.advice)
    assert named(plan_of("sni_base", "8xH100"), "zero2").accumulation == 2
    # A pipeline fills itself: 8 tasks on one replica are 8 micro-batches of one example.
    pipeline = named(plan_of("sni_xl", "4xH100"), "pipeline 4 x 1")
    assert pipeline.work is not None
    assert pipeline.timing is not None
    assert (pipeline.accumulation, pipeline.work.examples) == (8, 1)
    assert pipeline.timing.bubble == pytest.approx(3 / 11)


def test_pretraining_is_timed_at_the_mean_of_its_cuts_and_fits_at_the_longest() -> None:
    plan = make_plan(read("sni_xl", stage="pretrain"), "pretrain", read_cluster("8xH100"))
    found = named(plan, "zero2")
    assert found.work is not None
    assert found.expected is not None
    assert (found.work.instruction, found.work.source, found.work.target) == (1008, 1008, 1008)
    assert (found.expected.instruction, found.expected.source, found.expected.target) == (341, 341, 341)


def test_offloading_moves_memory_to_the_host_and_is_paid_in_time() -> None:
    def zero3(settings: str) -> Candidate:
        flags = ("--engine.strategy", "zero3", "--engine.deepspeed", settings)
        return named(
            make_plan(read("sni_xxl", *flags, stage="meta_train"), "meta_train", read_cluster("2xH100")), "zero3"
        )

    plain, offloaded = zero3("ds_configs/zero3.json"), zero3("ds_configs/zero3_offload.json")
    assert not plain.fits, "16 bytes for each of 11B parameters are 89 GB on each of two GPUs"
    assert offloaded.fits
    assert offloaded.memory is not None
    assert offloaded.timing is not None
    assert plain.timing is not None
    # Half of: the bf16 parameters, float32 masters, two moments and sums of gradients.
    assert offloaded.memory.host == pytest.approx(11_135_332_352 * (2 + 4 + 8 + 4) / 2)
    assert offloaded.timing.optimizer_s == pytest.approx(11_135_332_352 / 2 * 30 / 50e9)
    assert offloaded.timing.step_s > 2 * plain.timing.step_s
    assert plain.memory is not None
    assert plain.memory.host == 0


def test_nothing_fits_is_said_with_ways_out() -> None:
    tiny = Cluster("tiny", "other", 1, 1, 4, 100, 20, 1000, 50, 12)
    plan = make_plan(read("sni_xxl"), "finetune", tiny)
    assert plan.recommended is None
    assert "Nothing fits" in plan.advice[0]
    assert "offload" in plan.advice[0]


def test_stages_are_cut_by_cost_and_not_by_number() -> None:
    found = named(plan_of("sni_xl", "8xH100"), "pipeline 4 x 2")
    plan = plan_of("sni_xl", "8xH100")
    assert found.operations is not None
    costs = stage_costs(plan.shapes, found.operations, found.stages)
    even = stage_costs(plan.shapes, found.operations, [range(i, i + 12) for i in range(0, 48, 12)])
    assert max(costs) < 0.8 * max(even)


@settings(max_examples=60)
@given(costs=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8), data=st.data())
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    cut = balance(costs, stages)
    assert [i for stage in cut for i in stage] == list(range(len(costs)))
    assert len(cut) == stages
    assert all(cut)

    def dearest(bounds: list[int]) -> float:
        return max(sum(costs[a:b]) for a, b in pairwise(bounds))

    best = min(dearest([0, *inner, len(costs)]) for inner in combinations(range(1, len(costs)), stages - 1))
    assert dearest([0, *(stage.stop for stage in cut)]) == pytest.approx(best)


def test_a_cluster_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert (read_cluster("4x8xH200").gpus, read_cluster("cpu").is_cpu) == (32, True)
    assert read_cluster("4x8xA100-80GB").memory_gb == read_cluster("4x8xa100").memory_gb == 85
    file = tmp_path / "ours.yaml"
    file.write_text("gpu: a100-40g\nnodes: 2\ngpus_per_node: 4\nnetwork_gbs: 12.5\n", encoding="utf-8")
    ours = read_cluster(str(file))
    assert (ours.gpus, ours.memory_gb, ours.network_gbs, ours.name) == (8, 42.0, 12.5, "ours")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu: h100\nmemory_gbytes: 80\n", "did you mean memory_gb"),
        ("gpu: h100\nnodes: 0\n", "nodes is 0"),
        ("gpu: h100\nlink_gbs: fast\n", "link_gbs is 'fast'"),
        ("gpu: mi300\nnodes: 1\n", "lacks gpus_per_node"),
    ],
)
def test_a_wrong_cluster_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_cluster(str(file))


@pytest.mark.parametrize("name", ["8xK80", "x", "0xH100", "missing.yaml"])
def test_an_unknown_cluster_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        read_cluster(name)


def test_the_command_prints_the_plan_and_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "launchers/plan.py", "--config", "launchers/recipes/sni_xl.yaml", "--cluster", "8xH100"]
    done = subprocess.run(
        [*command, "--lengths", "128,256,16", "--json", str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "2,849,757,184" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["recommended"] == "zero2"
    assert written["parameters"]["generator"] == 623_596_032
    wrong = subprocess.run([*command[:-1], "8xK80"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --cluster 8xK80")


def test_a_validation_batch_that_does_not_fit_is_said_with_the_one_that_does() -> None:
    """An 11B on GPUs of 45 GB: a step has one example a micro-batch, a validation batch has 64 unless told."""
    small = replace(read_cluster("8xH100"), memory_gb=45.0)

    def planned(examples: int) -> tuple[Plan, list[str]]:
        flags = ("--data.tasks_per_batch", "8", "--data.examples_per_task", "1", "--data.max_source_tokens", "1024")
        plan = make_plan(read("sni_xxl", *flags, "--evaluation.batch_examples", str(examples)), "finetune", small)
        assert plan.recommended is not None
        return plan, [sentence for sentence in plan.advice if "validation batch" in sentence]

    plan, said = planned(64)
    assert said[0].startswith("A validation batch of 64 examples at their longest takes 5")
    fitting = int(said[0].rpartition(" ")[2].rstrip("."))
    assert 16 <= fitting < 64
    for examples, is_said in ((fitting, False), (fitting + 1, True)):
        other, told = planned(examples)
        assert bool(told) == is_said
        assert other.recommended.layout == plan.recommended.layout  # type: ignore[union-attr]
