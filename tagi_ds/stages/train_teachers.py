"""The stage that trains task-specific LoRA teachers into a parameter store.

Its ranks, and any number of jobs launched on the same run folder, share one list of work: whoever is free takes the
next group of teachers, and what a killed process held is taken over.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tagi_ds.build import study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.data.collate import Collator
from tagi_ds.engine.distributed import barrier
from tagi_ds.engine.exhaustion import memory_told
from tagi_ds.engine.profile import unit_done
from tagi_ds.engine.progress import Progress
from tagi_ds.errors import UserError
from tagi_ds.files import read_json, write_json
from tagi_ds.launch import Stage
from tagi_ds.model.backbone import load_backbone, recompute_blocks
from tagi_ds.teachers import parameter_store, report
from tagi_ds.teachers.binding import MANIFEST, read_manifest
from tagi_ds.teachers.lora import train_group
from tagi_ds.teachers.plan import Plan, make_plan
from tagi_ds.teachers.units import Unit
from tagi_ds.teachers.work_list import WORK_FOLDER, WorkList

TABLE_FILE = "teachers.json"


def run(stage: Stage) -> dict[str, Any]:
    """Trains what the store lacks and finishes it, together with the other jobs in the same run folder.

    Teachers that an earlier start of the same run left whole are kept. Groups are trained as a whole, so that a
    teacher's bytes depend neither on who trains it nor on what was interrupted.

    Returns:
        Figures of all teachers (of :func:`tagi_ds.teachers.report.summarise`), and "training_seconds" of this start.

    Raises:
        UserError: no backbone, no data, a warm start that does not fit, or a folder that cannot be written.
    """
    began = time.monotonic()
    with _joined(stage.run_dir / WORK_FOLDER, stage.config.teachers.claim_timeout_s) as work:
        plan = make_plan(stage.config)
        if stage.ranks.is_main:
            _take_stock(stage, work, plan)
        # Nobody takes work before it is known what is left.
        barrier()
        _train(stage, work, plan)
        if stage.ranks.is_main:
            _finish(stage, work, plan)
    barrier()
    summary = _summary(stage, read_json(stage.run_dir / TABLE_FILE))
    barrier()
    return {**summary, "training_seconds": round(time.monotonic() - began, 1)}


@contextlib.contextmanager
def _joined(folder: Path, timeout_s: float) -> Iterator[WorkList]:
    """The list of work. Its folder marks the run folder as taken; a run refused before it began leaves none."""
    work = WorkList(folder, timeout_s)
    try:
        yield work
    except UserError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _take_stock(stage: Stage, work: WorkList, plan: Plan) -> None:
    """Brings the list in line with the store: what is whole is finished, what is damaged or missing open again."""
    for item, group in plan.groups.items():
        # Asked first: a record that another job writes during the look is of files that were written after it.
        finished = work.is_finished(item)
        whole = all(_is_trained(stage.run_dir / "store", unit, plan.settings) for unit in group)
        if finished and not whole:
            work.reopen(item)
        elif whole and not work.is_finished(item):
            work.finish(item, {})
    left = len(plan.groups) - work.finished(list(plan.groups))
    stage.say(
        f"train_teachers: {len(plan.taught)} teachers of {len(plan.units)} units, "
        f"{left} of {len(plan.groups)} groups left"
        + (f"; {len(plan.warm.names)} start from {plan.warm.folder}" if plan.warm else "")
    )


def _is_trained(folder: Path, unit: Unit, settings: str) -> bool:
    try:
        figures = parameter_store.read_unit_figures(folder / parameter_store.unit_file(unit.name))
    except UserError:
        return False
    return figures.get("unit") == unit.name and figures.get("settings") == settings


def _train(stage: Stage, work: WorkList, plan: Plan) -> None:
    """Takes groups until there are none, whoever trains them."""
    steps, items = stage.config.teachers.steps, list(plan.groups)
    train = functools.cache(lambda: _trainer(stage, plan))
    with (
        contextlib.closing(work.take(items)) as turns,
        Progress("train_teachers", len(items) * steps, show=stage.ranks.is_main) as bar,
    ):
        for item in turns:
            group, done = plan.groups[item], work.finished(items)
            note = f"{done} of {len(items)} groups finished, one of {len(group)} teachers under way"

            def show(step: int, done: int = done, note: str = note) -> None:
                bar.update(done * steps + step, note)
                unit_done()

            # From here on the store is not what its manifest says.
            (stage.run_dir / "store" / MANIFEST).unlink(missing_ok=True)
            began = time.monotonic()
            with memory_told("train_teachers", stage.config.engine, memory_advice(stage.config)):
                taken = train()(group, show)
            work.finish(item, {"seconds": round(time.monotonic() - began, 3), "steps": taken})
        bar.update(len(items) * steps, f"{len(items)} of {len(items)} groups finished")


def _trainer(stage: Stage, plan: Plan) -> Any:
    """train(group, progress) -> unit -> steps taken, its teachers written; the backbone is loaded for the first."""
    config, folder = stage.config, stage.run_dir / "store"
    backbone = _backbone(stage)
    collator = Collator(plan.tokenizer, config.data, "input_only")
    scaling = config.model.alpha / config.model.rank

    def train(group: Sequence[Unit], progress: Any) -> dict[str, int]:
        results = train_group(
            backbone,
            plan.sites,
            group,
            collator,
            plan.start,
            scaling,
            config.teachers,
            config.seed,
            progress,
            plan.warm.factors if plan.warm else lambda _: None,
            config.engine.accumulation,
        )
        for result in results:
            figures = {name: value for name, value in vars(result).items() if name not in ("unit", "factors")}
            parameter_store.write_unit(folder, result.unit, result.factors, {**figures, "settings": plan.settings})
        return {result.unit: result.taken for result in results}

    return train


def _backbone(stage: Stage) -> PreTrainedModel:
    dtype = torch.bfloat16 if stage.config.engine.precision == "bf16" else torch.float32
    backbone = load_backbone(study_backbone(stage.config), dtype)
    backbone.to(stage.ranks.device)  # type: ignore[arg-type]
    if stage.config.engine.activation_checkpointing:
        recompute_blocks(backbone)
    return backbone.eval()


def memory_advice(config: RunConfig) -> str:
    """What to change where a group of teachers does not fit: first what the same run folder goes on with.

    Only the last changes what is learnt. Strategies other than `single` shard nothing here.
    """
    teachers, engine, steps = config.teachers, config.engine, []
    if engine.accumulation < teachers.batched * teachers.examples:
        steps.append(f"raise engine.accumulation above {engine.accumulation}: smaller micro-batches of a group's step")
    if not engine.activation_checkpointing:
        steps.append("set engine.activation_checkpointing true")
    if teachers.batched > 1:
        steps.append(f"lower teachers.batched below {teachers.batched}, in a new run folder: fewer teachers at once")
    steps.append("shorten data.max_source_tokens, in a new run folder")
    return "; or ".join(steps)


def _finish(stage: Stage, work: WorkList, plan: Plan) -> None:
    """Writes common A, manifest and table, or waits for the job that does, and shows the table."""
    folder = stage.run_dir / "store"
    header = _header(stage.config, plan)
    is_finished = functools.partial(_is_finished, stage.run_dir, header, [unit.name for unit in plan.taught])
    with contextlib.closing(work.take([plan.finishing], lambda _: is_finished())) as turns:
        for _ in turns:
            parameter_store.write_common(folder, plan.start)
            table = _table(stage.config, folder, plan)
            left_out = [unit.name for unit in plan.units[len(plan.taught) :]]
            _clean(folder, plan)
            seconds = _seconds(work, plan)
            write_json(stage.run_dir / TABLE_FILE, {name: {**row, **seconds[name]} for name, row in table.items()})
            parameter_store.finish(folder, table, header, left_out)
            work.sweep([*plan.groups, plan.finishing])
            full = read_json(stage.run_dir / TABLE_FILE)
            report.write_tensorboard(stage.run_dir / "tensorboard", full, _summary(stage, full))
    table = read_json(stage.run_dir / TABLE_FILE)
    stage.say(report.render(table, _summary(stage, table)))


def _summary(stage: Stage, table: dict[str, Any]) -> dict[str, Any]:
    return report.summarise(table, stage.config.teachers.examples, stage.config.model.rank)


def _header(config: RunConfig, plan: Plan) -> dict[str, Any]:
    return {
        "binding": plan.binding,
        "gauge": "trained" if config.teachers.train_a else "frozen",
        "sites": [site.name for site in plan.sites],
        "rank": config.model.rank,
        "scaling": config.model.alpha / config.model.rank,
        "seed": config.seed,
        "warm_start": plan.warm and plan.warm.digest,
        "trained_with": plan.settings,
        "settings": asdict(config.teachers),
    }


def _is_finished(run_dir: Path, header: dict[str, Any], names: Sequence[str]) -> bool:
    try:
        manifest = read_manifest(run_dir / "store", parameter_store.FORMAT, parameter_store.COMMAND)
    except UserError:
        return False
    fits = all(manifest.get(key) == value for key, value in header.items())
    return fits and manifest["units"].keys() == set(names) and (run_dir / TABLE_FILE).is_file()


def _table(config: RunConfig, folder: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """Unit -> figures, from the files' own headers, whichever process and start made them."""
    table = {}
    for unit in plan.taught:
        figures = parameter_store.read_unit_figures(folder / parameter_store.unit_file(unit.name))
        del figures["unit"], figures["settings"]
        table[unit.name] = {**figures, "aligned": report.is_aligned(figures, config.teachers)}
    return table


def _seconds(work: WorkList, plan: Plan) -> dict[str, dict[str, float | None]]:
    """Unit -> {"seconds": its part, by steps, of its group's time}; None where a killed process took it along."""
    seconds: dict[str, dict[str, float | None]] = {unit.name: {"seconds": None} for unit in plan.taught}
    for item in plan.groups:
        record = work.record(item)
        steps: dict[str, int] = record.get("steps", {})
        total = sum(steps.values())
        for name, taken in steps.items():
            seconds[name] = {"seconds": round(record["seconds"] * taken / max(1, total), 3)}
    return seconds


def _clean(folder: Path, plan: Plan) -> None:
    """Removes what killed writers left, and teachers of units that are no longer taught."""
    kept = {parameter_store.unit_file(unit.name) for unit in plan.taught}
    for path in [*folder.glob(".*.part"), *folder.glob("unit-*")]:
        if path.name not in kept:
            path.unlink(missing_ok=True)
