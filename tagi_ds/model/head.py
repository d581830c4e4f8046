"""An output head that is read a few rows at a time, so that (N, T, V) logits never exist.

Losses want a few figures of every target position, not its V logits. A reader (:class:`Reader`) takes them from the
logits of some positions at a time, and knows their gradient. With respect to the logits it is the student's own
distribution times one number, but for the few tokens that label and teacher name. So the hidden states' gradient is
that number times the mean of the head's rows under that distribution, and a sum over the named rows. The forward pass
has the distribution at hand and takes the mean along; the numbers are known in the backward pass, which then needs no
logits. That is two products of the head's size, as with whole logits (three for a teacher at another temperature).

Where the weight trains too, or the teacher names all tokens, the backward pass computes the logits again: a product
more than with whole logits, against a gradient of the weight that would lie in memory from the forward pass on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

READ_KEYWORD = "read"
CHUNK_ELEMENTS = 2**24
"""Logits computed at once, 64 MiB in float32: enough rows for products and kernels at full speed, and little beside
what activations take."""


class Figures(NamedTuple):
    """What the losses are made of, at every position; zero where nothing is to be predicted.

    Attributes:
        label: (N, T) float32, the label's negative log-likelihood in nats.
        divergence: (N, T) float32, T²·KL(teacher || student) in nats; None without a teacher.
        right: (N, T) bool, whether the likeliest token is the label.
    """

    label: Tensor
    divergence: Tensor | None
    right: Tensor


class Chunk(NamedTuple):
    """What is read of R positions.

    Attributes:
        values: (F, R) float32, the figures.
        right: (R,) bool, whether the likeliest token is the label.
        others: distributions (R, V) of whose multiples the gradient of the logits consists, but for a few tokens.
        kept: what :meth:`Reader.pull` needs to know, each with R as its first dimension.
    """

    values: Tensor
    right: Tensor
    others: Sequence[Tensor]
    kept: Sequence[Tensor]


class Pull(NamedTuple):
    """The gradient of the logits of R positions: Σ_j factors_j · others_j, and numbers to add at some tokens.

    Attributes:
        factors: (R,) float32 for each of a chunk's `others`.
        places: (R, K) int64 token ids.
        numbers: (R, K) float32.
    """

    factors: Sequence[Tensor]
    places: Tensor
    numbers: Tensor


class Reader(Protocol):
    """Takes figures from logits, some positions at a time, and knows their gradient.

    Attributes:
        shape: (N, T).
        positions: (M,) int64, which of the N·T positions count.
        sparse: whether the gradient is all in :meth:`pull`; else it is had of :meth:`gradient` alone.
    """

    shape: torch.Size
    positions: Tensor
    sparse: bool

    def read(self, logits: Tensor, part: slice) -> Chunk:
        """The figures of the positions `part` of `positions`, from their logits (R, V), which may be overwritten."""

    def pull(self, kept: Sequence[Tensor], part: slice, grads: Tensor) -> Pull:
        """The gradient, from what :meth:`read` kept and the figures' gradients (F, R)."""

    def gradient(self, logits: Tensor, part: slice, grads: Tensor) -> Tensor:
        """(R, V) float32, the gradient as a whole; the logits (R, V) may be overwritten."""


class ReadingHead(nn.Linear):
    """An output head without bias that gives logits, or what a reader takes from them."""

    @classmethod
    def instead_of(cls, head: nn.Module) -> None:
        """Turns a linear into this class.

        The module stays the same: its parameter, which may be tied or sharded, its hooks and its names.

        Raises:
            TypeError: it is no linear, or has a bias.
        """
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise TypeError(f"an output head is a linear without bias, not {head}")
        head.__class__ = cls

    handed: Reader | None = None
    """The reader of the forward pass under way, for models whose own forward knows of none."""

    def forward(self, input: Tensor, read: Reader | None = None) -> Any:
        """Logits (N, T, V) of hidden states (N, T, d); with a reader its :class:`Figures` instead."""
        read = self.handed if read is None else read
        if read is None:
            return super().forward(input)
        wanted = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        values, right = _Read.apply(input, self.weight, read, wanted)
        return Figures(values[0], values[1] if len(values) > 1 else None, right)


def accept_reader(model: nn.Module, head: nn.Module) -> None:
    """Lets an ordinary seq2seq model take a reader: ``model(..., read=reader)`` returns its :class:`Figures`.

    The model is then given no labels beside it, of which it would take a loss of its own from logits.

    Args:
        model: that is called; a wrapper such as peft's where there is one.
        head: its output head, which becomes a :class:`ReadingHead`.
    """
    ReadingHead.instead_of(head)

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        head.handed = kwargs.pop(READ_KEYWORD, None)
        return args, kwargs

    def leave(_: nn.Module, args: tuple, output: Any) -> Any:
        # Without an output the pass has failed.
        figures = None if head.handed is None or output is None else output.logits
        head.handed = None  # type: ignore[assignment]
        return figures

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)


class _Read(torch.autograd.Function):
    """Figures (F, N, T) and `right` (N, T) of hidden states (N, T, d) and the head's weight (V, d)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, reader: Reader, wanted: bool) -> tuple[Tensor, Tensor]:
        rows = hidden.flatten(0, 1)[reader.positions]
        ctx.reader, ctx.ahead = reader, wanted and reader.sparse and not weight.requires_grad
        chunks: list[Chunk] = []
        means: list[list[Tensor]] = []
        for part in _parts(len(rows), len(weight)):
            chunk = reader.read(rows[part] @ weight.mT, part)
            means.append([others.to(weight.dtype) @ weight for others in chunk.others] if ctx.ahead else [])
            # `others` are as large as the logits were.
            chunks.append(chunk._replace(others=()))
        kept = _joined([chunk.kept for chunk in chunks])
        ctx.kept = len(kept)
        ctx.save_for_backward(weight, *([*kept, *_joined(means)] if ctx.ahead else [rows]))
        right = _spread(torch.cat([chunk.right for chunk in chunks]), reader)
        ctx.mark_non_differentiable(right)
        return _spread(torch.cat([chunk.values for chunk in chunks], -1), reader), right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        reader: Reader = ctx.reader
        of_values = grads[0].flatten(1)[:, reader.positions]
        of_weight = None
        if ctx.ahead:
            of_rows = _from_means(reader, weight, saved[: ctx.kept], saved[ctx.kept :], of_values)
        else:
            of_rows, of_weight = _again(reader, saved[0], weight, of_values)
        whole = of_rows.new_zeros(reader.shape.numel(), weight.shape[1]).index_copy_(0, reader.positions, of_rows)
        return whole.view(*reader.shape, -1), of_weight, None, None


def _from_means(
    reader: Reader, weight: Tensor, kept: Sequence[Tensor], means: Sequence[Tensor], grads: Tensor
) -> Tensor:
    """(M, d), the gradient of the hidden states, without any logits."""
    factors, places, numbers = reader.pull(kept, slice(0, len(reader.positions)), grads)
    named = functional.embedding_bag(places, weight, per_sample_weights=numbers.to(weight.dtype), mode="sum")
    for factor, mean in zip(factors, means, strict=True):
        named = named + factor[:, None] * mean
    return named.to(weight.dtype)


def _again(reader: Reader, rows: Tensor, weight: Tensor, grads: Tensor) -> tuple[Tensor, Tensor | None]:
    """(M, d) and (V, d), the gradients of the hidden states and of the head, from logits computed once more."""
    of_rows = torch.empty_like(rows)
    # Summed over the chunks in float32 whatever the model's type.
    of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    trains = weight.requires_grad
    for part in _parts(len(rows), len(weight)):
        gradient = reader.gradient(rows[part] @ weight.mT, part, grads[:, part]).to(weight.dtype)
        of_rows[part] = gradient @ weight
        if trains:
            of_weight += gradient.mT @ rows[part]
    return of_rows, of_weight.to(weight.dtype) if trains else None


def _parts(rows: int, vocabulary: int) -> Iterator[slice]:
    """Chunks of rows; one of none where there are no rows."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for first in range(0, max(rows, 1), size):
        yield slice(first, min(first + size, rows))


def _joined(chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _spread(found: Tensor, reader: Reader) -> Tensor:
    """(..., M) -> (..., N, T), zero where nothing counts."""
    whole = found.new_zeros((*found.shape[:-1], reader.shape.numel()))
    return whole.index_copy_(-1, reader.positions, found).unflatten(-1, reader.shape)
