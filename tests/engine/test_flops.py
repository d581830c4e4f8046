"""The count of operations: torch's own, without a change of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from tagi_ds.engine.flops import FlopMeter

BATCH, LENGTH, WIDTH = 3, 5, 8


class Layer(nn.Module):
    """A product, attention over four heads, a product of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        heads = self.into(states).view(*states.shape[:2], 4, WIDTH // 4).transpose(1, 2)
        attended: Tensor = scaled_dot_product_attention(heads, heads, heads)
        return attended @ attended.mT


def step(layer: Layer, states: Tensor) -> Tensor:
    loss = layer(states).square().mean()
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        loss.backward()
    return loss.detach()


def gradients_of(layer: Layer) -> list[Tensor]:
    """Taken away from the layer."""
    found = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_count_is_torchs_and_changes_nothing(mode: Callable[[], AbstractContextManager[None]]) -> None:
    torch.manual_seed(0)
    layer, states, meter = Layer(), torch.randn(BATCH, LENGTH, WIDTH), FlopMeter()
    with mode():
        plain = [step(layer, states), *gradients_of(layer)]
        with meter.counting():
            counted = [step(layer, states), *gradients_of(layer)]
        with FlopCounterMode(display=False) as torchs:
            step(layer, states)
    assert len(plain) == len(counted) == (3 if mode is nullcontext else 1)
    assert all(map(torch.equal, plain, counted))
    # torch's table lacks attention on the CPU: two products over four heads, five backward.
    product = 2 * BATCH * LENGTH * LENGTH * WIDTH
    attention = 2 * product + (5 * product if mode is nullcontext else 0)
    assert meter.flops == torchs.get_total_flops() + attention
    assert meter.flops > attention


def test_the_same_shapes_are_counted_once_and_added_every_time() -> None:
    layer, meter, ran = Layer(), FlopMeter(), []
    for length in (5, 7, 5):
        states = torch.randn(BATCH, length, WIDTH)
        with meter.counting_once(states.shape):
            ran.append(step(layer, states))
    separate = []
    for length in (5, 7):
        single = FlopMeter()
        with single.counting():
            step(layer, torch.randn(BATCH, length, WIDTH))
        separate.append(single.flops)
    assert len(ran) == 3
    assert meter.flops == 2 * separate[0] + separate[1]


def test_a_region_that_fails_is_not_remembered() -> None:
    layer, meter, alone = Layer(), FlopMeter(), FlopMeter()
    states = torch.randn(BATCH, LENGTH, WIDTH)
    with pytest.raises(RuntimeError), meter.counting_once(states.shape):
        step(layer, states[..., 1:])
    for each in (meter.counting_once(states.shape), alone.counting()):
        with each:
            step(layer, states)
    assert meter.flops == alone.flops
