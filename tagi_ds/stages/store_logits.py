"""The stage that stores the logit teacher's distribution at every training target.

Its ranks, and any number of jobs launched on the same run folder, share one list of shards: whoever is free takes the
next, and what a killed process held is taken over.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.build import load_study_tokenizer, study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.collate import TaskChunk
from tagi_ds.data.examples import Task
from tagi_ds.data.mixture import reference_of
from tagi_ds.engine.distributed import barrier
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.engine.profile import unit_done
from tagi_ds.engine.progress import Progress
from tagi_ds.errors import UserError
from tagi_ds.launch import Stage
from tagi_ds.teachers import logit_entries, logit_shards, logit_store
from tagi_ds.teachers.binding import MANIFEST, content_checksum, data_binding, read_manifest, teacher_binding
from tagi_ds.teachers.logit_teacher import (
    LogitTeacher,
    TeacherReader,
    load_teacher,
    shared_vocabulary,
    teacher_folder,
    teacher_hash,
)
from tagi_ds.teachers.work_list import WORK_FOLDER, WorkList

SHARD_EXAMPLES = 1024
"""Examples in a shard: what a killed run computes again at the most, for each rank."""

FIGURES = ("examples", "tokens", "entries_per_token", "bytes_per_token", "flops")


def run(stage: Stage) -> dict[str, Any]:
    """Computes what the store lacks and finishes it, together with the other jobs in the same run folder.

    What is in a shard depends neither on who computes it nor on interruptions.

    Returns:
        :data:`FIGURES` of the store, and "training_seconds" of this start.

    Raises:
        UserError: no teacher, one of another vocabulary, no data, or a folder that cannot be written.
    """
    config, ranks, folder = stage.config, stage.ranks, stage.run_dir / "store"
    began = time.monotonic()
    tokenizer, backbone = load_study_tokenizer(config), study_backbone(config)
    teacher = teacher_folder(config, backbone, tokenizer)
    tasks, _ = training_split(config.data, config.seed)
    form = _Form.of(config, shared_vocabulary(teacher, backbone))
    binding = {
        **data_binding(config.data, tasks, tokenizer),
        **teacher_binding(config.teachers),
        "teacher": teacher_hash(teacher, backbone),
        "logit_teacher": config.teachers.logit_teacher,
        "seed": config.seed,
    }
    header = {"binding": binding, **form.facts(), "temperature": config.teachers.temperature}
    settings = content_checksum({**header, "precision": config.engine.precision})
    shards = {folder / f"shard-{n:05d}.arrow": rows for n, rows in enumerate(plan_shards(tasks))}
    # A refused run leaves no list of work; from here on it is this run's folder.
    work = WorkList(stage.run_dir / WORK_FOLDER, config.teachers.claim_timeout_s)
    if ranks.is_main:
        _take_stock(stage, work, shards, settings)
    # Nobody takes work before it is known what is left.
    barrier()
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    _store(stage, work, lambda: load_teacher(teacher, backbone, dtype), tokenizer, tasks, shards, form, settings)
    if ranks.is_main:
        _finish(work, folder, shards, header, settings)
    barrier()
    manifest = read_manifest(folder, logit_store.FORMAT, logit_shards.COMMAND)
    figures = {name: manifest[name] for name in FIGURES}
    stage.say(
        f"store_logits: {figures['tokens']:,} target tokens of {figures['examples']:,} examples, "
        f"{figures['bytes_per_token']} bytes a token, in {folder}"
    )
    return {**figures, "training_seconds": round(time.monotonic() - began, 1)}


def plan_shards(tasks: Sequence[Task]) -> list[np.ndarray]:
    """All examples as rows (task, place in its examples), the longest first, cut into shards.

    Memory that does not suffice shows at once, and examples of like lengths come together.
    """
    parts = []
    for number, task in enumerate(tasks):
        lengths = np.fromiter((len(example.input) for example in task.examples), dtype=np.int64)
        places = np.arange(len(lengths))
        parts.append(np.stack([lengths + len(task.definition), np.full_like(places, number), places], axis=1))
    rows = np.concatenate(parts)
    rows = rows[np.argsort(-rows[:, 0], kind="stable"), 1:]
    return [rows[at : at + SHARD_EXAMPLES] for at in range(0, len(rows), SHARD_EXAMPLES)]


@dataclass(frozen=True)
class _Form:
    """What is kept of a distribution, and in which columns."""

    layout: logit_shards.Layout
    k: int
    temperature: float
    seed: int

    @classmethod
    def of(cls, config: RunConfig, vocabulary: int) -> _Form:
        teachers = config.teachers
        layout = logit_shards.Layout(teachers.method, teachers.store_dtype, vocabulary, teachers.draws)
        return cls(layout, min(teachers.top_k, vocabulary), teachers.temperature, config.seed)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        size = {"k": self.k} if self.layout.method == "topk" else {"draws": self.layout.draws}
        return {"method": self.layout.method, **size, "dtype": self.layout.dtype, "vocabulary": self.layout.vocabulary}

    def rows(self, logits: torch.Tensor, labels: torch.Tensor, example_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The store's rows for logits (N, T, V)."""
        if self.layout.method == "topk":
            entries = logit_entries.top_k(logits, self.k, self.temperature)
        else:
            entries = logit_entries.sampled(logits, labels, self.layout.draws, self.temperature, example_ids, self.seed)
        return logit_shards.rows_of(example_ids, labels, entries, self.layout)


def _take_stock(stage: Stage, work: WorkList, shards: Mapping[Path, np.ndarray], settings: str) -> None:
    """Brings the list in line with the store: what is whole is finished, what is damaged or missing open again."""
    for path in shards:
        # Asked first: a record that another job writes during the look is of a file that was written after it.
        finished = work.is_finished(path.stem)
        whole = logit_shards.is_whole(path, settings)
        if finished and not whole:
            work.reopen(path.stem)
        elif whole and not work.is_finished(path.stem):
            work.finish(path.stem, {})
    left = len(shards) - work.finished([path.stem for path in shards])
    stage.say(f"store_logits: {sum(map(len, shards.values()))} examples, {left} of {len(shards)} shards left")


def _store(
    stage: Stage,
    work: WorkList,
    load: Callable[[], LogitTeacher],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    shards: Mapping[Path, np.ndarray],
    form: _Form,
    settings: str,
) -> None:
    """Takes shards until there are none, whoever computes them; the teacher is loaded for the first."""
    config, device = stage.config, stage.ranks.device
    files = {path.stem: path for path in shards}
    reader, meter = TeacherReader(tokenizer, config.data, config.teachers.demonstrations, config.seed), FlopMeter()

    @functools.cache
    def teacher() -> LogitTeacher:
        loaded = load()
        loaded.model.to(device)
        loaded.meter = meter
        return loaded

    def done() -> int:
        return sum(len(places) for path, places in shards.items() if work.is_finished(path.stem))

    total = sum(map(len, shards.values()))
    with (
        contextlib.closing(work.take(list(files))) as turns,
        Progress("store_logits", total, start=done(), unit="example", show=stage.ranks.is_main) as bar,
    ):
        for item in turns:
            # From here on the store is not what its manifest says.
            (files[item].parent / MANIFEST).unlink(missing_ok=True)
            places, before, spent = shards[files[item]], done(), meter.flops
            rows: list[dict[str, Any]] = []
            for at in range(0, len(places), config.evaluation.batch_examples):
                part = places[at : at + config.evaluation.batch_examples]
                chunks = [_chunk(tasks[number], int(place), config.seed) for number, place in part]
                batch = reader.batch(chunks)
                batch.teacher["reading"] = reader.reading(chunks, batch)
                batch = batch.to(device)
                logits = teacher().logits(batch.teacher["reading"], batch.labels)
                rows.extend(form.rows(logits, batch.labels, batch.example_ids))
                bar.update(before + at + len(part))
                unit_done()
            logit_shards.write_shard(files[item], rows, settings, form.layout, meter.flops - spent)
            work.finish(item, {})
        bar.update(total)


def _finish(
    work: WorkList, folder: Path, shards: Mapping[Path, np.ndarray], header: Mapping[str, Any], settings: str
) -> None:
    """Writes the manifest, or waits for the job that does."""
    finishing = f"store-{settings[:12]}"
    is_finished = functools.partial(_is_finished, folder, header, {path.name for path in shards})
    with contextlib.closing(work.take([finishing], lambda _: is_finished())) as turns:
        for _ in turns:
            # What killed writers and an earlier, longer store left.
            for path in [*folder.glob(".*.part"), *folder.glob("shard-*")]:
                if path not in shards:
                    path.unlink(missing_ok=True)
            logit_store.finish(folder, list(shards), header)
            work.sweep([*(path.stem for path in shards), finishing])


def _is_finished(folder: Path, header: Mapping[str, Any], names: set[str]) -> bool:
    try:
        manifest = read_manifest(folder, logit_store.FORMAT, logit_shards.COMMAND)
    except UserError:
        return False
    return all(manifest.get(key) == value for key, value in header.items()) and manifest["shards"].keys() == names


def _chunk(task: Task, place: int, seed: int) -> TaskChunk:
    """One example under its task's definition, with its one training target."""
    example = task.examples[place]
    return TaskChunk(task, 0, (example,), (reference_of(example, seed),))
