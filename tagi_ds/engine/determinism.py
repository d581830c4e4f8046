"""The same bits from the same run on CUDA, where some of torch's kernels add up in the order in which threads come."""

from __future__ import annotations

import os
from typing import Any

import torch

CUBLAS_WORKSPACE = ":4096:8"
"""cuBLAS's own choice for sums in one order: eight buffers of 4 MiB."""


def choose_kernels(deterministic: bool, device: torch.device) -> None:
    """Has torch take deterministic kernels alone, where `engine.deterministic` asks for that.

    On CPUs they are the same ones, so nothing is changed there. To be called before the first matrix product: cuBLAS
    looks at its variable once.

    Args:
        device: of this process.
    """
    if not deterministic or device.type != "cuda":
        return
    # A user's setting wins; torch refuses one that does not do.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    # Not as mere warnings: memory-efficient attention then keeps its fast backward pass, which is none of them.
    torch.use_deterministic_algorithms(True, warn_only=False)
    # It would fill every new tensor, against code that reads before it writes.
    setting: Any = torch.utils.deterministic
    setting.fill_uninitialized_memory = False
