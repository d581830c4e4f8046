"""The same TAGI as a sequence of layers, for stages that run in different processes.

    EncoderStart  EncoderBlock ...  EncoderEnd | DecoderStart  DecoderBlock ...  Head

A block's layer holds the backbone's block and the hypernetwork's parts for it, so that its adapters are generated where
they are used and never sent. What the layers hand on is a ``Payload``; what each stage knows of a micro-batch by itself
(ids, masks, labels, the encoded instructions) is a ``MicroBatch``; both are of :mod:`tagi_ds.model.payload`. Run in
order in one process, the layers give the logits of :class:`~tagi_ds.model.tagi.TagiForConditionalGeneration`, whose
modules they are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from tagi_ds.model.adapter import STATE_KEYWORD, TaskState
from tagi_ds.model.payload import MicroBatch, Payload

if TYPE_CHECKING:
    from tagi_ds.model.fusion import FusionLayer, FusionMemory
    from tagi_ds.model.tagi import TagiForConditionalGeneration


class PositionBias(nn.Module):
    """The relative position bias of a stack, whose table T5 keeps in the first block alone."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.table = attention.relative_attention_bias
        self._bucket = attention._relative_position_bucket
        self._settings = {
            "bidirectional": not attention.is_decoder,
            "num_buckets": attention.relative_attention_num_buckets,
            "max_distance": attention.relative_attention_max_distance,
        }

    def forward(self, length: int) -> Tensor:
        """(1, heads, length, length)."""
        places = torch.arange(length, device=self.table.weight.device)
        buckets = self._bucket(places[None, :] - places[:, None], **self._settings)
        bias: Tensor = self.table(buckets).permute(2, 0, 1)[None]
        return bias


class EncoderStart(nn.Module):
    """Embeds the input."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.embed_tokens, self.dropout = stack.embed_tokens, stack.dropout

    def forward(self, payload: Payload, micro: MicroBatch) -> Payload:
        """Nothing -> hidden (N, L, d), errors of zero."""
        hidden = self.dropout(self.embed_tokens(micro.input_ids))
        return Payload(hidden, errors=torch.zeros(micro.tasks, device=hidden.device))


class _Block(nn.Module):
    """A block of either stack, its part of the generator, and the bias it needs where a stage begins with it."""

    def __init__(self, stack: Any, name: str, index: int, generator: nn.Module | None) -> None:
        super().__init__()
        self.name, self.config = name, stack.config
        self.block, self.generator = stack.block[index], generator
        # The first block has the table itself, and computes the bias when it is given none.
        self.bias = PositionBias(stack.block[0].layer[0].SelfAttention) if index else None

    def generate(self, payload: Payload, micro: MicroBatch) -> TaskState | None:
        """The state of this block, its alignment error added to the payload's; None where nothing is adapted."""
        if micro.instruction is None:
            return None
        mask = micro.instruction_attention_mask
        adapters = {} if self.generator is None else self.generator(micro.instruction, mask)
        error = micro.align(adapters) if micro.align is not None and adapters else None
        if error is not None:
            payload.errors = error if payload.errors is None else payload.errors + error
        return TaskState(adapters, {}, micro.instruction, mask, micro.task_index)

    def run(self, payload: Payload, state: TaskState | None) -> Payload:
        """The block itself, on what the payload holds."""
        assert payload.hidden is not None
        if payload.bias is None and self.bias is not None:
            payload.bias = self.bias(payload.hidden.shape[1])
        handed = {} if state is None else {STATE_KEYWORD: state}
        payload.hidden, payload.bias, payload.cross_bias = self.block(
            payload.hidden,
            payload.mask,
            payload.bias,
            payload.attended,
            payload.cross_mask,
            payload.cross_bias,
            **handed,
        )
        return payload


class EncoderBlock(_Block):
    """An encoder block with its adapters and its fusion."""

    def __init__(
        self,
        stack: Any,
        name: str,
        index: int,
        generator: nn.Module | None,
        fusion: tuple[FusionMemory, FusionLayer] | None,
    ) -> None:
        super().__init__(stack, name, index, generator)
        # The layer is called by the hook at the block's self-attention; here it is held, to live on this stage.
        self.fusion_memory = fusion[0] if fusion else None
        self.fusion_layer = fusion[1] if fusion else None

    def forward(self, payload: Payload, micro: MicroBatch) -> Payload:
        """Hidden (N, L, d) -> hidden (N, L, d)."""
        state = self.generate(payload, micro)
        if state is not None and self.fusion_memory is not None:
            assert micro.instruction is not None
            state.fusion[self.name] = self.fusion_memory(self.fusion_memory.normalised(micro.instruction))
        if payload.mask is None:
            assert payload.hidden is not None
            payload.mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=payload.hidden, attention_mask=micro.attention_mask
            )
        return self.run(payload, state)


class EncoderEnd(nn.Module):
    """The encoder's last norm."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.final_layer_norm, self.dropout = stack.final_layer_norm, stack.dropout

    def forward(self, payload: Payload, micro: MicroBatch) -> Payload:
        """Hidden (N, L, d) -> memory (N, L, d)."""
        return Payload(memory=self.dropout(self.final_layer_norm(payload.hidden)), errors=payload.errors)


class DecoderStart(nn.Module):
    """Embeds the labels, shifted right."""

    def __init__(self, stack: Any, shift_right: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed_tokens, self.dropout, self._shift_right = stack.embed_tokens, stack.dropout, shift_right

    def forward(self, payload: Payload, micro: MicroBatch) -> Payload:
        """Labels (N, T) -> hidden (N, T, d)."""
        assert micro.labels is not None
        payload.hidden = self.dropout(self.embed_tokens(self._shift_right(micro.labels)))
        return payload


class DecoderBlock(_Block):
    """A decoder block with its adapters, attending to [I ; F]."""

    def __init__(self, stack: Any, name: str, index: int, generator: nn.Module | None, concatenate: bool) -> None:
        super().__init__(stack, name, index, generator)
        self.concatenate = concatenate

    def forward(self, payload: Payload, micro: MicroBatch) -> Payload:
        """Hidden (N, T, d) -> hidden (N, T, d)."""
        state = self.generate(payload, micro)
        assert state is not None
        if payload.attended is None:
            self._attend(payload, micro, state)
        return self.run(payload, state)

    def _attend(self, payload: Payload, micro: MicroBatch, state: TaskState) -> None:
        assert payload.memory is not None
        assert state.mask is not None
        memory, mask = payload.memory, micro.attention_mask
        if self.concatenate:
            # The hooks at the block's cross-attention put I before F.
            mask = torch.cat([state.spread(state.mask, len(mask)), mask], dim=1)
        shared: dict[str, Any] = {"config": self.config, "inputs_embeds": payload.hidden}
        payload.mask = create_causal_mask(**shared, attention_mask=None, past_key_values=None)
        payload.cross_mask = create_bidirectional_mask(**shared, attention_mask=mask, encoder_hidden_states=memory)
        payload.attended = memory


class Head(nn.Module):
    """The decoder's last norm and the output projection."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.final_layer_norm, self.dropout = backbone.decoder.final_layer_norm, backbone.decoder.dropout
        self.lm_head = backbone.lm_head
        self.scale = backbone.model_dim**-0.5 if backbone.config.scale_decoder_outputs else None

    def forward(self, payload: Payload, micro: MicroBatch) -> Payload:
        """Hidden (N, T, d) -> the figures that the micro-batch's reader takes; without one the logits (N, T, V)."""
        hidden = self.dropout(self.final_layer_norm(payload.hidden))
        if self.scale is not None:
            hidden = hidden * self.scale
        if micro.reader is None:
            payload.hidden = self.lm_head(hidden)
        else:
            payload.figures = self.lm_head(hidden, micro.reader())
        return payload


def stage_units(model: TagiForConditionalGeneration) -> list[list[nn.Module]]:
    """The model's layers, grouped into units between which stages may be cut: one a block, encoder first.

    The layers share the model's own modules and parameters. A cut between encoder and decoder lies between EncoderEnd
    and DecoderStart, so that F alone crosses it.
    """
    backbone, parts, fusion = model.backbone, dict(model.hypernetwork.generator.items()), model.hypernetwork.fusion

    def generator(name: str) -> nn.Module | None:
        return parts.get(name.replace(".", "_"))

    units: list[list[nn.Module]] = []
    for index in range(len(backbone.encoder.block)):
        name = f"encoder.block.{index}"
        fused: Any = None if fusion is None else (fusion.memories[index], fusion.layers[index])
        units.append([EncoderBlock(backbone.encoder, name, index, generator(name), fused)])
    units[0].insert(0, EncoderStart(backbone.encoder))
    units[-1].append(EncoderEnd(backbone.encoder))
    first = len(units)
    for index in range(len(backbone.decoder.block)):
        name = f"decoder.block.{index}"
        concatenate = model.config.concatenate
        units.append([DecoderBlock(backbone.decoder, name, index, generator(name), concatenate)])
    units[first].insert(0, DecoderStart(backbone.decoder, backbone._shift_right))
    units[-1].append(Head(backbone))
    return units
