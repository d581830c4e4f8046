"""Real models of any size with random weights, and the plan's shapes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import T5Config

from tagi_ds.model import TagiConfig, TagiForConditionalGeneration
from tagi_ds.model.backbone import backbone_class
from tagi_ds.plan.workload import Workload

TINY = (1000, 64, 16, 4, 160, 3)
"""Vocabulary, d_model, head width, heads, d_ff, layers."""


def make_model(
    size: tuple[int, ...] = TINY, kind: str = "gated-gelu", own_head: bool = True, device: str = "cpu", **settings: Any
) -> TagiForConditionalGeneration:
    names = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers")
    config = T5Config(**dict(zip(names, size, strict=True)), feed_forward_proj=kind, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    with torch.device("meta"):
        backbone = backbone_class("t5", own_head)(config)
        tagi = TagiConfig(**{"rank": 4, "bottleneck": 8, **settings})
        model = TagiForConditionalGeneration.from_backbone(backbone, tagi, "random")
    if device != "meta":
        model.to_empty(device=device)
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
    return model.train()


def make_batch(work: Workload, vocabulary: int) -> dict[str, Tensor | None]:
    """Inputs of exactly these lengths, as many of each task, in the tasks' order.

    The first example and instruction are shorter where the batch is padded.
    """

    def ids(rows: int, length: int) -> Tensor:
        return torch.randint(2, vocabulary, (rows, length))

    def mask(rows: int, length: int) -> Tensor:
        ones = torch.ones(rows, length, dtype=torch.long)
        if work.padded:
            ones[0, -2:] = 0
        return ones

    return {
        "input_ids": ids(work.examples, work.source),
        "attention_mask": mask(work.examples, work.source),
        "instruction_ids": ids(work.tasks, work.instruction),
        "instruction_attention_mask": mask(work.tasks, work.instruction),
        "task_index": None,
        "labels": ids(work.examples, work.target),
    }
