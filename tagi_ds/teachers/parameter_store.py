"""The parameter store: one LoRA a teacher unit, read lazily from memory-mapped safetensors.

A folder with ``manifest.json``, ``common.safetensors`` (the A from which every teacher started) and one
``unit-*.safetensors`` a unit holding ``<site>.a`` (r, d_in) and ``<site>.b`` (d_out, r).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tagi_ds.errors import UserError
from tagi_ds.files import sha256_of, whole_file, write_json
from tagi_ds.model.adapter import LowRank
from tagi_ds.teachers.binding import read_manifest, require_fit

FORMAT = "tagi_ds parameter store 1"
COMMAND = "launchers/train_teachers.py"
COMMON = "common.safetensors"


def unit_file(unit: str) -> str:
    """File name of a unit: readable where the name allows it, unique always."""
    readable = "".join(c if c.isalnum() else "-" for c in unit)[:48]
    return f"unit-{readable}-{hashlib.sha256(unit.encode()).hexdigest()[:12]}.safetensors"


def write_unit(folder: Path, unit: str, factors: Mapping[str, LowRank], metadata: Mapping[str, str]) -> Path:
    """Writes one teacher, whole or not at all.

    Args:
        folder: the store.
        unit: its name.
        factors: site -> a (r, d_in), b (d_out, r).
        metadata: figures of the training, as text; kept in the file's header.
    """
    tensors = {}
    for site, (a, b) in factors.items():
        tensors[f"{site}.a"], tensors[f"{site}.b"] = a.detach().contiguous().cpu(), b.detach().contiguous().cpu()
    path = folder / unit_file(unit)
    with whole_file(path) as aside:
        save_file(tensors, aside, {"unit": unit, **metadata})
    return path


def read_metadata(path: Path) -> dict[str, str]:
    """The header of a unit's file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or missing: {error}", f"delete it and run {COMMAND} again") from error


def finish(folder: Path, units: Mapping[str, dict[str, Any]], header: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest, which makes the store complete.

    Args:
        folder: the store.
        units: name -> figures; ``aligned`` says whether the unit takes part in the alignment.
        header: rank, scaling, sites, binding and whatever else describes the store.

    Returns:
        The manifest.
    """
    table, squares = {}, {site: 0.0 for site in header["sites"]}
    aligned = [unit for unit, figures in units.items() if figures["aligned"]]
    for unit, figures in units.items():
        path = folder / unit_file(unit)
        table[unit] = {"file": path.name, "sha256": sha256_of(path), **figures}
    for unit in aligned:
        with safe_open(folder / unit_file(unit), framework="pt") as file:
            for site in squares:
                a, b = file.get_tensor(f"{site}.a").double(), file.get_tensor(f"{site}.b").double()
                squares[site] += float(((b.T @ b) * (a @ a.T)).sum()) * header["scaling"] ** 2 / len(aligned)
    common = {"file": COMMON, "sha256": sha256_of(folder / COMMON)}
    manifest = {"format": FORMAT, **header, "mean_square": squares, "common": common, "units": table}
    write_json(folder / "manifest.json", manifest)
    return manifest


class ParameterStore:
    """Reads a finished store.

    Args:
        folder: the store.
        binding: fields that must agree with the run's: backbone, dataset, tokenizer, prompt, unit, sites.

    Raises:
        UserError: unfinished, or bound to something else.
    """

    def __init__(self, folder: Path, binding: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, FORMAT, COMMAND)
        require_fit(folder, self.manifest["binding"], binding or {}, COMMAND)
        self.sites: list[str] = self.manifest["sites"]
        self.rank: int = self.manifest["rank"]
        self.scaling: float = self.manifest["scaling"]
        self.mean_square: dict[str, float] = self.manifest["mean_square"]
        self._checked: set[str] = set()

    def __contains__(self, unit: str) -> bool:
        return bool(self.manifest["units"].get(unit, {}).get("aligned"))

    def common_a(self) -> dict[str, Tensor]:
        """Site -> the A (r, d_in) from which every teacher started."""
        with safe_open(self._verified(COMMON, self.manifest["common"]["sha256"]), framework="pt") as file:
            return {site: file.get_tensor(f"{site}.a") for site in self.sites}

    def read(self, units: Sequence[str]) -> tuple[dict[str, LowRank], Tensor]:
        """The teachers of U units.

        Returns:
            site -> a (U, r, d_in), b (U, d_out, r), zeros where the store has no such unit; and present (U,) bool.
        """
        found = [self._read_unit(unit) if unit in self else None for unit in units]
        present = torch.tensor([unit is not None for unit in found])
        example = next((unit for unit in found if unit is not None), None)
        if example is None:
            return {}, present
        factors = {}
        for site, (a, b) in example.items():
            rows = [unit[site] if unit is not None else LowRank(0 * a, 0 * b) for unit in found]
            factors[site] = LowRank(torch.stack([row.a for row in rows]), torch.stack([row.b for row in rows]))
        return factors, present

    def _read_unit(self, unit: str) -> dict[str, LowRank]:
        entry = self.manifest["units"][unit]
        with safe_open(self._verified(entry["file"], entry["sha256"]), framework="pt") as file:
            return {
                site: LowRank(file.get_tensor(f"{site}.a"), file.get_tensor(f"{site}.b")) for site in self.sites
            }

    def _verified(self, name: str, checksum: str) -> Path:
        """The path of a file whose checksum was compared once in this process."""
        path = self.folder / name
        if name not in self._checked:
            if not path.is_file() or sha256_of(path) != checksum:
                raise UserError(f"{path} is missing or damaged", f"delete it and run {COMMAND} again")
            self._checked.add(name)
        return path
