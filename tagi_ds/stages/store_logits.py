"""The stage that stores the logit teacher's distribution at every training target."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.build import load_study_tokenizer, study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Example, Task
from tagi_ds.data.mixture import reference_of
from tagi_ds.data.sni import training_split
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.engine.distributed import barrier
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.engine.progress import Progress
from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable, read_json
from tagi_ds.launch import Stage
from tagi_ds.model.backbone import content_hash, load_backbone, resolve_folder
from tagi_ds.teachers import logit_store
from tagi_ds.teachers.binding import MANIFEST, content_checksum, data_binding, tokenizer_hash

SHARD_EXAMPLES = 1024
"""Examples in a shard: what a killed run computes again at the most, for each rank."""

Pair = tuple[Task, Example]


def run(stage: Stage) -> dict[str, Any]:
    """Computes the shards that the store lacks, dealt over the ranks, and finishes the store.

    What is in a shard depends neither on the number of ranks nor on interruptions.

    Returns:
        {"examples", "tokens", "bytes_per_token", "flops"} of the store, and "training_seconds" of this start.

    Raises:
        UserError: no teacher, one of another vocabulary, no data, or a folder that cannot be written.
    """
    config, ranks, folder = stage.config, stage.ranks, stage.run_dir / "store"
    began = time.monotonic()
    tokenizer = load_study_tokenizer(config)
    source = _teacher_folder(config, tokenizer)
    tasks, _ = training_split(config.data, config.seed)
    k = min(config.teachers.top_k, _shared_vocabulary(config, source))
    header = {
        "binding": {
            **data_binding(config.data, tasks, tokenizer),
            "temperature": config.teachers.temperature,
            "teacher": content_hash(source),
            "seed": config.seed,
        },
        "k": k,
        "temperature": config.teachers.temperature,
        "dtype": config.teachers.store_dtype,
    }
    settings = content_checksum({**header, "precision": config.engine.precision})
    shards = {folder / f"shard-{n:05d}.arrow": part for n, part in enumerate(plan_shards(tasks))}
    if ranks.is_main:
        _prepare(folder)
    barrier()
    missing = [path for path in shards if not logit_store.is_whole(path, settings)]
    # Nobody writes before everybody has looked: all ranks must see the same work left.
    barrier()
    stage.say(f"store_logits: {sum(map(len, shards.values()))} examples, {len(missing)} of {len(shards)} shards left")
    mine = {path: shards[path] for path in missing[ranks.rank :: ranks.world_size]}
    if mine:
        _store(stage, source, tokenizer, mine, k, settings)
    barrier()
    figures: dict[str, Any] = {}
    if ranks.is_main:
        manifest = logit_store.finish(folder, list(shards), header)
        figures = {name: manifest[name] for name in ("examples", "tokens", "bytes_per_token", "flops")}
        stage.say(
            f"store_logits: {figures['tokens']:,} target tokens of {figures['examples']:,} examples, "
            f"{figures['bytes_per_token']} bytes a token, in {folder}"
        )
    barrier()
    return {**figures, "training_seconds": round(time.monotonic() - began, 1)}


def plan_shards(tasks: Sequence[Task]) -> list[list[Pair]]:
    """All examples, the longest first (memory that does not suffice shows at once), cut into shards."""

    def order(pair: Pair) -> tuple[int, str]:
        task, example = pair
        return -len(task.definition) - len(example.input), example.id

    pairs = sorted(((task, example) for task in tasks for example in task.examples), key=order)
    return [pairs[at : at + SHARD_EXAMPLES] for at in range(0, len(pairs), SHARD_EXAMPLES)]


def _teacher_folder(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The logit teacher's folder.

    Raises:
        UserError: there is none, or its vocabulary is not the run's.
    """
    if config.teachers.logit_teacher is None:
        return study_backbone(config)
    folder = resolve_folder(config.teachers.logit_teacher)
    mend = "name a teacher of the backbone's family with --teachers.logit_teacher"
    if any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        own = tokenizer_hash(load_tokenizer(folder))
        if own != tokenizer_hash(tokenizer):
            raise UserError(f"the logit teacher {folder} has another tokenizer than the backbone", mend)
    shared = _shared_vocabulary(config, folder)
    if shared < len(tokenizer):
        raise UserError(
            f"the logit teacher {folder} and the backbone both predict {shared} tokens only; "
            f"the tokenizer has {len(tokenizer)}",
            mend,
        )
    return folder


def _shared_vocabulary(config: RunConfig, teacher: Path) -> int:
    """How many tokens both the teacher and the backbone predict.

    Published models of one tokenizer differ in rows behind its last token, which stand for nothing: T5's have 32,128,
    those finetuned after a resize 32,100.
    """
    return min(int(read_json(folder / "config.json")["vocab_size"]) for folder in (teacher, study_backbone(config)))


def _prepare(folder: Path) -> None:
    """Makes the store unfinished, and free of what a killed writer left."""
    ensure_writable(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    for leftover in folder.glob(".*.part"):
        leftover.unlink()


def _store(
    stage: Stage,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    shards: dict[Path, list[Pair]],
    k: int,
    settings: str,
) -> None:
    config, device = stage.config, stage.ranks.device
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    teacher = load_backbone(source, dtype).eval()
    teacher.to(device)  # type: ignore[arg-type]
    collator = Collator(tokenizer, config.data, "concatenated")
    vocabulary = _shared_vocabulary(config, source)
    total, done = sum(map(len, shards.values())), 0
    with Progress("store_logits", total, unit="example", show=stage.ranks.is_main) as bar:
        for path, pairs in shards.items():
            rows: list[dict[str, Any]] = []
            meter = FlopMeter()
            with meter.counting():
                for part in _parts(pairs, config.evaluation.batch_examples):
                    rows.extend(_rows(teacher, collator, part, k, config, vocabulary))
                    done += len(part)
                    bar.update(done)
            logit_store.write_shard(path, rows, settings, config.teachers.store_dtype, meter.flops)


def _parts(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    for at in range(0, len(pairs), size):
        yield pairs[at : at + size]


@torch.no_grad()
def _rows(
    teacher: PreTrainedModel, collator: Collator, pairs: Sequence[Pair], k: int, config: RunConfig, vocabulary: int
) -> Iterable[dict[str, Any]]:
    """The store's rows of some examples, each under its task's definition and with its one training target."""
    chunks = [TaskChunk(task, 0, (example,), (reference_of(example, config.seed),)) for task, example in pairs]
    batch = collator(chunks).to(teacher.device)
    logits = teacher(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
    ).logits
    ids, log_probs, tail = logit_store.top_k(logits[..., :vocabulary], k, config.teachers.temperature)
    rows = logit_store.rows_of(batch.example_ids, batch.labels, ids, log_probs, tail, config.teachers.store_dtype)
    return list(rows)
