"""What a pipeline's stages know of a micro-batch, and what travels between them as one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tagi_ds.model.adapter import LowRank
from tagi_ds.model.head import Figures, Reader

Align = Callable[[Mapping[str, LowRank]], Tensor | None]
"""Adapters of some sites -> their share of each task's alignment error, (U,) float32; None where there is none."""


@dataclass
class MicroBatch:
    """N examples of U tasks, as every stage has them.

    Attributes:
        input_ids, attention_mask: (N, L) int64.
        labels: (N, T) int64, -100 where nothing is to be predicted; None for a pass over the encoder alone.
        instruction_ids, instruction_attention_mask: (U, S) int64.
        task_index: (R,) int64, of runs of examples, or None; as in the model's forward.
        instruction: (U, S, d) encoded instructions, from before or by the step's own pass; None: not yet encoded, and
            no adapters, no fusion.
        align: what the adapters add to the alignment error; None without that loss.
        reader: makes what takes figures from the logits, asked for on the last stage alone; None: logits are wanted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    instruction_ids: Tensor
    instruction_attention_mask: Tensor
    task_index: Tensor | None = None
    instruction: Tensor | None = None
    align: Align | None = None
    reader: Callable[[], Reader] | None = None

    @property
    def tasks(self) -> int:
        """U."""
        return len(self.instruction_ids)

    def of_instructions(self) -> MicroBatch:
        """The pass that encodes the instructions: they are the input, and nothing is adapted."""
        mask = self.instruction_attention_mask
        return replace(self, input_ids=self.instruction_ids, attention_mask=mask, labels=None, instruction=None)


@dataclass
class Payload:
    """What one layer hands to the next.

    Attributes:
        hidden: (N, L, d) in the encoder, (N, T, d) in the decoder, the logits (N, T, V) behind the head; None between.
        memory: (N, L, d), F: the encoder's last; None before its end.
        errors: (U,) float32, the alignment error of the layers so far.
        figures: what was read of the logits, behind the head.
        bias, cross_bias, mask, cross_mask, attended: made by the first block of a stage for those behind it; not sent.
    """

    hidden: Tensor | None = None
    memory: Tensor | None = None
    errors: Tensor | None = None
    figures: Figures | None = None
    bias: Tensor | None = None
    cross_bias: Tensor | None = None
    mask: Any = None
    cross_mask: Any = None
    attended: Tensor | None = None

    def pack(self) -> Tensor:
        """One flat tensor of all that travels: a stage's backward pass is then one, whatever it hands on."""
        sent = [tensor for tensor in (self.hidden, self.memory) if tensor is not None]
        assert sent
        assert self.errors is not None
        return torch.cat([*(tensor.flatten() for tensor in sent), _Spread.apply(self.errors, sent[0].dtype)])

    @classmethod
    def unpack(cls, packed: Tensor, micro: MicroBatch, width: int, encoder_ended: bool, decoder_begun: bool) -> Payload:
        """The payload that :meth:`pack` made.

        Args:
            packed: 1-D.
            micro: whose lengths say how it is cut.
            width: d.
            encoder_ended, decoder_begun: whether EncoderEnd and DecoderStart lie before the cut.
        """
        shapes = []
        if decoder_begun:
            assert micro.labels is not None
            shapes.append((*micro.labels.shape, width))
        shapes.append((*micro.input_ids.shape, width))
        sizes = [n * length * width for n, length, _ in shapes]
        *parts, errors = packed.split([*sizes, packed.numel() - sum(sizes)])
        tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        hidden = tensors[0] if decoder_begun or not encoder_ended else None
        return cls(hidden, tensors[-1] if encoder_ended else None, _Gathered.apply(errors, micro.tasks))


def _pieces(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(U,) float32 -> flat tensor of a narrower type whose pieces add up to it: bf16 needs three for 24 bits."""
    pieces, rest = [], values.float()
    for _ in range(1 if dtype == torch.float32 else 3):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1].float()
    return torch.cat(pieces)


class _Spread(torch.autograd.Function):
    """Float32 values among narrower ones, and the gradient back, without rounding either."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.size = len(values)
        return _pieces(values, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].float().view(-1, ctx.size).sum(0), None


class _Gathered(torch.autograd.Function):
    """The inverse of :class:`_Spread`."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, size: int) -> Tensor:
        ctx.dtype = pieces.dtype
        return pieces.float().view(-1, size).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _pieces(grads[0], ctx.dtype), None
