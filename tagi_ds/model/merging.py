"""A task's adapters in the weights of the backbone, for as long as inputs of that task alone are answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tagi_ds.model.adapter import Site, TaskState

if TYPE_CHECKING:
    from tagi_ds.model.tagi import TagiForConditionalGeneration


@contextlib.contextmanager
def merged(model: TagiForConditionalGeneration, state: TaskState) -> Iterator[TaskState]:
    """Has the sites' linears compute (W + scaling · B·A) x inside; fusion and concatenation stay beside them.

    The linears are given other parameters meanwhile, so that W itself is never written to: what else holds it (a tied
    weight, another model, a file that is mapped) does not change, and afterwards it is back to the last bit. Meanwhile
    the model answers this task alone, and does not compile instructions.

    Args:
        model: for which :func:`can_merge` holds.
        state: of one task.

    Yields:
        The state without the adapters that are now in the weights.

    Raises:
        ValueError: the state is of several tasks.
    """
    if any(len(adapter.a) != 1 for adapter in state.adapters.values()):
        raise ValueError("weights hold the adapters of one task; the state has several")
    modules: dict[str, Any] = dict(model.backbone.named_modules())
    weights: dict[str, nn.Parameter] = {}
    try:
        for site, (a, b) in state.adapters.items():
            module = modules[site]
            weight = weights[site] = module.weight
            whole = torch.addmm(
                weight.detach(), b[0].to(weight.dtype), a[0].to(weight.dtype), alpha=model.config.scaling
            )
            module.weight = nn.Parameter(whole, requires_grad=False)
        yield replace(state, adapters={})
    finally:
        for site, weight in weights.items():
            modules[site].weight = weight


def can_merge(model: TagiForConditionalGeneration) -> bool:
    """Whether the sites' weights are whole and in float32: a narrower type would round the update away."""
    modules: dict[str, Any] = dict(model.backbone.named_modules())
    weights = [modules[site.name].weight for site in model.site_table]
    return all(not hasattr(weight, "ds_id") and weight.dtype == torch.float32 for weight in weights)


def merging_pays(sites: list[Site], inputs: int, answers: int) -> bool:
    """Whether merging computes less than adapting, by the operations of the products (the rank is in both).

    Merging takes 2 · d_out · r · d_in operations a site, adapting 2 · r · (d_in + d_out) for each token that it reads.

    Args:
        sites: of the model.
        inputs: tokens that the encoder reads, padding included; the decoder's keys and values are of the same.
        answers: tokens that the decoder is known to write.
    """
    merging = sum(site.d_in * site.d_out for site in sites)
    return merging <= sum((site.d_in + site.d_out) * _tokens(site, inputs, answers) for site in sites)


def _tokens(site: Site, inputs: int, answers: int) -> int:
    reads_inputs = site.name.startswith("encoder.") or site.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    return inputs if reads_inputs else answers
