"""Cross-attention without a position bias of zeros, which T5 has as a tensor of every head and position.

transformers lays its masks over that bias anew in every layer: a tensor (N, heads, T, S) each, which autograd keeps for
the backward pass. One zero for every key stands for the same, and what is made of it has no heads.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations import sdpa_attention

MASK_APART = hasattr(sdpa_attention, "create_position_bias_mask")
"""Older versions add the mask to the bias where they make it, and pass both on: there it stays as it is."""


def without_bias(attention: nn.Module) -> None:
    """Gives a cross-attention module of a T5 one zero for every key as its bias, wherever it would make its own."""
    if not MASK_APART:
        return

    def give(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("position_bias") is None:
            keys = kwargs["key_value_states"]
            kwargs = {**kwargs, "position_bias": keys.new_zeros(1, 1, 1, keys.shape[1])}
        return args, kwargs

    attention.register_forward_pre_hook(give, with_kwargs=True)


def without_biases(backbone: Any) -> None:
    """The same for every layer of a backbone's decoder."""
    for block in backbone.decoder.block:
        without_bias(block.layer[1].EncDecAttention)
