"""Adapters, fusion and the decoder's attention by runs of examples, against the plain form: example by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tagi_ds.data.examples import Batch
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.adapter import STATE_KEYWORD, LowRank, TaskState
from tagi_ds.runs import runs_of
from tests.conftest import MakeTagi, padded

EVERY_SITE = ["q", "k", "v", "o", "wi", "wo"]
INDICES = {
    "each its own": [0, 1, 2],
    "one task": [0, 0, 0],
    "equal runs": [0, 0, 1, 1, 2, 2],
    "equal runs in another order": [1, 1, 0, 0],
    "a common length": [0, 0, 1, 1, 1, 1],
    "uneven": [0, 0, 0, 1, 2],
    "interleaved": [0, 1, 0, 1],
}
RUNS = {
    "each its own": None,
    "one task": None,
    "equal runs": None,
    "equal runs in another order": [1, 0],
    "a common length": [0, 1, 1],
    "uneven": [0, 0, 0, 1, 2],
    "interleaved": [0, 1, 0, 1],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "no fusion": {"fusion": False},
    "no concatenation": {"concatenate": False},
    "slots, means": {"head": "slot", "pooling": "mean"},
    "post norm": {"fusion_norm": "post"},
    "the whole model trains": {"also_train": "all"},
}


def batch_of(index: list[int], instructions: int | None = None) -> Batch:
    """Examples of these tasks, all of different lengths."""
    generator, n = torch.Generator().manual_seed(3), len(index)
    input_ids, attention_mask = padded([5 + at for at in range(n)], generator)
    instruction_ids, instruction_mask = padded([9, 4, 6][: instructions or max(index) + 1], generator)
    labels, real = padded([2 + at % 4 for at in range(n)], generator)
    return Batch(
        input_ids,
        attention_mask,
        labels.masked_fill(real == 0, -100),
        instruction_ids,
        instruction_mask,
        torch.tensor(index),
    )


def by_runs(model: TagiForConditionalGeneration, batch: Batch) -> Tensor:
    """Logits as in training."""
    assert batch.instruction_attention_mask is not None
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        instruction_ids=batch.instruction_ids,
        instruction_attention_mask=batch.instruction_attention_mask,
        task_index=batch.runs,
        labels=batch.labels,
    ).logits
    return logits


def plain(make: Callable[..., TagiForConditionalGeneration], batch: Batch, **settings: Any) -> Any:
    """A model and its logits: every example has its own copy of all that its task implies, and [I ; F] is one memory.

    The model is made without concatenation, so that its decoder attends to what it is handed.
    """
    model = make(**{**settings, "concatenate": False})
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    assert batch.task_index is not None
    whole, index = model.compile_instructions(batch.instruction_ids, batch.instruction_attention_mask), batch.task_index
    assert whole.memory is not None
    assert whole.mask is not None
    state = TaskState(
        {site: LowRank(a[index], b[index]) for site, (a, b) in whole.adapters.items()},
        {block: (keys[index], values[index]) for block, (keys, values) in whole.fusion.items()},
        whole.memory[index],
        whole.mask[index],
    )
    passed = {STATE_KEYWORD: state}
    backbone = model.backbone
    memory = backbone.encoder(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, **passed
    ).last_hidden_state
    mask = batch.attention_mask
    if settings.get("concatenate", True):
        memory, mask = torch.cat([whole.memory[index], memory], 1), torch.cat([whole.mask[index], mask], 1)
    hidden = backbone.decoder(
        input_ids=backbone._shift_right(batch.labels),
        encoder_hidden_states=memory,
        encoder_attention_mask=mask,
        use_cache=False,
        **passed,
    ).last_hidden_state
    return model, backbone.lm_head(hidden)


def gradients(model: TagiForConditionalGeneration, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differs(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the expected."""
    with torch.no_grad():
        return float((found - expected).norm() / expected.norm())


def compare(
    make: Callable[..., TagiForConditionalGeneration],
    batch: Batch,
    recomputed: bool = False,
    dtype: torch.dtype = torch.float64,
    within: tuple[float, float] = (1e-7, 1e-7),
    **settings: Any,
) -> None:
    """Values and every parameter's gradient; in float64 what differs is another mathematics, not another rounding."""

    def made(**settings: Any) -> TagiForConditionalGeneration:
        return make(**settings).to(dtype).train()

    model = made(**settings)
    if recomputed:
        model.backbone.gradient_checkpointing_enable()
    logits = by_runs(model, batch)
    reference, expected = plain(made, batch, **settings)
    assert differs(logits, expected) < within[0]
    own, theirs = gradients(model, logits, batch), gradients(reference, expected, batch)
    assert own.keys() == theirs.keys()
    assert len(own) == sum(p.requires_grad for p in model.parameters())
    far = {name: differs(own[name], gradient) for name, gradient in theirs.items()}
    assert not {name: found for name, found in far.items() if found > within[1]}


@pytest.mark.parametrize("index", INDICES)
def test_runs_are_the_plain_form(index: str, make_tagi: MakeTagi) -> None:
    batch = batch_of(INDICES[index])
    assert (batch.runs if batch.runs is None else batch.runs.tolist()) == RUNS[index]
    compare(make_tagi, batch, sites=EVERY_SITE)


@pytest.mark.parametrize("settings", SETTINGS)
def test_of_every_kind_of_model(settings: str, make_tagi: MakeTagi) -> None:
    compare(make_tagi, batch_of(INDICES["equal runs"]), **SETTINGS[settings])


@pytest.mark.parametrize("index", ["equal runs", "a common length"])
def test_recomputed(index: str, make_tagi: MakeTagi) -> None:
    compare(make_tagi, batch_of(INDICES[index]), recomputed=True, sites=EVERY_SITE)


@pytest.mark.parametrize("index", ["equal runs", "uneven"])
def test_in_fp32(index: str, make_tagi: MakeTagi) -> None:
    compare(make_tagi, batch_of(INDICES[index]), dtype=torch.float32, within=(1e-6, 5e-6), sites=EVERY_SITE)


def test_in_bf16(make_tagi: MakeTagi) -> None:
    batch = batch_of(INDICES["a common length"])

    def make(**settings: Any) -> TagiForConditionalGeneration:
        return make_tagi(**settings).to(torch.bfloat16)

    model = make(sites=EVERY_SITE)
    logits, (_, expected) = by_runs(model, batch), plain(make, batch, sites=EVERY_SITE)
    assert logits.dtype == torch.bfloat16
    assert differs(logits, expected) < 0.02


def test_an_instruction_of_no_example_changes_nothing(make_tagi: MakeTagi) -> None:
    batch = batch_of([2, 2, 0, 0], instructions=3)
    assert batch.runs is not None
    assert batch.runs.tolist() == [2, 0]
    compare(make_tagi, batch)


@pytest.mark.parametrize("index", ["equal runs", "equal runs in another order", "uneven"])
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_each_example_alone(index: str, beams: int, make_tagi: MakeTagi) -> None:
    model, batch = make_tagi(sites=EVERY_SITE), batch_of(INDICES[index])
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    how: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    masks = {
        "attention_mask": batch.attention_mask,
        "instruction_attention_mask": batch.instruction_attention_mask,
    }
    answers = model.generate(
        batch.input_ids, instruction_ids=batch.instruction_ids, task_index=batch.task_index, **masks, **how
    )
    for row, task in enumerate(INDICES[index]):
        ids, words = batch.input_ids[row : row + 1], batch.instruction_ids[task : task + 1]
        alone = model.generate(
            ids[:, : int(batch.attention_mask[row].sum())],
            instruction_ids=words[:, : int(batch.instruction_attention_mask[task].sum())],
            **how,
        )[0]
        assert answers[row, : len(alone)].tolist() == alone.tolist()


def test_a_batch_knows_its_runs_wherever_it_goes() -> None:
    batch = batch_of(INDICES["a common length"])
    moved = batch.to(torch.device("meta"))
    assert moved.runs is not None
    assert moved.runs.shape == (3,), "found on the CPU, and not from an index elsewhere"
    assert replace(batch, task_index=torch.tensor([0, 0, 0, 1, 1, 1])).runs is None
    assert batch_of([0, 1]).to(torch.device("meta")).runs is None


def test_a_compiled_task_projects_its_instruction_once(make_tagi: MakeTagi) -> None:
    model, batch = make_tagi(sites=EVERY_SITE), batch_of(INDICES["one task"])
    assert batch.instruction_ids is not None
    task = model.compile_task(batch.instruction_ids)
    given = {"attention_mask": batch.attention_mask, "max_new_tokens": 5, "do_sample": False}
    first = model.generate(batch.input_ids, task=task, **given)
    kept = task.state.kept
    assert kept is not None
    assert len(kept) == 2 * len(model.backbone.decoder.block)
    assert task.state.memory is not None
    task.state.memory = torch.full_like(task.state.memory, torch.nan)
    assert torch.equal(model.generate(batch.input_ids, task=task, **given), first)
    task.state.kept = {}
    with torch.no_grad():
        spoilt = model(batch.input_ids, batch.attention_mask, state=task.state, labels=batch.labels).logits
    assert spoilt.isnan().all(), "what was kept is what was read"


def test_a_pass_that_learns_keeps_nothing_and_reads_nothing_kept(make_tagi: MakeTagi) -> None:
    model, batch = make_tagi(also_train="all"), batch_of(INDICES["one task"])
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    state = model.compile_instructions(batch.instruction_ids, batch.instruction_attention_mask)
    state.kept = {}
    given = {"state": state, "labels": batch.labels}
    expected = model(batch.input_ids, batch.attention_mask, **given).logits
    assert state.kept == {}
    model.keep_instructions(state)
    state.kept = {name: torch.full_like(value, torch.nan) for name, value in state.kept.items()}
    assert torch.equal(model(batch.input_ids, batch.attention_mask, **given).logits, expected)
    with torch.no_grad():
        assert model(batch.input_ids, batch.attention_mask, **given).logits.isnan().all()


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), factor=st.integers(1, 4))
def test_runs_are_the_longest_of_one_length(lengths: list[int], factor: int) -> None:
    """Every run is one task's, their number divides the batch, and no longer length would do."""
    index = [at % 3 for at, length in enumerate(lengths) for _ in range(factor * length)]
    found = runs_of(torch.tensor(index)).tolist()
    each, rest = divmod(len(index), len(found))
    assert rest == 0
    assert each % factor == 0
    assert [task for task in found for _ in range(each)] == index
    for longer in range(each + 1, len(index) + 1):
        if len(index) % longer == 0:
            parts = [index[at : at + longer] for at in range(0, len(index), longer)]
            assert any(len(set(part)) > 1 for part in parts)
