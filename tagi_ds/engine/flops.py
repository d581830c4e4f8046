"""Floating-point operations of a step, counted by torch while the step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's own table knows the GPU kernels of attention alone.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class FlopMeter:
    """Counts matrix products and attention of what runs inside `counting`, in this process."""

    def __init__(self) -> None:
        self.flops = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts a region, forward and backward; values computed in it do not change."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            yield
        self.flops += counter.get_total_flops()
