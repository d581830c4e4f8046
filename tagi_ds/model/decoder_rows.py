"""A batch's rows in the decoder: caches, the task's part of them once a task, and one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache

from tagi_ds.model.adapter import LowRank, TaskState, add_low_rank
from tagi_ds.runs import runs_of

_FIRST_TOKENS = 16
_CROSS = "layer.1.EncDecAttention"


@torch.no_grad()
def input_cache(
    backbone: Any,
    memory: Tensor,
    mask: Tensor,
    owner: Tensor,
    state: TaskState | None = None,
    scaling: float = 1.0,
    concatenate: bool = False,
) -> EncoderDecoderCache:
    """transformers' cache for C rows of the decoder that read N inputs, whose keys and values are projected once each.

    Args:
        backbone, memory, mask, state, scaling, concatenate: as in :func:`tagi_ds.model.greedy.decode`.
        owner: (C,) int64, which input a row reads.

    Returns:
        What cross-attention takes; nothing yet of self-attention.
    """
    rows = DecoderRows(backbone, memory, mask, state, scaling, concatenate)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for at, layer in enumerate(rows.layers):
        keys, values = layer.inputs
        if concatenate:
            fronts = (rows.front[f"{layer.name}.{_CROSS}.{kind}"] for kind in "kv")
            keys, values = (
                torch.cat([front.repeat_interleave(len(own) // len(front), dim=0), own], dim=2)
                for front, own in zip(fronts, layer.inputs, strict=True)
            )
        cache.cross_attention_cache.update(keys[owner], values[owner], at)
        cache.is_updated[at] = True
    return cache


def project_instructions(backbone: Any, state: TaskState, scaling: float) -> None:
    """Keeps in `state` what the decoder's cross-attention makes of I, by the names of its k and v: once a task.

    Args:
        backbone, scaling: of the TAGI model, whose weights are its own.
        state: of U tasks; what it keeps already stays.
    """
    assert state.memory is not None
    kept = state.kept = {} if state.kept is None else state.kept
    for at, block in enumerate(backbone.decoder.block):
        for kind in ("k", "v"):
            name = f"decoder.block.{at}.{_CROSS}.{kind}"
            if name not in kept:
                module = getattr(block.layer[1].EncDecAttention, kind)
                memory = state.memory.to(module.weight.dtype)
                projected, factors = module(memory), state.adapters.get(name)
                kept[name] = projected if factors is None else add_low_rank(projected, memory, factors, scaling)


class DecoderRows:
    """A batch's rows in the decoder.

    Attributes:
        factors: of the decoder's sites, a row each run of the batch's rows.
        front: module name -> keys or values of I, (R, heads, S, head width); empty where it attends to F alone.
        padding, front_padding: what is added to the scores against F and I, (N, 1, 1, L) and (R, 1, 1, S), if anything.
    """

    def __init__(
        self, backbone: Any, memory: Tensor, mask: Tensor, state: TaskState | None, scaling: float, concatenate: bool
    ) -> None:
        self.decoder, self.head = backbone.decoder, backbone.lm_head
        self.state, self.scaling, self.concatenate, self.seen = state, scaling, concatenate, 0
        if state is not None and concatenate:
            project_instructions(backbone, state, scaling)
        self.owner = None if state is None else _owners(state, len(memory))
        self.padding = _additive(mask, memory.dtype)
        self.layers = [_Layer(f"decoder.block.{at}", block) for at, block in enumerate(self.decoder.block)]
        self._lay_out()
        for layer in self.layers:
            layer.read(self, memory)

    def step(self, tokens: Tensor) -> Tensor:
        """The next token's scores (N, vocabulary) after `tokens` (N,), but for a factor that some backbones have."""
        if self.seen % _FIRST_TOKENS == 0:
            longest = self.seen + _FIRST_TOKENS
            self.bias = self.layers[0].own.SelfAttention.compute_bias(longest, longest)
        hidden = self.decoder.embed_tokens(tokens[:, None])
        bias = self.bias[:, :, self.seen, None, : self.seen + 1]
        for layer in self.layers:
            hidden = layer.step(self, hidden, bias)
        self.seen += 1
        scores: Tensor = self.head(self.decoder.final_layer_norm(hidden))
        return scores[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows."""
        self.padding = None if self.padding is None else self.padding[rows]
        self.owner = None if self.owner is None else self.owner[rows]
        for layer in self.layers:
            layer.keep(rows)
        self._lay_out()

    def call(self, site: str, module: nn.Module, x: Tensor) -> Tensor:
        """A linear's output (N, 1, d_out) with its update."""
        output: Tensor = module(x)
        factors = self.factors.get(site)
        return output if factors is None else add_low_rank(output, x, factors, self.scaling)

    def _lay_out(self) -> None:
        """Takes what the rows' tasks imply, once for each run of rows."""
        self.factors: dict[str, LowRank] = {}
        self.front: dict[str, Tensor] = {}
        self.front_padding: Tensor | None = None
        if self.state is None or self.owner is None:
            return
        assert self.state.mask is not None
        laid = self.state.at(None if len(self.state.mask) == 1 else runs_of(self.owner))
        for site, (a, b) in self.state.adapters.items():
            if site.startswith("decoder."):
                self.factors[site] = LowRank(laid.select(a), laid.select(b))
        if self.concatenate:
            self.front_padding = _additive(laid.select(self.state.mask), self.decoder.embed_tokens.weight.dtype)
            for name, projected in (self.state.kept or {}).items():
                heads = self.layers[0].own.SelfAttention.n_heads
                self.front[name] = _by_heads(laid.select(projected), heads)


class _Layer:
    """One decoder block's steps and caches: keys and values of the tokens so far, and of F."""

    def __init__(self, name: str, block: Any) -> None:
        self.name = name
        self.own, self.cross, self.feed = block.layer[0], block.layer[1], block.layer[-1]
        self.heads: int = self.own.SelfAttention.n_heads
        self.tokens: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def read(self, rows: DecoderRows, memory: Tensor) -> None:
        """Projects F (N, L, d)."""
        attention = self.cross.EncDecAttention
        self.inputs = [
            _by_heads(rows.call(f"{self.name}.{_CROSS}.{kind}", getattr(attention, kind), memory), self.heads)
            for kind in ("k", "v")
        ]

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows."""
        self.tokens, self.inputs = [cache[rows] for cache in self.tokens], [cache[rows] for cache in self.inputs]

    def step(self, rows: DecoderRows, hidden: Tensor, bias: Tensor) -> Tensor:
        """One token of every row, (N, 1, d) -> (N, 1, d)."""
        hidden = self._attend_to_tokens(rows, hidden, bias)
        hidden = self._attend_to_inputs(rows, hidden)
        return self._feed_forward(rows, hidden)

    def _attend_to_tokens(self, rows: DecoderRows, hidden: Tensor, bias: Tensor) -> Tensor:
        attention, name, seen = self.own.SelfAttention, f"{self.name}.layer.0.SelfAttention", rows.seen
        x = self.own.layer_norm(hidden)
        query, *new = (_by_heads(rows.call(f"{name}.{k}", getattr(attention, k), x), self.heads) for k in "qkv")
        if seen == 0:
            self.tokens = [part.new_empty(*part.shape[:2], _FIRST_TOKENS, part.shape[3]) for part in new]
        elif seen == self.tokens[0].shape[2]:
            self.tokens = [torch.cat([cache, torch.empty_like(cache)], dim=2) for cache in self.tokens]
        for cache, part in zip(self.tokens, new, strict=True):
            cache[:, :, seen] = part[:, :, 0]
        keys, values = (cache[:, :, : seen + 1] for cache in self.tokens)
        mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)
        return hidden + rows.call(f"{name}.o", attention.o, mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _attend_to_inputs(self, rows: DecoderRows, hidden: Tensor) -> Tensor:
        attention, name = self.cross.EncDecAttention, f"{self.name}.{_CROSS}"
        query = _by_heads(rows.call(f"{name}.q", attention.q, self.cross.layer_norm(hidden)), self.heads)
        keys, values = self.inputs
        if rows.concatenate:
            front = rows.front[f"{name}.k"], rows.front[f"{name}.v"]
            mixed = _attend_to_both(query, front, rows.front_padding, (keys, values), rows.padding)
        else:
            mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=rows.padding, scale=1.0)
        return hidden + rows.call(f"{name}.o", attention.o, mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _feed_forward(self, rows: DecoderRows, hidden: Tensor) -> Tensor:
        name, dense = f"{self.name}.layer.2.DenseReluDense", self.feed.DenseReluDense
        x = self.feed.layer_norm(hidden)
        if hasattr(dense, "wi"):
            inner = dense.act(rows.call(f"{name}.wi", dense.wi, x))
        else:
            inner = dense.act(rows.call(f"{name}.wi_0", dense.wi_0, x)) * rows.call(f"{name}.wi_1", dense.wi_1, x)
        # transformers keeps this weight in float32 in half-precision models.
        return hidden + rows.call(f"{name}.wo", dense.wo, inner.to(dense.wo.weight.dtype))  # type: ignore[no-any-return]


def _attend_to_both(
    query: Tensor,
    front: tuple[Tensor, Tensor],
    front_padding: Tensor | None,
    own: tuple[Tensor, Tensor],
    padding: Tensor | None,
) -> Tensor:
    """Attention to [I ; F], where R runs of rows share I.

    Args:
        query: (N, heads, 1, width).
        front: keys and values (R, heads, S, width).
        front_padding: (R, 1, 1, S) or None.
        own: keys and values (N, heads, L, width).
        padding: (N, 1, 1, L) or None.

    Returns:
        (N, heads, 1, width).
    """
    runs, heads, length, width = front[0].shape
    rows = len(query)
    grouped = query.view(runs, rows // runs, heads, width).transpose(1, 2)  # (R, heads, n, width)
    before = grouped @ front[0].transpose(2, 3)
    if front_padding is not None:
        before = before + front_padding
    each = query @ own[0].transpose(2, 3)
    if padding is not None:
        each = each + padding
    scores = torch.cat([before.transpose(1, 2).reshape(rows, heads, 1, length), each], dim=-1)
    shares = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    first, second = shares.split([length, each.shape[-1]], dim=-1)
    mixed = first.reshape(runs, rows // runs, heads, length).transpose(1, 2) @ front[1]
    return mixed.transpose(1, 2).reshape(rows, heads, 1, width) + second @ own[1]


def _owners(state: TaskState, rows: int) -> Tensor:
    """(N,) which task each of N rows has."""
    assert state.mask is not None
    index = torch.arange(len(state.mask), device=state.mask.device) if state.index is None else state.index
    return index.repeat_interleave(rows // len(index))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(rows, length), 1 on what counts -> (rows, 1, 1, length) to be added to scores; None where all of it counts."""
    if bool(mask.all()):
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """(rows, length, heads * width) -> (rows, heads, length, width), in one piece."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2).contiguous()
