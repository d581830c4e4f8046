"""The stage that trains task-specific LoRA teachers into a parameter store."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.build import load_study_tokenizer, study_backbone
from tagi_ds.config import RunConfig, TeacherConfig
from tagi_ds.data.collate import Collator
from tagi_ds.data.sni import training_split
from tagi_ds.engine.distributed import barrier
from tagi_ds.engine.progress import Progress
from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable, write_json
from tagi_ds.launch import Stage
from tagi_ds.model.adapter import Site, find_sites
from tagi_ds.model.backbone import content_hash, load_backbone
from tagi_ds.teachers import parameter_store
from tagi_ds.teachers.binding import MANIFEST, content_checksum, data_binding
from tagi_ds.teachers.lora import common_a, train_group
from tagi_ds.teachers.units import Unit, make_units

TRAINING_FIELDS = ("examples", "steps", "learning_rate", "train_a", "validation_share")
"""Settings that a trained teacher depends on; with others it is trained anew."""


def run(stage: Stage) -> dict[str, Any]:
    """Trains what the store lacks, groups of teachers dealt over the ranks, and finishes the store.

    Teachers that an earlier start of the same run left whole are kept.

    Returns:
        Figures of all teachers: {"teachers", "better", "loss_before", "loss_after", "exact_before", "exact_after",
        "steps", "examples", "flops"}, and "training_seconds" of this start.

    Raises:
        UserError: no backbone, no data, or a folder that cannot be written.
    """
    config, ranks, folder = stage.config, stage.ranks, stage.run_dir / "store"
    began = time.monotonic()
    tokenizer = load_study_tokenizer(config)
    tasks, _ = training_split(config.data, config.seed)
    units = make_units(tasks, config.teachers, config.seed)
    taught = units[: config.teachers.max_units]
    backbone = _backbone(stage)
    sites = find_sites(backbone, config.model.sites)
    binding = {
        **data_binding(config.data, tasks, tokenizer),
        "backbone": content_hash(study_backbone(config)),
        "unit": config.teachers.unit,
        "sites": [site.name for site in sites],
        "rank": config.model.rank,
    }
    settings = _settings(config, binding)
    if ranks.is_main:
        _prepare(folder, common_a(sites, config.model.rank, config.seed))
    barrier()
    groups = [taught[at : at + config.teachers.batched] for at in range(0, len(taught), config.teachers.batched)]
    # Whole groups, so that a resumed run trains each teacher in the company in which the unbroken run does.
    missing = [group for group in groups if not all(_is_trained(folder, unit, settings) for unit in group)]
    # Nobody writes before everybody has looked: all ranks must see the same work left.
    barrier()
    stage.say(
        f"train_teachers: {len(taught)} teachers of {len(units)} units, {len(missing)} of {len(groups)} groups left"
    )
    _train(stage, backbone, sites, missing, tokenizer, settings)
    barrier()
    summary: dict[str, Any] = {}
    if ranks.is_main:
        summary = _finish(stage, folder, taught, units, sites, binding)
    barrier()
    return {**summary, "training_seconds": round(time.monotonic() - began, 1)}


def _backbone(stage: Stage) -> PreTrainedModel:
    dtype = torch.bfloat16 if stage.config.engine.precision == "bf16" else torch.float32
    backbone = load_backbone(study_backbone(stage.config), dtype)
    backbone.to(stage.ranks.device)  # type: ignore[arg-type]
    return backbone.eval()


def _settings(config: RunConfig, binding: dict[str, Any]) -> str:
    teachers = {name: getattr(config.teachers, name) for name in TRAINING_FIELDS}
    facts = {"alpha": config.model.alpha, "seed": config.seed, "precision": config.engine.precision}
    return content_checksum({**binding, **teachers, **facts})


def _prepare(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Makes the store unfinished, and free of what a killed writer left."""
    ensure_writable(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    for leftover in folder.glob(".*.part"):
        leftover.unlink()
    parameter_store.write_common(folder, start)


def _is_trained(folder: Path, unit: Unit, settings: str) -> bool:
    try:
        figures = parameter_store.read_unit_figures(folder / parameter_store.unit_file(unit.name))
    except UserError:
        return False
    return figures.get("unit") == unit.name and figures.get("settings") == settings


def _train(
    stage: Stage,
    backbone: PreTrainedModel,
    sites: list[Site],
    groups: Sequence[list[Unit]],
    tokenizer: PreTrainedTokenizerBase,
    settings: str,
) -> None:
    config, ranks, folder = stage.config, stage.ranks, stage.run_dir / "store"
    steps, mine = config.teachers.steps, groups[ranks.rank :: ranks.world_size]
    collator = Collator(tokenizer, config.data, "input_only")
    start, scaling = common_a(sites, config.model.rank, config.seed), config.model.alpha / config.model.rank
    with Progress("train_teachers", len(mine) * steps, show=ranks.is_main) as bar:
        for number, group in enumerate(mine):
            note, done = f"group {number + 1}/{len(mine)} of {len(group)} teachers", number * steps

            def show(step: int, done: int = done, note: str = note) -> None:
                bar.update(done + step, note)

            results = train_group(backbone, sites, group, collator, start, scaling, config.teachers, config.seed, show)
            for result in results:
                figures = {name: value for name, value in vars(result).items() if name not in ("unit", "factors")}
                figures["settings"] = settings
                parameter_store.write_unit(folder, result.unit, result.factors, figures)
            if bar.done < done + steps:
                # Every teacher of the group was done before the last step.
                bar.update(done + steps, note)


def _finish(
    stage: Stage,
    folder: Path,
    taught: Sequence[Unit],
    units: Sequence[Unit],
    sites: list[Site],
    binding: dict[str, Any],
) -> dict[str, Any]:
    """Writes manifest, table and summary from the files' own headers, whichever rank and start made them."""
    config = stage.config
    table = {}
    for unit in taught:
        figures = parameter_store.read_unit_figures(folder / parameter_store.unit_file(unit.name))
        del figures["unit"], figures["settings"]
        table[unit.name] = {**figures, "aligned": is_aligned(figures, config.teachers)}
    header = {
        "binding": binding,
        "sites": [site.name for site in sites],
        "rank": config.model.rank,
        "scaling": config.model.alpha / config.model.rank,
        "seed": config.seed,
        "settings": asdict(config.teachers),
    }
    left_out = [unit.name for unit in units[len(taught) :]]
    parameter_store.finish(folder, table, header, left_out)
    write_json(stage.run_dir / "teachers.json", table)
    summary = _summary(table, config.teachers.examples)
    stage.say(_render(summary))
    return summary


def is_aligned(figures: dict[str, Any], config: TeacherConfig) -> bool:
    """Whether a teacher is good enough to be imitated.

    It learned something, gained `config.min_gain` nats a token on its validation share, and lost no exact match.
    """
    gain = figures["loss_before"] - figures["loss_after"]
    return figures["steps"] > 0 and gain >= config.min_gain and figures["exact_after"] >= figures["exact_before"]


def _summary(table: dict[str, dict[str, Any]], examples: int) -> dict[str, Any]:
    def mean(name: str) -> float:
        return round(sum(figures[name] for figures in table.values()) / len(table), 4)

    def total(name: str) -> int:
        return sum(figures[name] for figures in table.values())

    names = ("loss_before", "loss_after", "exact_before", "exact_after")
    return {
        "teachers": len(table),
        "better": total("aligned"),
        **{name: mean(name) for name in names},
        "steps": total("taken"),
        "examples": examples * total("taken"),
        "flops": total("flops"),
    }


def _rows(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "teachers", str(summary["teachers"])
    yield "better than the backbone", f"{summary['better']} ({100 * summary['better'] / summary['teachers']:.0f} %)"
    yield "validation loss, nats a token", f"{summary['loss_before']:.3f} → {summary['loss_after']:.3f}"
    yield "exact targets", f"{100 * summary['exact_before']:.1f} % → {100 * summary['exact_after']:.1f} %"
    yield "teacher steps", f"{summary['steps']:,}"


def _render(summary: dict[str, Any]) -> str:
    table = Table(title="teachers on their validation share", title_justify="left", show_header=False)
    for row in _rows(summary):
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue().rstrip()
