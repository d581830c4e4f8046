"""Counting the operations of what would take hours: products and attention give zeros of the right shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tagi_ds.engine.flops import FORMULAS


class Uncomputed(TorchDispatchMode):
    """Inside it whatever :class:`tagi_ds.engine.flops.FlopMeter` counts is not computed; the meter is entered inside.

    For code whose way does not depend on the values, such as answers of a fixed length.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in FORMULAS:
            return func(*args, **kwargs)
        on_meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        shapes = func(*on_meta[0], **on_meta[1])
        return tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), shapes)
