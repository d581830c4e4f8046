"""In which type a model answers, and whether a whole copy of its weights finds room on one GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from tagi_ds.errors import UserError
from tagi_ds.model.weights import WeightFiles

Precision = Literal["fp32", "bf16"]
Asked = Literal["auto", "fp32", "bf16"]
"""`auto` is what the device computes in at full speed: see :func:`native_precision`."""

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def native_precision(device: torch.device) -> Precision:
    """bf16 on a GPU whose own units compute in it (NVIDIA's from Ampere on), fp32 elsewhere.

    Emulated bf16 is slower than fp32, and on processors answers stay what they are without a word about precision.
    """
    has_units = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_units else "fp32"


def weight_bytes(folders: Iterable[Path], precision: Precision) -> int:
    """Bytes of the weights of model folders once they are loaded; file headers alone are read.

    Raises:
        UserError: a folder holds no weights, or damaged ones.
    """
    # Published pickles hold the embeddings once a stack; a loaded model has them once.
    shapes = (
        shape
        for folder in folders
        for name, shape in WeightFiles(folder).shapes.items()
        if not name.endswith("embed_tokens.weight")
    )
    return sum(map(math.prod, shapes)) * DTYPES[precision].itemsize


def require_room(name: str, folders: Iterable[Path], precision: Precision, device: torch.device) -> None:
    """Refuses to load a model whose weights alone exceed what is free on its GPU; elsewhere nothing is asked.

    Args:
        name: of the model, for the error.
        folders: that hold its weights.
        precision: in which it is loaded.
        device: where the model is to answer.

    Raises:
        UserError: with what helps.
    """
    if device.type != "cuda":
        return
    needed = weight_bytes(folders, precision)
    free, total = torch.cuda.mem_get_info(device)
    if needed <= free:
        return
    ways = ["set evaluation.precision bf16, which takes half"] if precision == "fp32" and needed / 2 <= free else []
    ways.append("take GPUs with more memory: every process answers with a whole copy, however many there are")
    ways.append("python launchers/plan.py --stage evaluate --config RECIPE --cluster 1xH100 says what fits where")
    raise UserError(
        f"{name} has {needed / 1e9:.1f} GB of weights in {precision}, and {free / 1e9:.1f} of {total / 1e9:.1f} GB are "
        f"free on {device}",
        "; or ".join(ways),
    )
