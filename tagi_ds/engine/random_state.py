"""State of the random generators of one process, stored without pickle."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tagi_ds.engine.disk import writing_told


def save_random_state(folder: Path, rank: int) -> list[Path]:
    """Writes the states of torch's (CPU and accelerator), numpy's and Python's generators into `folder`.

    Returns:
        The files.

    Raises:
        UserError: one cannot be written.
    """
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = legacy
    text = json.dumps({"python": random.getstate(), "numpy": [kind, keys.tolist(), position, has_gauss, gauss]})
    of_torch, others = folder / f"rng_{rank}.safetensors", folder / f"rng_{rank}.json"
    with writing_told(of_torch):
        save_file(tensors, of_torch)
    with writing_told(others):
        others.write_text(text, encoding="utf-8")
    return [of_torch, others]


def load_random_state(folder: Path, rank: int) -> None:
    """Takes the states over that `save_random_state` wrote."""
    tensors = load_file(folder / f"rng_{rank}.safetensors")
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    state = json.loads((folder / f"rng_{rank}.json").read_text(encoding="utf-8"))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def seed_anew(folder: Path, rank: int) -> None:
    """Seeds the generators where no saved state is this rank's, the same in every such start.

    The seed is drawn from rank 0's saved state, which differs between runs and steps, and the rank.
    """
    digest = hashlib.sha256(str(rank).encode())
    for name in ("rng_0.safetensors", "rng_0.json"):
        digest.update((folder / name).read_bytes())
    seed = int.from_bytes(digest.digest()[:4], "little")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
