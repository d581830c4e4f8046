"""The parameter store: one LoRA a teacher unit, read lazily from memory-mapped safetensors.

A folder with ``manifest.json``, ``common.safetensors`` (the A from which every teacher started) and one
``unit-*.safetensors`` a unit holding ``<site>.a`` (r, d_in) and ``<site>.b`` (d_out, r), in fp32. Readers map the file
of the unit that is asked for and let it go again: their memory does not grow with the store.

The factorisation of an update is not unique, (A, B) and (AM, M⁻¹B) are the same, so the manifest's ``gauge`` says whose
A the teachers have: ``frozen``, all the common one; ``trained``, each its own that began as the common one; ``own``,
unrelated ones (imported adapters), and then there is no common A.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from tagi_ds.errors import UserError
from tagi_ds.files import sha256_of, whole_file
from tagi_ds.model.adapter import LowRank
from tagi_ds.teachers.binding import damaged_files, read_manifest, require_fit, write_manifest

FORMAT = "tagi_ds parameter store 3"
EARLIER = "tagi_ds parameter store 2"
"""Still read. It is bound to a data set as a whole, `dataset`, where the present one is bound to what its teachers read
of it, `inputs`; and it names how many demonstrations an instruction had, which no teacher reads."""
COMMAND = "launchers/train_teachers.py"
COMMON = "common.safetensors"
HEADER = "tagi_ds"
Gauge = Literal["frozen", "trained", "own"]


def unit_file(unit: str) -> str:
    """File name of a unit: readable where the name allows it, unique always."""
    readable = "".join(c if c.isalnum() and c.isascii() else "-" for c in unit)[:48]
    return f"unit-{readable}-{hashlib.sha256(unit.encode()).hexdigest()[:12]}.safetensors"


def write_common(folder: Path, start: Mapping[str, Tensor]) -> None:
    """Writes the A (r, d_in) by site from which every teacher of the store starts."""
    with whole_file(folder / COMMON) as aside:
        aside.write_bytes(save({f"{site}.a": a.contiguous() for site, a in start.items()}))


def write_unit(folder: Path, unit: str, factors: Mapping[str, LowRank], figures: Mapping[str, Any]) -> Path:
    """Writes one teacher, whole or not at all; equal arguments give equal bytes.

    Args:
        folder: the store.
        unit: its name.
        factors: site -> a (r, d_in), b (d_out, r).
        figures: JSON-able facts about the training, kept in the file's header.
    """
    tensors = {}
    for site, (a, b) in factors.items():
        tensors[f"{site}.a"], tensors[f"{site}.b"] = (x.detach().float().contiguous().cpu() for x in (a, b))
    # One key: safetensors writes several in an order that differs between processes.
    header = {HEADER: json.dumps({"unit": unit, "content": _content(tensors), **figures}, sort_keys=True)}
    path = folder / unit_file(unit)
    with whole_file(path) as aside:
        # safetensors' own files would be readable by their writer alone, whatever the umask.
        aside.write_bytes(save(tensors, header))
    return path


def read_unit_figures(path: Path) -> dict[str, Any]:
    """The header of a unit's file, after its tensors were compared with the checksum in it.

    Raises:
        UserError: the file is missing or damaged.
    """
    mend = f"delete it and run {COMMAND} again"
    try:
        with safe_open(path, framework="pt") as file:
            figures = json.loads((file.metadata() or {})[HEADER])
        intact = figures.pop("content") == _content(load_file(path))
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged or missing: {error}", mend) from error
    if not intact:
        raise UserError(f"{path} is damaged: its tensors are not those that were written", mend)
    return figures


def finish(
    folder: Path, units: Mapping[str, Mapping[str, Any]], header: Mapping[str, Any], left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes the manifest, which makes the store complete.

    Args:
        folder: the store.
        units: name -> figures; ``aligned`` says whether the unit takes part in the alignment.
        header: binding, gauge, rank, scaling, sites and whatever else describes the store. A list ``unbound`` names
            fields of a run that such a store cannot be compared with.
        left_out: units that have no teacher by choice (``teachers.max_units``).

    Returns:
        The manifest.
    """
    aligned = [unit for unit, figures in units.items() if figures["aligned"]]
    table = {}
    for unit, figures in units.items():
        path = folder / unit_file(unit)
        table[unit] = {"file": path.name, "sha256": sha256_of(path), "size": path.stat().st_size, **figures}
    squares = dict.fromkeys(header["sites"], 0.0)
    for unit in aligned:
        with safe_open(folder / unit_file(unit), framework="pt") as file:
            for site in squares:
                a, b = file.get_tensor(f"{site}.a").double(), file.get_tensor(f"{site}.b").double()
                squares[site] += float(((b.T @ b) * (a @ a.T)).sum()) * header["scaling"] ** 2 / len(aligned)
    manifest = {
        "format": FORMAT,
        "dtype": "float32",
        **header,
        "mean_square": squares,
        "common": None if header["gauge"] == "own" else {"file": COMMON, "sha256": sha256_of(folder / COMMON)},
        "units": table,
        "left_out": sorted(left_out),
    }
    write_manifest(folder, manifest)
    return manifest


def checksums(manifest: Mapping[str, Any]) -> dict[str, str]:
    """File name -> hex SHA-256, for all files that a manifest lists."""
    return {entry["file"]: entry["sha256"] for entry in (manifest["common"], *manifest["units"].values()) if entry}


class ParameterStore:
    """Reads a finished store.

    Opening it looks at every file's presence and size; a file's checksum is compared at its first use.

    Args:
        folder: the store.
        binding: fields that must agree with the run's: backbone, tokenizer, prompt, unit, sites, and the fingerprint of
            the inputs, beside that of the data set for stores of the :data:`EARLIER` format.

    Raises:
        UserError: unfinished, incomplete, or bound to something else.
    """

    def __init__(self, folder: Path, binding: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, FORMAT, COMMAND, [EARLIER])
        of_another_time = "dataset" if self.manifest["format"] == FORMAT else "inputs"
        unbound = (of_another_time, *self.manifest.get("unbound", ()))
        expected = {key: value for key, value in (binding or {}).items() if key not in unbound}
        require_fit(folder, self.manifest["binding"], expected, COMMAND)
        self.sites: list[str] = self.manifest["sites"]
        self.rank: int = self.manifest["rank"]
        self.scaling: float = self.manifest["scaling"]
        self.gauge: Gauge = self.manifest["gauge"]
        self.mean_square: dict[str, float] = self.manifest["mean_square"]
        self._checked: set[str] = set()
        for entry in self.manifest["units"].values():
            path = folder / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["size"]:
                raise _damaged(path)

    def __contains__(self, unit: str) -> bool:
        """Whether the unit has a teacher that takes part in the alignment."""
        return bool(self.manifest["units"].get(unit, {}).get("aligned"))

    def accounts_for(self, unit: str) -> bool:
        """Whether the store has the unit's teacher, or says that it has none by choice."""
        return unit in self.manifest["units"] or unit in self.manifest["left_out"]

    def common_a(self) -> dict[str, Tensor]:
        """Site -> the A (r, d_in) from which every teacher started.

        Raises:
            UserError: the file is missing or damaged, or the teachers never had a common A.
        """
        if self.manifest["common"] is None:
            raise UserError(
                f"the teachers in {self.folder} have no common A",
                f"train teachers with {COMMAND}, or set model.a generated",
            )
        with safe_open(self._verified(COMMON, self.manifest["common"]["sha256"]), framework="pt") as file:
            return {site: file.get_tensor(f"{site}.a") for site in self.sites}

    def read(self, units: Sequence[str]) -> tuple[dict[str, LowRank], Tensor]:
        """The teachers of U units.

        Returns:
            site -> a (U, r, d_in), b (U, d_out, r), zeros where the store has no such unit, and present (U,) bool;
            an empty mapping where it has none of them.

        Raises:
            UserError: a unit's file is missing or damaged.
        """
        taught = {unit: self.factors(unit) for unit in dict.fromkeys(units) if unit in self}
        present = torch.tensor([unit in taught for unit in units], dtype=torch.bool)
        if not taught:
            return {}, present
        absent = {
            site: LowRank(torch.zeros_like(a), torch.zeros_like(b))
            for site, (a, b) in next(iter(taught.values())).items()
        }
        factors = {}
        for site in self.sites:
            rows = [taught.get(unit, absent)[site] for unit in units]
            factors[site] = LowRank(torch.stack([row.a for row in rows]), torch.stack([row.b for row in rows]))
        return factors, present

    def factors(self, unit: str) -> dict[str, LowRank]:
        """One teacher, aligned or not: site -> a (r, d_in), b (d_out, r).

        Raises:
            UserError: its file is missing or damaged.
        """
        entry = self.manifest["units"][unit]
        with safe_open(self._verified(entry["file"], entry["sha256"]), framework="pt") as file:
            return {site: LowRank(file.get_tensor(f"{site}.a"), file.get_tensor(f"{site}.b")) for site in self.sites}

    def _verified(self, name: str, checksum: str) -> Path:
        """The path of a file whose checksum was compared once in this process."""
        if name not in self._checked:
            if damaged_files(self.folder, {name: checksum}):
                raise _damaged(self.folder / name)
            self._checked.add(name)
        return self.folder / name


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is missing or damaged", f"delete it and run {COMMAND} again")


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
