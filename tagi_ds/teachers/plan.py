"""What a run of LoRA teachers is to train, the same in every process of every job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tagi_ds.build import backbone_sites, load_study_tokenizer, study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.data.catalogue import training_split
from tagi_ds.model.adapter import Site
from tagi_ds.model.backbone import content_hash
from tagi_ds.teachers.bank import common_a
from tagi_ds.teachers.binding import content_checksum, input_binding
from tagi_ds.teachers.units import Unit, make_units
from tagi_ds.teachers.warm_start import WarmStart

TRAINING_FIELDS = ("examples", "steps", "learning_rate", "train_a", "validation_share", "patience", "look_every")
"""Settings that a trained teacher depends on; with others it is trained anew."""


@dataclass(frozen=True)
class Plan:
    """Units in groups, and all that a teacher depends on.

    Attributes:
        tokenizer: the backbone's.
        units: all; taught: those that get a teacher.
        groups: item of the work list -> the units that are trained together.
        sites: the adapted linears.
        binding: what the store is bound to.
        settings: checksum of all that a teacher depends on.
        start: site -> the common A (r, d_in).
        warm: what teachers start from, if anything.
    """

    tokenizer: PreTrainedTokenizerBase
    units: list[Unit]
    taught: list[Unit]
    groups: dict[str, list[Unit]]
    sites: list[Site]
    binding: dict[str, Any]
    settings: str
    start: dict[str, Tensor]
    warm: WarmStart | None

    @property
    def finishing(self) -> str:
        """The last item of the work list: the manifest and the table."""
        return f"store-{self.settings[:12]}"


def make_plan(config: RunConfig) -> Plan:
    """The plan of a run, without loading its backbone's weights.

    Raises:
        UserError: no backbone, no data, a task without a unit, or a warm start that does not fit.
    """
    teachers, scaling = config.teachers, config.model.alpha / config.model.rank
    tokenizer = load_study_tokenizer(config)
    tasks, _ = training_split(config.data, config.seed)
    units = make_units(tasks, teachers, config.seed)
    taught = units[: teachers.max_units]
    folder = study_backbone(config)
    sites = backbone_sites(folder, config.model.sites)
    warm = None
    if teachers.warm_start is not None:
        names = [unit.name for unit in taught]
        warm = WarmStart(Path(teachers.warm_start), sites, config.model.rank, scaling, teachers.train_a, names)
    binding = {
        **input_binding(config.data, tasks, tokenizer),
        "backbone": content_hash(folder),
        "unit": teachers.unit,
        "sites": [site.name for site in sites],
        "rank": config.model.rank,
    }
    facts = {"alpha": config.model.alpha, "seed": config.seed, "precision": config.engine.precision}
    chosen = {name: getattr(teachers, name) for name in TRAINING_FIELDS}
    settings = content_checksum({**binding, **chosen, **facts, "warm": warm and warm.digest})
    groups = {}
    for number, at in enumerate(range(0, len(taught), teachers.batched)):
        group = taught[at : at + teachers.batched]
        groups[f"{number:05d}-{content_checksum({settings: [unit.name for unit in group]})[:12]}"] = group
    start = (warm and warm.common) or common_a(sites, config.model.rank, config.seed)
    return Plan(tokenizer, units, taught, groups, sites, binding, settings, start, warm)
