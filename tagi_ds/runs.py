"""Runs of a batch's examples that share a task."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def runs_of(task_index: Tensor) -> Tensor:
    """The tasks of a batch's examples by the longest runs of one length that cut it.

    That length g is the greatest common divisor of how many examples of one task follow each other: what a task
    implies is then applied to g examples at once. Waits for the device if the index is there.

    Args:
        task_index: (N,) int64.

    Returns:
        (N / g,) int64, on the same device.
    """
    lengths = torch.unique_consecutive(task_index.cpu(), return_counts=True)[1].tolist()
    return task_index[:: math.gcd(*lengths)] if lengths else task_index
