"""Ordinary PEFT LoRA adapters, one subfolder each, as a source of teachers.

Read from ``adapter_config.json`` and ``adapter_model.safetensors``; pickled weights are refused. What an adapter may
say beside plain LoRA (DoRA, patterns of ranks, trained biases) has no place in a store of (A, B) and is refused too,
and so is one that belongs to other base weights: some initialisations (PiSSA and its kin) take their B·A out of them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tagi_ds.errors import UserError
from tagi_ds.files import read_json, sha256_of
from tagi_ds.model.adapter import LowRank, Site

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
"""Settings of a LoRA, and the values with which it is a plain one."""
_UNCHANGED_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base weights as they are (peft 0.21)."""
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
"""Beginnings of those that change them, from which peft's `save_pretrained` makes plain LoRAs."""


class PeftFolder:
    """The adapters below a folder; an adapter's name is its subfolder's path in it.

    Opening it reads every adapter's settings and its tensors' shapes, not its tensors.

    Attributes:
        names: of the adapters, sorted.
        rank: r, the same for all.
        scaling: of the first; :meth:`factors` brings the others' B to it.
        sites: names of the adapted linears, sorted, the same for all.

    Raises:
        UserError: there is no adapter, one is damaged or no plain LoRA, or two differ in rank or sites.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob(CONFIG_FILE))
        if not self.names or self.names == ["."]:
            raise UserError(
                f"{folder} holds no PEFT adapters in subfolders",
                f"give the folder whose subfolders, named as the units, each hold {CONFIG_FILE} and {WEIGHTS_FILE}",
            )
        self._scaling: dict[str, float] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for name in self.names:
            self._admit(name)
        self.scaling = self._scaling[self.names[0]]
        self.sites = sorted(self._shapes)

    def __contains__(self, name: str) -> bool:
        """Whether there is an adapter of this name."""
        return name in self._scaling

    def factors(self, name: str) -> dict[str, LowRank]:
        """One adapter in fp32: site -> a (r, d_in), b (d_out, r), so that ΔW = `scaling` · B·A.

        Raises:
            UserError: the file is damaged.
        """
        ratio, keys = self._scaling[name] / self.scaling, self._keys(name)
        try:
            with safe_open(self.folder / name / WEIGHTS_FILE, framework="pt") as file:
                return {
                    site: LowRank(file.get_tensor(a).float(), file.get_tensor(b).float() * ratio)
                    for site, (a, b) in keys.items()
                }
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, error) from error

    def common_a(self) -> dict[str, torch.Tensor] | None:
        """Site -> A (r, d_in) where all adapters have the same; else None. Reads one adapter at a time."""
        first = {site: a for site, (a, _) in self.factors(self.names[0]).items()}
        for name in self.names[1:]:
            if not all(torch.equal(a, first[site]) for site, (a, _) in self.factors(name).items()):
                return None
        return first

    def digest(self) -> str:
        """Hex SHA-256 over all adapters' names, settings and weights."""
        digest = hashlib.sha256()
        for name in self.names:
            weights = sha256_of(self.folder / name / WEIGHTS_FILE)
            digest.update(f"{name}\0{self._scaling[name]!r}\0{weights}\n".encode())
        return digest.hexdigest()

    def require_sites(self, sites: Sequence[Site], rank: int) -> None:
        """Refuses adapters of other linears, shapes or rank.

        Raises:
            UserError: names what differs.
        """
        expected = {site.name: ((rank, site.d_in), (site.d_out, rank)) for site in sites}
        require_same_shapes(self.folder, self._shapes, expected)

    def _admit(self, name: str) -> None:
        path = self.folder / name / CONFIG_FILE
        config = read_json(path)
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise UserError(f"{path} does not describe a LoRA", "leave that adapter out")
        for setting, plain in _PLAIN.items():
            if config.get(setting) not in plain:
                raise UserError(
                    f"{path} has {setting} {config[setting]!r}: more than B·A", "leave out or retrain that adapter"
                )
        _require_unchanged_base(path, config.get("init_lora_weights"))
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise UserError(f"{path} names no rank r and lora_alpha", "write that adapter again with peft")
        self._scaling[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        shapes = self._read_shapes(name)
        _require_targets(path, config.get("target_modules"), shapes)
        if name == self.names[0]:
            self.rank, self._shapes = rank, shapes
        first = self.folder / self.names[0]
        if rank != self.rank:
            raise UserError(f"{path} has rank {rank}, {first} has {self.rank}", "keep adapters of one rank")
        require_same_shapes(self.folder / name, shapes, self._shapes, str(first))

    def _keys(self, name: str) -> dict[str, tuple[str, str]]:
        """Site -> names of A's and B's tensors."""
        path = self.folder / name / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(
                f"{path} is missing; adapters are read from safetensors alone",
                "save the adapter with save_pretrained(..., safe_serialization=True)",
            )
        sides: dict[str, dict[str, str]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # the file is no mapping
                    match = _KEY.fullmatch(key)
                    if match is None:
                        raise UserError(f"{path} holds {key}, which is no part of a plain LoRA", "leave it out")
                    sides.setdefault(match["site"], {})[match["side"]] = key
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, error) from error
        halves = sorted(site for site, keys in sides.items() if len(keys) < 2)
        if halves or not sides:
            raise UserError(f"{path} lacks A or B of {', '.join(halves[:3]) or 'every linear'}", "save it again")
        return {site: (keys["A"], keys["B"]) for site, keys in sorted(sides.items())}

    def _read_shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        keys = self._keys(name)
        with safe_open(self.folder / name / WEIGHTS_FILE, framework="pt") as file:
            return {
                site: (tuple(file.get_slice(a).get_shape()), tuple(file.get_slice(b).get_shape()))
                for site, (a, b) in keys.items()
            }

    def _damaged(self, name: str, error: Exception) -> UserError:
        return UserError(f"{self.folder / name / WEIGHTS_FILE} is damaged: {error}", "fetch or save it again")


def require_same_shapes(folder: Path, found: dict[str, Any], expected: dict[str, Any], whose: str = "this run") -> None:
    """Refuses factors whose sites, or whose shapes (of A, of B) at a site, are not the expected ones.

    Raises:
        UserError: names the first difference.
    """
    mend = "give adapters of this backbone with model.sites and model.rank as the run has them"
    for site in sorted(found.keys() ^ expected.keys()):
        verb, other = ("adapts", "does not") if site in found else ("does not adapt", "does")
        raise UserError(f"{folder} {verb} {site}, and {whose} {other}", mend)
    for site, shapes in found.items():
        if shapes != expected[site]:
            raise UserError(
                f"{folder}: A and B of {site} have the shapes {shapes}; those of {whose} have {expected[site]}", mend
            )


def _require_unchanged_base(path: Path, start: Any) -> None:
    """Refuses adapters whose base weights were changed when they began: with the backbone's, their B·A is another's."""
    name = start.lower() if isinstance(start, str) else start
    if name in _UNCHANGED_BASE:
        return
    problem = f"{path} has init_lora_weights {start!r}: its B·A belongs to base weights that this changed"
    if isinstance(name, str) and name.startswith(_CONVERTIBLE):
        raise UserError(
            problem,
            "write it as a plain LoRA: peft's save_pretrained(FOLDER, path_initial_model_for_weight_conversion="
            "UNTRAINED), UNTRAINED being the adapter saved before its training; the rank doubles. Or leave it out",
        )
    known = ", ".join(map(str, _UNCHANGED_BASE[1:]))
    raise UserError(problem, f"leave out or retrain that adapter; {known} change nothing")


def _require_targets(path: Path, targets: Any, sites: dict[str, Any]) -> None:
    """Refuses settings that belong to other weights."""

    def is_target(site: str) -> bool:
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, site) is not None
        return any(site == target or site.endswith(f".{target}") for target in targets)

    if not isinstance(targets, str | list) or not targets:
        raise UserError(f"{path} names no target_modules", "write that adapter again with peft")
    stray = [site for site in sites if not is_target(site)]
    if stray:
        raise UserError(
            f"{path} has target_modules {targets}, but its weights adapt {stray[0]}", "keep files that belong together"
        )
