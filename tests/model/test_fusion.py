"""Fusion's keys and values against their plain form, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tagi_ds.engine.flops import FlopMeter
from tagi_ds.model.fusion import FusionLayer, FusionMemory

TASKS, LENGTH, WIDTH, HEADS, HEAD = 3, 5, 8, 2, 6


def a_memory() -> FusionMemory:
    torch.manual_seed(0)
    memory = FusionMemory(WIDTH, HEADS, HEAD, 1e-6).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter)
    return memory


def plain(memory: FusionMemory, instruction: Tensor) -> tuple[Tensor, ...]:
    """W·Norm(I) with the norm as a module of its own."""
    normed = memory.norm(instruction)
    return tuple(part(normed).view(TASKS, LENGTH, HEADS, HEAD).transpose(1, 2) for part in (memory.k, memory.v))


def test_keys_and_values_are_those_of_a_norm_and_two_projections() -> None:
    memory = a_memory()
    instruction = torch.randn(TASKS, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = [instruction, *memory.parameters()]
    weights = torch.randn(2, TASKS, HEADS, LENGTH, HEAD, dtype=torch.float64)
    found = memory(memory.normalised(instruction))
    expected = plain(memory, instruction)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)
    for own, other in zip(
        torch.autograd.grad((torch.stack(found) * weights).sum(), targets),
        torch.autograd.grad((torch.stack(expected) * weights).sum(), targets),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_is_the_papers_formula(norm: str) -> None:
    """F = Norm(S + O·softmax(Q·Kᵀ)·V) in the paper's form, S + O·softmax(Norm(S)·..)·V in the other; T5's scores are
    not scaled. Two runs of two examples each, of instructions unlike in length."""
    memory = a_memory()
    layer = FusionLayer(WIDTH, HEADS, HEAD, 1e-6, norm).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    runs, examples, tokens = 2, 2, 3
    hidden = torch.randn(runs * examples, tokens, WIDTH, dtype=torch.float64)
    instruction = torch.randn(runs, LENGTH, WIDTH, dtype=torch.float64)
    lengths = [LENGTH, 2]
    mask = (torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]).long()
    found = layer(hidden, *memory(memory.normalised(instruction)), mask)

    def normed(states: Tensor, weight: Tensor) -> Tensor:
        return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for row, own in enumerate(hidden):
        words = normed(instruction[row // examples, : lengths[row // examples]], memory.norm.weight)
        asks = own if norm == "post" else normed(own, layer.norm.weight)
        heads = []
        for head in range(HEADS):
            part = slice(head * HEAD, (head + 1) * HEAD)
            pairs = ((asks, layer.q), (words, memory.k), (words, memory.v))
            query, key, value = (states @ linear.weight[part].T for states, linear in pairs)
            heads.append((query @ key.T).softmax(-1) @ value)
        fused = own + torch.cat(heads, -1) @ layer.o.weight.T
        expected = normed(fused, layer.norm.weight) if norm == "post" else fused
        torch.testing.assert_close(found[row], expected)


def test_a_constant_instruction_costs_no_gradient_of_its_own() -> None:
    memory = a_memory()
    instruction = torch.randn(TASKS, LENGTH, WIDTH, dtype=torch.float64)
    one = 2 * TASKS * LENGTH * WIDTH * HEADS * HEAD
    meter = FlopMeter()
    with meter.counting():
        sum(part.sum() for part in memory(memory.normalised(instruction))).backward()
    assert meter.flops == 2 * 2 * one, "keys and values, forward and for the weights alone"
