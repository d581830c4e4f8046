"""DeepSpeed's pipeline module over layers that hand on a payload; imported only once DeepSpeed is wanted."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from tagi_ds.model.backbone import without_dropout
from tagi_ds.model.head import Figures
from tagi_ds.model.payload import MicroBatch, Payload
from tagi_ds.model.pipeline import EncoderEnd

Finish = Callable[[int, Figures, Tensor], Tensor]
"""Number of the micro-batch, its figures and its alignment errors -> the loss to go back from."""


class Stages(PipelineModule):
    """This process's layers, those of one stage.

    DeepSpeed moves flat tensors between the stages, and says neither which micro-batch they belong to nor asks: each
    stage sees the micro-batches in their order, in training and in evaluation, and counts them itself.

    Args:
        units: layers that stay together.
        cuts: units of each stage.
        width: d, of the hidden states that travel.
    """

    def __init__(self, units: Sequence[Sequence[nn.Module]], cuts: Sequence[range], width: int) -> None:
        ends = list(accumulate(sum(len(units[unit]) for unit in cut) for cut in cuts))
        layers = [layer for unit in units for layer in unit]
        # Read by _partition_layers, which the base class calls; lists may be set before a module is one.
        self._bounds = [0, *ends]
        # DeepSpeed tells its seeds and layers on the standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(layers=layers, num_stages=len(cuts), dynamic_shape=True)
        self.width = width
        self._encoder_end = next(at for at, layer in enumerate(layers) if isinstance(layer, EncoderEnd))
        self._micros: Sequence[MicroBatch] = ()
        self._finish: Finish | None = None
        self._number = 0

    def _partition_layers(self, method: str = "uniform") -> None:
        """The given cuts, in the place of DeepSpeed's choice by numbers of parameters or layers."""
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @property
    def is_first(self) -> bool:
        """Whether this stage reads the input."""
        return bool(self.stage_id == 0)

    @property
    def is_last(self) -> bool:
        """Whether this stage computes the loss."""
        return bool(self.stage_id == self.num_stages - 1)

    def begin(self, micros: Sequence[MicroBatch], finish: Finish) -> None:
        """Sets what the next passes are over."""
        self._micros, self._finish, self._number = micros, finish, 0

    def end(self) -> None:
        """Forgets the micro-batches."""
        self._micros, self._finish = (), None

    def forward(self, inputs: Tensor) -> Tensor:
        """One micro-batch through this stage: flat payload -> flat payload, on the last stage -> the loss."""
        number, micro = self._number, self._micros[self._number]
        self._number += 1
        payload = Payload() if self.is_first else self._received(inputs, micro)
        for layer in self.forward_funcs:
            payload = layer(payload, micro)
        if not self.is_last:
            return payload.pack()
        assert self._finish is not None
        assert payload.figures is not None
        assert payload.errors is not None
        return self._finish(number, payload.figures, payload.errors)

    def _received(self, packed: Tensor, micro: MicroBatch) -> Payload:
        # DecoderStart follows EncoderEnd at once.
        begin = self._local_start
        return Payload.unpack(packed, micro, self.width, begin > self._encoder_end, begin > self._encoder_end + 1)

    @torch.no_grad()
    def encode_instructions(self, micros: Sequence[MicroBatch], dtype: torch.dtype, device: torch.device) -> None:
        """Sets every micro-batch's `instruction`, on every stage of this replica.

        The encoder's stages pass the instructions on, micro-batch after micro-batch; the last of them broadcasts the
        whole step's encodings. No stage but its own holds a part of the encoder.
        """
        encoder = [layer for at, layer in enumerate(self.forward_funcs, self._local_start) if at <= self._encoder_end]
        source = self._rank_of(self.stage_owner(self._encoder_end))
        shapes = [(*micro.instruction_ids.shape, self.width) for micro in micros]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        encoded: list[Tensor] = []
        for micro, shape in zip(micros if encoder else (), shapes, strict=bool(encoder)):
            payload = Payload()
            if not self.is_first:
                payload.hidden = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(payload.hidden, self._rank_of(self.stage_id - 1))
            with without_dropout(*encoder):
                for layer in encoder:
                    payload = layer(payload, micro.of_instructions())
            if payload.memory is not None:
                encoded.append(payload.memory.flatten())
            else:
                assert payload.hidden is not None
                dist.send(payload.hidden.contiguous(), self._rank_of(self.stage_id + 1))
        whole = torch.cat(encoded) if encoded else torch.empty(sum(sizes), dtype=dtype, device=device)
        if self.num_stages > 1:
            dist.broadcast(whole, source, group=self._grid.get_pipe_parallel_group())
        for micro, shape, part in zip(micros, shapes, whole.split(sizes), strict=True):
            micro.instruction = part.view(shape)

    def _rank_of(self, stage: int) -> int:
        """Global rank of a stage of this replica."""
        rank: Any = self._grid.stage_to_global(stage_id=stage)
        return int(rank)
