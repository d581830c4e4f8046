"""Floating-point operations of a step, counted while the step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Formula = Callable[..., int]
"""Operations of a call, from its arguments and, as `out_val`, its result."""


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch's own table knows the GPU kernels of attention alone.
FORMULAS: dict[Any, Formula] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class FlopMeter:
    """Counts matrix products and attention of what runs inside `counting`, in this process."""

    def __init__(self) -> None:
        self.flops = 0
        self._by_shapes: dict[Hashable, int] = {}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts a region, forward and backward; values computed in it do not change."""
        with _Counting() as mode:
            yield
        self.flops += mode.flops

    @contextlib.contextmanager
    def counting_once(self, *shapes: Hashable) -> Iterator[None]:
        """Counts a region whose operations depend on nothing but `shapes`; for shapes seen before it is not slowed."""
        if shapes in self._by_shapes:
            yield
            self.flops += self._by_shapes[shapes]
            return
        before = self.flops
        with self.counting():
            yield
        self._by_shapes[shapes] = self.flops - before


class _Counting(TorchDispatchMode):
    """The count of torch's `FlopCounterMode`, with its formulas and without its tables by module.

    Those are what takes its time: it doubles that of a small model's step, this adds half.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._formulas: dict[Any, Formula | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._formulas:
            formula = FORMULAS.get(func._overloadpacket)
            if formula is None:
                # In inference mode torch hands over compositions, such as `linear`: what they consist of is counted.
                with self:
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            self._formulas[func] = formula
        out = func(*args, **kwargs)
        counted = self._formulas[func]
        if counted is not None:
            self.flops += counted(*args, **kwargs, out_val=out)
        return out
