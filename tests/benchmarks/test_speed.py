"""The benchmarks of speed at a tiny size: rows of the right shape, and batches that are what they are called."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tagi_ds.build import build_tagi
from tagi_ds.config import LossConfig
from tagi_ds.data.collate import pad_ids
from tagi_ds.divergence import Distributions, FullDistributions, StoredDistributions
from tagi_ds.evaluation.cost import operations_of, ways_of
from tagi_ds.evaluation.dealing import evaluating
from tagi_ds.evaluation.generation import GenerationSettings
from tagi_ds.files import read_json, write_json
from tagi_ds.objectives import TagiObjective
from tests.benchmarks import growth, inference, train
from tests.benchmarks.figures import Seconds, compare_work, take_turns
from tests.benchmarks.speed_study import Study
from tests.benchmarks.uncomputed import Uncomputed
from tests.benchmarks.whole_logits import WholeLogits
from tests.benchmarks.words import Words

TASKS, INSTANCES = 16, 8


@pytest.fixture(scope="module")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks in SNI's layout with two positive examples each; test tasks are among the training tasks."""
    folder, words = tmp_path_factory.mktemp("speed") / "sni", Words()
    for name in ("tasks", "splits/default"):
        (folder / name).mkdir(parents=True)
    names = [f"task{number:03d}_generated" for number in range(TASKS)]
    for name, some in (("train_tasks", names), ("test_tasks", names[:4])):
        (folder / "splits" / "default" / f"{name}.txt").write_text("\n".join(some), encoding="utf-8")
    for number, name in enumerate(names):
        task = {
            "Definition": [words.slice(30 + 5 * number, 60 + 5 * number)],
            "Categories": ["Category"],
            "Source": ["generated"],
            "Input_language": ["English"],
            "Output_language": ["English"],
            "Positive Examples": [{"input": words.slice(60, 90), "output": words.slice(5, 9)} for _ in range(3)],
            "Negative Examples": [],
            "Instances": [
                {"id": f"{name}-{i}", "input": words.slice(20, 80), "output": [words.slice(4, 12)]}
                for i in range(INSTANCES)
            ],
        }
        write_json(folder / "tasks" / f"{name}.json", task)
    return folder


@pytest.fixture(scope="module")
def study(sni: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("speed") / "study", sni, "tiny")


def check(rows: dict[str, dict[str, Any]], names: set[str], runs: int) -> None:
    assert set(rows) == {f"tiny_{name}" for name in names}
    for name, figures in rows.items():
        assert figures["goal"] is None, "a tiny size has no goal"
        assert figures["direction"] in ("at_least", "at_most")
        assert len(figures["runs"]) == runs, name
        assert all(0 < figure < float("inf") for figure in (figures["ratio"], *figures["runs"]))
    assert json.loads(json.dumps(rows)) == rows


def test_training(sni: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "figures.json", tmp_path / "train.png"
    argv = ["--size", "tiny", "--runs", "2", "--sni", str(sni), "--output", str(output), "--picture", str(picture)]
    rows = train.main([*argv, "--only", "lora", "distillation"])
    names = {"train_vs_lora_by_flops_fusion_on", "train_vs_lora_by_flops_fusion_off", "train_distilled_vs_naive"}
    check(rows, names, 2)
    kept = read_json(output)
    assert set(kept) == set(rows)
    assert {"processor", "torch", "transformers", "threads"} <= set(kept["tiny_train_distilled_vs_naive"]["machine"])
    on, off = (rows[f"tiny_train_vs_lora_by_flops_fusion_{name}"] for name in ("on", "off"))
    assert on["flops_ratio"] > off["flops_ratio"] > 1, "fusion and the hypernetwork cost operations"
    assert on["tokens"]["concatenated"]["mean"] > on["tokens"]["instruction"]["mean"] > on["tokens"]["target"]["mean"]
    assert picture.stat().st_size > 0


def test_inference(sni: Path) -> None:
    argv = ["--size", "tiny", "--runs", "2", "--sni", str(sni), "--only", "concatenation", "merged", "mixed"]
    names = {
        "compiled_vs_concatenation",
        "merged_vs_bare",
        "unmerged_vs_bare",
        "mixed_vs_one_task",
    }
    check(inference.main(argv), {f"inference_{name}" for name in names}, 2)


def test_operations_are_summed_over_all_test_tasks(sni: Path) -> None:
    rows = inference.main(["--size", "tiny", "--sni", str(sni), "--only", "relative_flops"])
    names = [f"inference_relative_flops_{form}" for form in ("def", "def_2_pos")]
    check(rows, {*names, *(f"{name}_all_tasks" for name in names)}, 1)
    for name in names:
        of_all, whole = list(rows[f"tiny_{name}"]["per_task"].values()), rows[f"tiny_{name}"]
        for figures, tasks in ((rows[f"tiny_{name}_all_tasks"], of_all), (whole, [t for t in of_all if not t["cut"]])):
            sums = {way: sum(told["operations"][way] for told in tasks) for way in inference.COUNTED_WAYS}
            assert figures["tasks"] == len(tasks)
            assert figures["ratio"] == round(sums["once"] / sums["concatenated"], 4)
            assert sums["compiled"] < sums["once"]
        assert len(of_all) == 4
    long, short = (rows[f"tiny_inference_relative_flops_{form}"]["ratio"] for form in ("def_2_pos", "def"))
    assert long < short, "the longer the instruction, the more is saved"


def test_what_is_not_computed_is_counted_all_the_same(study: Study) -> None:
    config, model = study.config(), inference.tagi(study)
    collators = study.collator("hypernetwork", config), study.collator("concatenated", config)
    settings, counts = GenerationSettings(batch_examples=4), []
    for mode in (contextlib.nullcontext(), Uncomputed()):
        with evaluating(model), mode:
            runs, _ = ways_of(model, study.unseen[0], collators, settings)
            counts.append({way: operations_of(runs[way]) for way in inference.COUNTED_WAYS})
    assert counts[0] == counts[1]


def test_growth(sni: Path, tmp_path: Path) -> None:
    picture = tmp_path / "growth.png"
    argv = ["--size", "tiny", "--runs", "2", "--sni", str(sni), "--only", "instruction", "--picture", str(picture)]
    rows = growth.main(argv)
    check(rows, {"growth_instruction"}, 2)
    points = rows["tiny_growth_instruction"]["points"]
    assert list(points) == [str(value) for value in growth.POINTS["tiny"]["instruction"]]
    operations = [point["gflop"] for point in points.values()]
    assert operations == sorted(operations)
    assert picture.stat().st_size > 0


def test_without_an_output_nothing_is_recorded(sni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    growth.main(["--size", "tiny", "--runs", "1", "--sni", str(sni), "--only", "tasks"])
    assert list(tmp_path.iterdir()) == []


def test_ungrouped_batches_repeat_what_an_example_had(study: Study) -> None:
    batch = study.collator("hypernetwork", study.config())(study.chunks(2, 3)[0])
    apart = train.ungrouped(batch)
    assert batch.instruction_ids is not None
    assert apart.instruction_ids is not None
    assert len(apart.instruction_ids) == len(apart.tasks) == len(batch.labels) == 6
    for row, owner in enumerate([0, 0, 0, 1, 1, 1]):
        assert torch.equal(apart.instruction_ids[row], batch.instruction_ids[owner])
        assert apart.tasks[row] == batch.tasks[owner]
    assert torch.equal(apart.labels, batch.labels)


@pytest.mark.parametrize("kept", ["listed", "whole"])
def test_the_naive_losses_are_those_of_training(study: Study, kept: str) -> None:
    model, vocabulary = build_tagi(study.config()), study.size.shape["vocab_size"]
    batch = study.collator("hypernetwork", study.config())(study.chunks(2, 3)[0])
    present = torch.tensor([True, True, False, True, True, True])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch.labels.shape, vocabulary, generator=generator)
    teacher: Distributions = FullDistributions(logits, present)
    if kept == "listed":
        top = logits.log_softmax(-1).topk(5)
        tail = 1 - top.values.exp().sum(-1)
        teacher = StoredDistributions(top.indices, top.values.exp(), top.values, tail, present)
    batch.teacher["distributions"] = teacher
    own = TagiObjective(LossConfig(kl=5.0), model.config.scaling, 2.0)
    expected, found = own(model, batch), WholeLogits.of(own)(model, batch)
    assert set(found) == set(expected)
    for name, term in expected.items():
        torch.testing.assert_close(found[name].value, term.value, rtol=1e-5, atol=1e-5)


def test_fewer_tasks_serve_the_same_examples(study: Study) -> None:
    batch = study.collator("hypernetwork", study.config())(study.chunks(TASKS, 1)[0])
    one = train.with_tasks(batch, 1)
    assert one.instruction_attention_mask is not None
    assert batch.instruction_attention_mask is not None
    assert one.task_index is not None
    assert one.task_index.tolist() == [0] * TASKS
    lengths = batch.instruction_attention_mask.sum(1).sort().values
    assert int(one.instruction_attention_mask.sum()) == int(lengths[TASKS // 2])
    assert torch.equal(one.input_ids, batch.input_ids)
    four = train.with_tasks(batch, 4)
    assert four.task_index is not None
    assert four.task_index.bincount().tolist() == [TASKS // 4] * 4


def test_joined_sources_have_the_tokens_of_both_parts(study: Study) -> None:
    batch = study.collator("hypernetwork", study.config())(study.chunks(3, 1)[0])
    joined = train.joined(batch)
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    rows = [
        [*first[mask.bool()].tolist()[:-1], *second[other.bool()].tolist()]
        for first, mask, second, other in zip(
            batch.instruction_ids, batch.instruction_attention_mask, batch.input_ids, batch.attention_mask, strict=True
        )
    ]
    expected = pad_ids([torch.tensor(row).numpy() for row in rows])
    assert torch.equal(joined.input_ids, expected[0])
    assert torch.equal(joined.attention_mask, expected[1])
    assert torch.equal(joined.labels, batch.labels)


def test_turns_are_taken_and_whoever_begins_changes() -> None:
    seen: list[str] = []
    ways = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    times = take_turns(ways, 3)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(took) for name, took in times.items()} == {"a": 3, "b": 3}


def test_a_time_over_the_operations_ratio() -> None:
    above, below = [Seconds(6.0, 6.0)] * 3, [Seconds(2.0, 2.0)] * 3
    figures = compare_work(above, below, (200, 100), 1.15, "at_most")
    assert figures["ratio"] == 1.5, "three times the time for twice the operations"
    assert figures["flops_ratio"] == 2.0
