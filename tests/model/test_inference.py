"""Batches one after the other: tasks compiled once, merged where it pays, the same answers whatever came before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.adapter import TaskState
from tagi_ds.model.compiled import CompiledTasks, stack
from tagi_ds.model.inference import Inference
from tests.conftest import MakeTagi, padded

NEW_TOKENS = 8
Inputs = dict[str, Any]
Ask = Callable[..., Inputs]


@pytest.fixture
def ask() -> Ask:
    """ask(tasks, rows): a batch of examples of these of three instructions, of as many rows each, unlike in length."""
    instructions = padded([6, 10, 3], torch.Generator().manual_seed(7))

    def make(tasks: list[int], rows: int = 2, length: int = 5) -> Inputs:
        index = torch.arange(len(tasks)).repeat_interleave(rows)
        lengths = [length + at % 3 for at in range(len(index))]
        ids, mask = padded(lengths, torch.Generator().manual_seed(100 * tasks[0] + length))
        width = int(instructions[1][tasks].sum(1).max())
        given = {"instruction_ids": instructions[0][tasks, :width], "task_index": index}
        given["instruction_attention_mask"] = instructions[1][tasks, :width]
        return {"input_ids": ids, "attention_mask": mask, **given}

    return make


def counted(model: TagiForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of instructions of every compilation."""
    sizes: list[int] = []
    compile_instructions = model.compile_instructions

    def noting(ids: Tensor, *more: Any) -> TaskState:
        sizes.append(len(ids))
        return compile_instructions(ids, *more)

    monkeypatch.setattr(model, "compile_instructions", noting)
    return sizes


@pytest.mark.parametrize("settings", [{}, {"fusion": False, "concatenate": False}], ids=["tagi", "hypertuning"])
@pytest.mark.parametrize("beams", [1, 2])
def test_it_answers_as_the_model(settings: dict[str, Any], beams: int, make_tagi: MakeTagi, ask: Ask) -> None:
    model = make_tagi(**settings)
    batches = [ask([0], 4), ask([0, 1, 2]), ask([1, 0]), ask([1], 1), ask([2], 6), ask([2], 6, 9), ask([0], 4)]
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "num_beams": beams, "do_sample": False}
    expected = [model.generate(**batch, **how) for batch in batches]
    with Inference(model) as inference:
        for batch, answers in zip(batches, expected, strict=True):
            assert torch.equal(inference.generate(batch, NEW_TOKENS, beams=beams), answers)
    assert len({tuple(row.tolist()) for answers in expected for row in answers}) > len(batches)


def test_each_instruction_is_compiled_once_and_as_the_backbone_is(
    tiny_tagi: TagiForConditionalGeneration, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = counted(tiny_tagi, monkeypatch)
    weights = dict(tiny_tagi.named_parameters())
    one, merging = ask([0], 12, 12), ask([2], 12, 12)
    with Inference(tiny_tagi) as inference:
        inference.generate(one, NEW_TOKENS)
        assert any(weights[name] is not part for name, part in tiny_tagi.named_parameters()), "adapters are merged"
        inference.generate(one, NEW_TOKENS)
        inference.generate(ask([0, 1]), NEW_TOKENS)
        inference.generate(ask([1, 0]), NEW_TOKENS)
        inference.generate(one, NEW_TOKENS)
        inference.generate(merging, NEW_TOKENS)
        found = inference._tasks.of(merging["instruction_ids"], merging["instruction_attention_mask"])  # type: ignore[union-attr]
    assert sizes == [1, 1, 1]
    assert all(weights[name] is part for name, part in tiny_tagi.named_parameters()), "weights are put back"
    with torch.no_grad():
        alone = tiny_tagi.compile_instructions(merging["instruction_ids"], merging["instruction_attention_mask"])
    for site, (a, b) in alone.adapters.items():
        assert torch.equal(found.adapters[site].a, a), "compiled while another task's adapters were in the weights"
        assert torch.equal(found.adapters[site].b, b)


def test_adapters_stay_beside_where_merging_does_not_pay(tiny_tagi: TagiForConditionalGeneration, ask: Ask) -> None:
    weights = dict(tiny_tagi.named_parameters())

    def is_merged() -> bool:
        return any(weights[name] is not part for name, part in tiny_tagi.named_parameters())

    with Inference(tiny_tagi) as inference:
        for batch, merges in ((ask([0], 12, 12), True), (ask([0], 1, 3), False), (ask([0, 1], 12, 12), False)):
            inference.generate(batch, NEW_TOKENS)
            assert is_merged() == merges
    with Inference(tiny_tagi, merge=False) as inference:
        inference.generate(ask([0], 12, 12), NEW_TOKENS)
        assert not is_merged()


def test_weights_come_back_after_an_interruption(tiny_tagi: TagiForConditionalGeneration, ask: Ask) -> None:
    weights = dict(tiny_tagi.named_parameters())

    def interrupted() -> None:
        with Inference(tiny_tagi) as inference:
            inference.generate(ask([0], 12, 12), NEW_TOKENS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(weights[name] is part for name, part in tiny_tagi.named_parameters())


def test_what_was_asked_before_changes_no_bit(tiny_tagi: TagiForConditionalGeneration, ask: Ask) -> None:
    """Runs on other numbers of ranks, or broken off, ask for other batches before."""
    wanted = ask([1, 2])
    states = []
    for before in ([], [ask([2], 12, 12)], [ask([0, 1, 2]), ask([1], 12, 12), ask([1], 1)]):
        with Inference(tiny_tagi) as inference:
            for batch in before:
                inference.generate(batch, NEW_TOKENS)
            states.append(inference.state(wanted, 1))
    for state in states[1:]:
        for site, pair in states[0].adapters.items():
            assert all(torch.equal(*both) for both in zip(pair, state.adapters[site], strict=True))
        assert state.kept is not None
        assert states[0].kept is not None
        assert all(torch.equal(part, state.kept[name]) for name, part in states[0].kept.items())


@torch.no_grad()
def test_stacked_states_are_those_of_a_padded_batch(tiny_tagi: TagiForConditionalGeneration, ask: Ask) -> None:
    batch = ask([0, 1, 2])
    together = tiny_tagi.compile_instructions(batch["instruction_ids"], batch["instruction_attention_mask"])
    tasks = CompiledTasks(tiny_tagi)
    found = stack(
        [tasks.of(batch["instruction_ids"][at, None], batch["instruction_attention_mask"][at, None]) for at in range(3)]
    )
    assert torch.equal(found.mask, together.mask)  # type: ignore[arg-type]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = torch.ones(6, 3, dtype=torch.long)
    logits = [tiny_tagi(**given, labels=labels, state=state).logits for state in (together, found)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    for name, projected in (found.kept or {}).items():
        assert projected.shape[:2] == found.mask.shape, name  # type: ignore[union-attr]


def test_padding_on_the_left_is_padding_too(tiny_tagi: TagiForConditionalGeneration, ask: Ask) -> None:
    batch = ask([0, 1, 2])
    names = ("instruction_ids", "instruction_attention_mask")
    lengths = batch[names[1]].sum(1).tolist()
    shifted = {
        name: torch.stack([row.roll(-length) for row, length in zip(batch[name], lengths, strict=True)])
        for name in names
    }
    assert not torch.equal(shifted[names[1]], batch[names[1]])
    with Inference(tiny_tagi) as inference:
        expected = inference.generate(batch, NEW_TOKENS)
        assert torch.equal(inference.generate({**batch, **shifted}, NEW_TOKENS), expected)
    with Inference(tiny_tagi) as inference:
        assert torch.equal(inference.generate({**batch, **shifted}, NEW_TOKENS), expected), "of what is not kept yet"


def test_the_memory_for_compiled_tasks_is_bounded(
    tiny_tagi: TagiForConditionalGeneration, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = counted(tiny_tagi, monkeypatch)
    tasks = CompiledTasks(tiny_tagi, most_bytes=1)
    for wanted in ([0], [0], [1], [0], [0, 1, 2], [2], [1]):
        batch = ask(wanted)
        tasks.of(batch["instruction_ids"], batch["instruction_attention_mask"])
        assert len(tasks._states) == len(wanted), "what is asked for is kept, and no more"
    assert len(sizes) == 1 + 0 + 1 + 1 + 2 + 0 + 1
