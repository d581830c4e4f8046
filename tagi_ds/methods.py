"""The related methods as configurations of the same parts (paper, Table 1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Which parts a method has.

    Attributes:
        fusion: the encoder attends to the encoded instruction in every layer.
        concatenate: the decoder sees the encoded instruction before the encoded input.
        pretraining: the hypernetwork is pretrained on text.
        distillation: KL and parameter alignment belong to the method.
    """

    fusion: bool
    concatenate: bool
    pretraining: bool
    distillation: bool


METHODS = {
    "tagi": Method(fusion=True, concatenate=True, pretraining=True, distillation=True),
    "hint": Method(fusion=False, concatenate=True, pretraining=True, distillation=False),
    "hypertuning": Method(fusion=False, concatenate=False, pretraining=True, distillation=False),
    "hypter": Method(fusion=False, concatenate=False, pretraining=False, distillation=False),
}
"""Meta-training (Tk-Instruct, T0) has no hypernetwork: it is the stage ``meta_train``."""
