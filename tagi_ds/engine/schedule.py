"""Learning rate as a closed form of the step, so that every strategy and every resumed run agrees."""

from __future__ import annotations

import math

from tagi_ds.config import OptimizerConfig


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps over which the rate rises: the configured share of all, rounded."""
    return round(config.warmup * total_steps)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of one optimizer step.

    Args:
        step: steps taken before this one, 0 .. total_steps - 1.
        total_steps: steps of the whole run.

    The warmup ends at the peak; `linear` and `cosine` then fall towards 0, which they would reach at `total_steps`.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - share)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
    return config.learning_rate
