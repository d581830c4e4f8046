"""Teachers trained together: each as it would be alone, from the backbone's own loss, over its own examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tagi_ds.config import TeacherConfig
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Task
from tagi_ds.errors import UserError
from tagi_ds.model.adapter import find_sites
from tagi_ds.model.backbone import load_backbone, recompute_blocks
from tagi_ds.teachers.bank import TeacherBank, common_a
from tagi_ds.teachers.lora import TeacherResult, look_every, train_group
from tagi_ds.teachers.scoring import Row, Scorer
from tagi_ds.teachers.units import Unit, draw, make_units
from tests.teachers.conftest import make_tasks

SEED, SCALING = 4, 2.0
KINDS = ["q", "v"]


def test_looks_are_a_tenth_of_the_way_apart_where_nothing_is_said() -> None:
    assert [look_every(TeacherConfig(steps=steps)) for steps in (1, 10, 11, 10_000)] == [1, 1, 2, 1000]
    assert look_every(TeacherConfig(steps=10_000, look_every=30)) == 30


def train(
    backbone: PreTrainedModel, units: list[Unit], collator: Collator, config: TeacherConfig
) -> list[TeacherResult]:
    sites = find_sites(backbone, KINDS)
    return train_group(backbone, sites, units, collator, common_a(sites, 2, SEED), SCALING, config, SEED)


def assert_same(together: TeacherResult, alone: TeacherResult) -> None:
    assert (together.unit, together.steps, together.taken) == (alone.unit, alone.steps, alone.taken)
    for name in ("loss_before", "loss_after", "exact_before", "exact_after", "rouge_before", "rouge_after"):
        assert getattr(together, name) == pytest.approx(getattr(alone, name), abs=1e-5)
    for site, (a, b) in alone.factors.items():
        assert torch.allclose(together.factors[site].a, a, atol=1e-5, rtol=1e-5)
        assert torch.allclose(together.factors[site].b, b, atol=1e-5, rtol=1e-5)


def test_each_teacher_ends_as_it_would_alone(
    tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    tasks = make_tasks(3, 12)
    # Unequal shares: nobody's mean may depend on the others' numbers.
    tasks[1] = replace(tasks[1], examples=tasks[1].examples[:5])
    units = make_units(tasks, toy_teachers, SEED)
    for together, unit in zip(train(tiny_backbone, units, input_collator, toy_teachers), units, strict=True):
        (alone,) = train(tiny_backbone, [unit], input_collator, toy_teachers)
        assert_same(together, alone)


def scorer_of(backbone: PreTrainedModel, units: list[Unit], collator: Collator, batch: int) -> Scorer:
    """Of teachers that are not at their start, so that both factors have gradients."""
    sites = find_sites(backbone, KINDS)
    bank = TeacherBank(backbone, sites, len(units), common_a(sites, 2, SEED), SCALING, True)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for b in bank.b:
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    return Scorer(bank, units, collator, batch, SEED)


def gradients(scorer: Scorer, rows: list[Row]) -> list[torch.Tensor]:
    scorer.bank.zero_grad()
    scorer.backward(rows)
    return [parameter.grad for parameter in scorer.bank.parameters() if parameter.grad is not None]


def rows_of(units: list[Unit], teachers: Sequence[int], examples: int) -> list[Row]:
    return [(i, *pair) for i in teachers for pair in draw(units[i], examples, 0, SEED)]


@pytest.mark.parametrize("teachers, runs", [([0, 1, 2], None), ([0, 2], [0, 2])])
def test_factors_are_read_by_runs_of_examples(
    teachers: list[int],
    runs: list[int] | None,
    tiny_backbone: PreTrainedModel,
    input_collator: Collator,
    toy_teachers: TeacherConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    units = make_units(make_tasks(3, 12), toy_teachers, SEED)
    scorer, asked = scorer_of(tiny_backbone, units, input_collator, 12), []
    forward = scorer.bank.forward
    rows = rows_of(units, teachers, 4)

    def spy(ids: Any, mask: Any, labels: Any, index: Any, read: Any) -> Any:
        asked.append(None if index is None else index.tolist())
        return forward(ids, mask, labels, index, read)

    def example_by_example(ids: Any, mask: Any, labels: Any, index: Any, read: Any) -> Any:
        return forward(ids, mask, labels, torch.tensor([teacher for teacher, _, _ in rows]), read)

    monkeypatch.setattr(scorer.bank, "forward", spy)
    by_runs = gradients(scorer, rows)
    assert asked == [runs]
    monkeypatch.setattr(scorer.bank, "forward", example_by_example)
    for found, expected in zip(by_runs, gradients(scorer, rows), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 5, 6])
def test_micro_batches_have_the_gradients_of_one_graph(
    batch: int, tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    """With targets of many lengths: a mean over a micro-batch's tokens would weigh short answers too much."""
    tasks = make_tasks(3, 12)
    answers = ["lamp", "chair bell box lamp chair", "bell box"]
    uneven = [
        replace(task, examples=[replace(e, references=(answers[i % 3],)) for i, e in enumerate(task.examples)])
        for task in tasks
    ]
    units = make_units(uneven, toy_teachers, SEED)
    rows = rows_of(units, [0, 1, 2], 4)
    whole = gradients(scorer_of(tiny_backbone, units, input_collator, 12), rows)
    scorer, seen = scorer_of(tiny_backbone, units, input_collator, batch), []
    scorer.bank.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    parts = gradients(scorer, rows)
    assert max(seen) == batch
    assert sum(seen) == len(rows)
    for found, expected in zip(parts, whole, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_micro_batches_train_the_same_teachers(
    tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    config = replace(toy_teachers, steps=2)
    units = make_units(make_tasks(2, 12), config, SEED)
    sites = find_sites(tiny_backbone, KINDS)
    start = common_a(sites, 2, SEED)
    cut = train_group(tiny_backbone, sites, units, input_collator, start, SCALING, config, SEED, accumulation=3)
    for found, expected in zip(cut, train(tiny_backbone, units, input_collator, config), strict=True):
        assert_same(found, expected)


def test_recomputed_blocks_keep_their_inputs_alone_and_give_the_same_bits(
    tiny_folder: Path, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    units = make_units(make_tasks(2, 12), toy_teachers, SEED)
    rows, found = rows_of(units, [0, 1], 4), []
    for recomputed in (False, True):
        backbone = load_backbone(tiny_folder).eval()
        if recomputed:
            recompute_blocks(backbone)
        scorer, kept = scorer_of(backbone, units, input_collator, 8), []
        runs: list[int] = []
        backbone.get_encoder().block[0].layer[0].register_forward_hook(lambda *_, runs=runs: runs.append(1))

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mine = gradients(scorer, rows)
        assert len(runs) == 1 + recomputed
        looks = scorer.look([0, 1]), scorer.rouge_l()
        found.append((mine, looks, sum(kept)))
    (plain, looks, whole), (again, same_looks, inputs) = found
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
    assert looks == same_looks
    assert inputs < whole / 4


def test_a_teacher_that_is_done_neither_goes_on_nor_holds_up_the_others(
    tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    config = replace(toy_teachers, steps=10, patience=1, look_every=2)
    learner, stuck = make_units(make_tasks(2, 12), config, SEED)
    # Its validation asks for what its training examples do not say, so that learning makes it worse.
    other = make_tasks(4, 12)[3]
    stuck = replace(stuck, train=[(other, example) for example in other.examples])
    together = train(tiny_backbone, [learner, stuck], input_collator, config)
    assert together[0].taken == 10 > together[1].taken
    assert together[1].taken % 2 == 0
    patient = train(tiny_backbone, [stuck], input_collator, replace(config, patience=0))
    assert patient[0].taken == 10
    for result, unit in zip(together, [learner, stuck], strict=True):
        assert_same(result, train(tiny_backbone, [unit], input_collator, config)[0])


def test_a_teacher_starts_from_the_backbone_and_beats_it(
    tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    weights = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
    (unit,) = make_units(make_tasks(1, 12), toy_teachers, SEED)
    batch = input_collator([TaskChunk(task, 0, (example,), (0,)) for task, example in unit.validation])
    with torch.no_grad():
        logits = tiny_backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
        ).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    (result,) = train(tiny_backbone, [unit], input_collator, replace(toy_teachers, steps=40))
    assert result.loss_before == pytest.approx(expected.item(), abs=1e-6)
    assert result.loss_after < result.loss_before - 2.0
    assert (result.exact_before, result.exact_after) == (0.0, 1.0)
    # What is predicted whole under teacher forcing is what greedy decoding writes.
    assert (result.rouge_before, result.rouge_after) == (0.0, 1.0)
    assert 0 < result.steps <= result.taken == 40
    assert result.flops > 0
    for name, value in tiny_backbone.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_warm_teacher_goes_on_where_the_other_ended_and_is_measured_against_the_backbone(
    tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    warm, cold = units = make_units(make_tasks(2, 12), toy_teachers, SEED)
    sites = find_sites(tiny_backbone, KINDS)
    (first,) = train(tiny_backbone, [warm], input_collator, replace(toy_teachers, steps=40))
    start = common_a(sites, 2, SEED)

    def go_on(units: list[Unit], config: TeacherConfig) -> list[TeacherResult]:
        known = {warm.name: first.factors}
        return train_group(
            tiny_backbone, sites, units, input_collator, start, SCALING, config, SEED, warm=lambda name: known.get(name)
        )

    # So small a rate changes nothing that a float can show, so the start is all there is.
    (still,) = go_on([warm], replace(toy_teachers, steps=1, learning_rate=1e-30))
    assert still.warm
    assert still.steps == 0
    assert (still.loss_before, still.loss_after) == (first.loss_before, pytest.approx(first.loss_after, abs=1e-6))
    assert all(torch.equal(still.factors[site].b, b) for site, (_, b) in first.factors.items())
    together = go_on(units, toy_teachers)
    assert [result.warm for result in together] == [True, False]
    assert together[0].loss_after <= first.loss_after + 1e-6
    for result, unit in zip(together, units, strict=True):
        assert_same(result, go_on([unit], toy_teachers)[0])
    assert_same(together[1], train(tiny_backbone, [cold], input_collator, toy_teachers)[0])


@pytest.mark.parametrize("train_a", [True, False])
def test_a_is_trained_only_where_asked(
    train_a: bool, tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    units = make_units(make_tasks(2, 12), toy_teachers, SEED)
    config = replace(toy_teachers, train_a=train_a, steps=4)
    start = common_a(find_sites(tiny_backbone, KINDS), 2, SEED)
    for result in train(tiny_backbone, units, input_collator, config):
        assert result.steps > 0
        assert any(pair.b.any() for pair in result.factors.values())
        assert all(torch.equal(pair.a, start[site]) for site, pair in result.factors.items()) is not train_a


def test_a_backbone_answers_to_teachers_of_one_kind(
    tiny_backbone: PreTrainedModel, input_collator: Collator, toy_teachers: TeacherConfig
) -> None:
    units = make_units(make_tasks(1, 4), toy_teachers, SEED)
    sites = find_sites(tiny_backbone, KINDS)
    start, config = common_a(sites, 2, SEED), replace(toy_teachers, steps=1)
    train_group(tiny_backbone, sites, units, input_collator, start, SCALING, config, SEED)
    with pytest.raises(ValueError, match="another scaling"):
        train_group(tiny_backbone, sites, units, input_collator, start, 2 * SCALING, config, SEED)


def identities(unit: Unit) -> tuple[set[str], set[str]]:
    return {example.id for _, example in unit.train}, {example.id for _, example in unit.validation}


@pytest.mark.parametrize("kind, names", [("task", 6), ("category", 3)])
def test_units_share_out_every_example_once(kind: str, names: int, toy_teachers: TeacherConfig) -> None:
    tasks = make_tasks(6, 12)
    units = make_units(tasks, replace(toy_teachers, unit=kind), SEED)
    wanted = {task.name if kind == "task" else task.category for task in tasks}
    assert {unit.name for unit in units} == wanted
    assert len(units) == names
    seen: set[str] = set()
    for unit in units:
        training, validation = identities(unit)
        assert not training & validation
        assert len(validation) == len(training | validation) // 4
        assert {task.name if kind == "task" else task.category for task, _ in [*unit.train, *unit.validation]} == {
            unit.name
        }
        seen |= training | validation
    assert seen == {example.id for task in tasks for example in task.examples}
    backwards = make_units(tasks[::-1], replace(toy_teachers, unit=kind), SEED)
    assert [(unit.name, identities(unit)) for unit in backwards] == [(unit.name, identities(unit)) for unit in units]
    assert [unit.name for unit in make_units(tasks, replace(toy_teachers, unit=kind), SEED + 1)] != [
        unit.name for unit in units
    ]


def test_a_unit_of_one_example_is_validated_on_it(toy_teachers: TeacherConfig) -> None:
    (unit,) = make_units(make_tasks(1, 1), toy_teachers, SEED)
    assert identities(unit) == ({"task0-0"}, {"task0-0"})


def test_every_example_is_drawn_once_an_epoch(toy_teachers: TeacherConfig) -> None:
    task: Task = make_tasks(1, 10)[0]
    unit = Unit("u", [(task, example) for example in task.examples], [])
    drawn = [example.id for step in range(5) for _, example in draw(unit, 4, step, SEED)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(example.id for example in task.examples)
    assert drawn[:10] != drawn[10:]


def test_examples_are_read_when_they_are_asked_for(toy_teachers: TeacherConfig) -> None:
    class Counted(list):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            raise AssertionError("read as a whole")

    tasks = [replace(task, examples=Counted(task.examples)) for task in make_tasks(6, 12)]
    (unit, *_) = make_units(tasks, replace(toy_teachers, unit="category"), SEED)
    assert Counted.reads == 0
    draw(unit, 4, 1, SEED)
    assert Counted.reads == 4
    assert [pair[1].id for pair in unit.train[2:5]] == [unit.train[i][1].id for i in (2, 3, 4)]


def test_a_task_that_names_no_unit_is_refused(toy_teachers: TeacherConfig) -> None:
    with pytest.raises(UserError, match="task task0 names no source"):
        make_units(make_tasks(2, 4), replace(toy_teachers, unit="source"), SEED)
    sourced = [replace(task, source="anli") for task in make_tasks(2, 4)]
    assert [unit.name for unit in make_units(sourced, replace(toy_teachers, unit="source"), SEED)] == ["anli"]
