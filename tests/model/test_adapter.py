"""Adapted linears against peft and against merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from tagi_ds.data.examples import Batch
from tagi_ds.model.adapter import STATE_KEYWORD, LowRank, Site, TaskState, add_low_rank, find_sites, install
from tagi_ds.model.backbone import load_backbone

RANK, ALPHA = 3, 7.0


def random_adapters(sites: list[Site], tasks: int) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    return {site.name: LowRank(draw(tasks, RANK, site.d_in), draw(tasks, site.d_out, RANK)) for site in sites}


def with_peft(backbone: PreTrainedModel, adapters: dict[str, LowRank], task: int) -> nn.Module:
    """The backbone with real peft layers that hold one task's factors."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(adapters), lora_dropout=0.0)  # type: ignore[arg-type]
    adapted = get_peft_model(backbone, config)
    modules: dict[str, Any] = dict(adapted.get_base_model().named_modules())
    with torch.no_grad():
        for name, (a, b) in adapters.items():
            modules[name].lora_A["default"].weight.copy_(a[task])
            modules[name].lora_B["default"].weight.copy_(b[task])
    return adapted.eval()


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("kind", ["q", "k", "v", "o", "wi", "wo"])
def test_an_adapted_linear_is_pefts_and_the_merged_one(kind: str, tiny_folder: Path, tiny_batch: Batch) -> None:
    """The whole backbone with one kind of site adapted, two tasks in a batch, each against its own peft model."""
    ours = load_backbone(tiny_folder).eval()
    sites = find_sites(ours, [kind])
    assert len(sites) == {"q": 6, "k": 6, "v": 6, "o": 6, "wi": 8, "wo": 4}[kind]
    adapters = random_adapters(sites, 2)
    install(ours, sites, ALPHA / RANK)
    index = torch.tensor([0, 1, 1, 0, 1])
    state = TaskState(adapters, index=index)
    inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
    decoder_ids = tiny_batch.labels.clamp(min=0)
    with torch.no_grad():
        memory = ours.encoder(**inputs, **{STATE_KEYWORD: state}).last_hidden_state
        hidden = ours.decoder(
            input_ids=decoder_ids,
            encoder_hidden_states=memory,
            encoder_attention_mask=tiny_batch.attention_mask,
            use_cache=False,
            **{STATE_KEYWORD: state},
        ).last_hidden_state
        logits = ours.lm_head(hidden)  # a head of its own: no scaling
        plain = load_backbone(tiny_folder).eval()(**inputs, decoder_input_ids=decoder_ids).logits
        assert (logits - plain).abs().max() > 1e-2
        for task in (0, 1):
            adapted = with_peft(load_backbone(tiny_folder).eval(), adapters, task)
            rows = index == task
            expected = adapted(**inputs, decoder_input_ids=decoder_ids).logits
            torch.testing.assert_close(logits[rows], expected[rows], atol=2e-5, rtol=1e-4)
            merged = adapted.merge_and_unload()(**inputs, decoder_input_ids=decoder_ids).logits  # type: ignore[operator]
            torch.testing.assert_close(logits[rows], merged[rows], atol=2e-5, rtol=1e-4)


def test_one_linear_by_hand() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 5, bias=False), torch.randn(2, 3, 6)
    adapter = LowRank(torch.randn(1, RANK, 6), torch.randn(1, 5, RANK))
    adapted = add_low_rank(linear(x), x, adapter, ALPHA / RANK)
    merged = linear.weight + ALPHA / RANK * adapter.b[0] @ adapter.a[0]
    torch.testing.assert_close(adapted, x @ merged.T)


def test_unknown_and_absent_sites_are_refused(tiny_backbone: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="unknown adapter sites"):
        find_sites(tiny_backbone, ["q", "query"])
    with pytest.raises(ValueError, match="no linears named"):
        find_sites(nn.Module(), ["q"])


def test_outside_of_a_call_nothing_is_adapted(tiny_folder: Path, tiny_batch: Batch) -> None:
    ours, plain = load_backbone(tiny_folder).eval(), load_backbone(tiny_folder).eval()
    sites = find_sites(ours, ["q", "v"])
    owners = install(ours, sites, 1.0)
    inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
    with torch.no_grad():
        ours.encoder(**inputs, **{STATE_KEYWORD: TaskState(random_adapters(sites, 1))})
        assert all(owner.state is None for owner in owners)
        decoder_ids = tiny_batch.labels.clamp(min=0)
        assert torch.equal(
            ours(**inputs, decoder_input_ids=decoder_ids).logits, plain(**inputs, decoder_input_ids=decoder_ids).logits
        )
