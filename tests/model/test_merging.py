"""Adapters merged into the weights: the same model, and afterwards the very weights of before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tagi_ds.data.examples import Batch
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.adapter import Site
from tagi_ds.model.merging import can_merge, merged, merging_pays
from tests.conftest import MakeTagi

EVERY_SITE = ["q", "k", "v", "o", "wi", "wo"]


def answer(model: TagiForConditionalGeneration, batch: Batch, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        logits = model(**given, labels=batch.labels.clamp(min=0), state=state).logits
    return logits, model.generate(**given, task=state, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("kind", ["tiny_folder", "tied_folder"])
@pytest.mark.parametrize("settings", [{}, {"fusion": False, "concatenate": False}], ids=["tagi", "hypertuning"])
def test_merged_it_answers_alike_and_its_weights_come_back(
    kind: str, settings: dict[str, Any], make_tagi: MakeTagi, tiny_batch: Batch, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = make_tagi(folder=folder, sites=EVERY_SITE, **settings)
    assert tiny_batch.instruction_ids is not None
    assert can_merge(model)
    state = model.compile_task(tiny_batch.instruction_ids[1:2]).state
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    logits, answers = answer(model, tiny_batch, state)
    with merged(model, state) as without:
        assert without.adapters == {}
        own = dict(model.named_parameters())
        assert {name for name in own if own[name] is not before[name][0]} == {
            f"backbone.{site.name}.weight" for site in model.site_table
        }
        inside, answers_inside = answer(model, tiny_batch, without)
        bare, _ = answer(model, tiny_batch, state)
    assert float((inside - logits).norm() / logits.norm()) < 1e-5
    assert torch.equal(answers_inside, answers)
    assert not torch.allclose(bare, logits, atol=1e-3), "adapted twice it would differ"
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert torch.equal(answer(model, tiny_batch, state)[0], logits)


def test_weights_come_back_after_an_error(tiny_tagi: TagiForConditionalGeneration, tiny_batch: Batch) -> None:
    assert tiny_batch.instruction_ids is not None
    state = tiny_tagi.compile_task(tiny_batch.instruction_ids[:1]).state
    before = dict(tiny_tagi.named_parameters())
    with pytest.raises(KeyboardInterrupt), merged(tiny_tagi, state):
        raise KeyboardInterrupt
    site = tiny_tagi.site_table[-1].name
    state.adapters[site] = state.adapters[site]._replace(a=state.adapters[site].a[:, :, 1:])
    with pytest.raises(RuntimeError), merged(tiny_tagi, state):
        pytest.fail("it cannot be merged")
    assert all(parameter is before[name] for name, parameter in tiny_tagi.named_parameters())


def test_several_tasks_and_other_weights_are_not_merged(make_tagi: MakeTagi, tiny_batch: Batch) -> None:
    model = make_tagi()
    assert tiny_batch.instruction_ids is not None
    assert tiny_batch.instruction_attention_mask is not None
    state = model.compile_instructions(tiny_batch.instruction_ids, tiny_batch.instruction_attention_mask)
    with pytest.raises(ValueError, match="several"), merged(model, state):
        pytest.fail("it cannot be merged")
    weight: Any = model.backbone.get_submodule(model.site_table[0].name).weight
    weight.ds_id = 1
    assert not can_merge(model), "sharded"
    del weight.ds_id
    assert can_merge(model)
    assert not can_merge(model.bfloat16())


def test_merging_pays_from_as_many_tokens_as_the_products_say() -> None:
    # 2 · 64 · r · 32 operations to merge, 2 · r · (64 + 32) a token: from 21.3 tokens.
    encoder = [Site("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0", "", 32, 64)]
    assert not merging_pays(encoder, 21, 1000)
    assert merging_pays(encoder, 22, 0)
    decoder = [Site("decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0", "", 32, 64)]
    assert not merging_pays(decoder, 1000, 21)
    assert merging_pays(decoder, 0, 22)
    cross = [Site("decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.0", "", 32, 64)]
    assert merging_pays(cross, 22, 0)
    assert merging_pays(encoder + decoder, 43, 0)
    assert not merging_pays(encoder + decoder, 42, 0)
