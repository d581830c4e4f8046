"""Instruction fusion: every encoder layer attends from its input tokens to the encoded instruction.

Paper, section 3.3: F_l = LayerNorm(S_l + MultiHeadAttention(Q = S_l, K = V = I)), S_l the residual stream after
self-attention. The pre-norm form, S_l + O·Attention(Norm(S_l), Norm(I)) with O = 0 at the start, begins as the
identity, so that a frozen backbone is not disturbed by an untrained part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ds.model.start import ONE, ZERO, Gather, Start


class FusionMemory(nn.Module):
    """Keys and values of one layer's fusion, computed once a distinct instruction."""

    def __init__(self, d_model: int, heads: int, head_width: int, epsilon: float) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.norm = nn.RMSNorm(d_model, eps=epsilon)
        self.k = nn.Linear(d_model, heads * head_width, bias=False)
        self.v = nn.Linear(d_model, heads * head_width, bias=False)

    def starts(self) -> dict[str, Start]:
        """T5's own scales."""
        scale = Start(std=self.k.in_features**-0.5)
        return {"norm.weight": ONE, "k.weight": scale, "v.weight": scale}

    def normalised(self, instruction: Tensor) -> Tensor:
        """(U, S, d) over its root mean square: the norm without its weight, which is the same in every layer."""
        return functional.rms_norm(instruction, (instruction.shape[-1],), eps=self.norm.eps)

    def forward(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised instructions (U, S, d) -> keys and values, each (U, heads, S, head width).

        The norm's weight goes into the projections', W·(g ⊙ x) = (W ⊙ g)·x: of an instruction that needs no gradient
        none is then computed, which would be a third of the operations, and all layers keep one tensor for their
        backward passes.
        """
        shape = (*normal.shape[:2], self.heads, self.head_width)
        keys, values = (functional.linear(normal, part.weight * self.norm.weight) for part in (self.k, self.v))
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)


class FusionLayer(nn.Module):
    """The attention of one layer's input tokens to the instruction.

    Args:
        norm: ``pre`` or ``post`` (the paper's form, which has no start as the identity).
    """

    def __init__(self, d_model: int, heads: int, head_width: int, epsilon: float, norm: str) -> None:
        super().__init__()
        self.heads, self.head_width, self.post = heads, head_width, norm == "post"
        self.norm = nn.RMSNorm(d_model, eps=epsilon)
        self.q = nn.Linear(d_model, heads * head_width, bias=False)
        self.o = nn.Linear(heads * head_width, d_model, bias=False)

    def starts(self) -> dict[str, Start]:
        """T5's own scales; a zero output projection in the pre-norm form."""
        output = Start(std=self.o.in_features**-0.5) if self.post else ZERO
        query = Start(std=(self.q.in_features * self.head_width) ** -0.5)
        return {"norm.weight": ONE, "q.weight": query, "o.weight": output}

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """One fusion step; the tokens of a run of examples of one task attend as one sequence.

        Args:
            hidden: (N, L, d), S_l.
            keys, values: (R, heads, S, head width), of R runs of N / R examples each.
            mask: (R, S), 1 on real instruction tokens.

        Returns:
            (N, L, d), F_l.
        """
        query = self.q(hidden if self.post else self.norm(hidden))
        query = query.view(keys.shape[0], -1, self.heads, self.head_width).transpose(1, 2)
        # Scores are not scaled: T5 folds the factor into its weights, whose values these projections may start from.
        attended = functional.scaled_dot_product_attention(
            query, keys.to(query.dtype), values.to(query.dtype), attn_mask=mask[:, None, None, :].bool(), scale=1.0
        )
        update = self.o(attended.transpose(1, 2).reshape(*hidden.shape[:2], -1))
        return self.norm(hidden + update) if self.post else hidden + update


class Fusion(nn.Module):
    """The fusion parts of all encoder layers.

    Args:
        blocks: dotted names of the encoder's blocks, in order.
        d_model, heads, head_width, epsilon: widths and the norm's epsilon, as the backbone's.
        norm: ``pre`` or ``post``.
    """

    def __init__(
        self, blocks: list[str], d_model: int, heads: int, head_width: int, epsilon: float, norm: str = "pre"
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.memories = nn.ModuleList(FusionMemory(d_model, heads, head_width, epsilon) for _ in blocks)
        self.layers = nn.ModuleList(FusionLayer(d_model, heads, head_width, epsilon, norm) for _ in blocks)

    @torch.no_grad()
    def start_from(
        self, self_attentions: list[nn.Module], norms: list[nn.Module], gather: Gather
    ) -> list[nn.Parameter]:
        """Copies each layer's own self-attention q, k, v and norm; the output projection is left as it is.

        Args:
            self_attentions, norms: the encoder's, a layer each.
            gather: makes sharded parameters whole; one layer's are at a time.

        Returns:
            The parameters that were written.

        Raises:
            ValueError: fewer fusion heads than the backbone has.
        """
        written: list[nn.Parameter] = []
        for memory, layer, attention, norm in zip(self.memories, self.layers, self_attentions, norms, strict=True):
            pairs: list[tuple[Any, Any]] = [(layer.q, attention.q), (memory.k, attention.k), (memory.v, attention.v)]
            if any(own.out_features != theirs.out_features for own, theirs in pairs):
                raise ValueError("fusion_start: backbone needs fusion_heads as many as the backbone's; use random")
            pairs.append((memory.norm, norm))
            if not layer.post:
                pairs.append((layer.norm, norm))
            with gather({id(part.weight): part.weight for pair in pairs for part in pair}.values()):
                for own, theirs in pairs:
                    own.weight.copy_(theirs.weight)
            written += [own.weight for own, _ in pairs]
        return written

    def forward(self, instruction: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(U, S, d) -> encoder block name -> (keys, values)."""
        normal = self.memories[0].normalised(instruction)  # type: ignore[operator]
        return {name: memory(normal) for name, memory in zip(self.blocks, self.memories, strict=True)}
