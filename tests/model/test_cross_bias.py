"""Cross-attention's bias of zeros left out: the same outputs and gradients, and no mask of every head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tagi_ds.data.examples import Batch
from tagi_ds.model.backbone import load_backbone
from tagi_ds.model.cross_bias import MASK_APART, without_biases


def saved_shapes(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[torch.Size]]:
    """The loss, and shapes of what its backward pass keeps."""
    shapes: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss: Tensor = model(**inputs, use_cache=False).loss
    return loss, shapes


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_changes_but_the_masks(tiny_folder: Path, tiny_batch: Batch, padded: bool, checkpointing: bool) -> None:
    plain = load_backbone(tiny_folder).train()
    ours = copy.deepcopy(plain)
    without_biases(ours)
    mask = tiny_batch.attention_mask if padded else torch.ones_like(tiny_batch.attention_mask)
    inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": mask, "labels": tiny_batch.labels}
    found = []
    for model in (plain, ours):
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss, shapes = saved_shapes(model, inputs)
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}, shapes))
    (expected, gradients, before), (loss, own, after) = found
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, msg=name)
    examples, keys, targets = *tiny_batch.input_ids.shape, tiny_batch.labels.shape[1]
    wide = torch.Size([examples, plain.config.num_heads, targets, keys])
    assert wide not in after or not MASK_APART
    if padded and not checkpointing and MASK_APART:
        assert before.count(wide) >= plain.config.num_decoder_layers, "or the library no longer needs this"


def test_answers_by_transformers_own_loop_do_not_change(tiny_folder: Path, tiny_batch: Batch) -> None:
    plain = load_backbone(tiny_folder).eval()
    ours = copy.deepcopy(plain)
    without_biases(ours)
    inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
    for beams in (1, 3):
        answers = [model.generate(**inputs, num_beams=beams, max_new_tokens=8) for model in (plain, ours)]
        assert torch.equal(*answers)
