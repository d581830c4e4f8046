"""The label loss from all of the logits at once: what reading some rows at a time is held against."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tagi_ds.losses import IGNORE


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_pred: the summed negative log-likelihood of the target tokens, in nats.

    Args:
        logits: (N, T, V).
        labels: (N, T), -100 where nothing counts.
    """
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
