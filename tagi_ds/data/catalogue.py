"""What stages read: the tasks of every configured collection, through their indexes.

A collection's index is built once, by rank 0, and again when the data have changed. Which of its tasks and rows a run
reads (split, language, number, seed, malformed ones) is decided here, from the tasks' records alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.data import p3, sni
from tagi_ds.data.examples import Task
from tagi_ds.data.index_writer import build_index
from tagi_ds.data.label_noise import with_label_noise
from tagi_ds.data.remote import is_remote, join
from tagi_ds.data.selection import Selection, choose_rows, malformed_error
from tagi_ds.data.task_index import RawTask, TaskIndex
from tagi_ds.engine.distributed import is_main
from tagi_ds.errors import UserError
from tagi_ds.files import ensure_writable

P3 = "p3:"
"""What a group of evaluation tasks begins with where it is a named split of P3."""


def training_split(config: DataConfig, seed: int) -> tuple[list[Task], list[Task]]:
    """The training and the validation tasks of every configured collection.

    Validation tasks are those of `config.validation_split` (at most `config.max_instances` instances each), or
    `config.validation_tasks` tasks that the seed takes out of the training tasks. They do not depend on
    `config.max_tasks`, which limits what is left to train on, and have no part in `config.label_noise`.

    Raises:
        UserError: no collection is configured; data are missing or malformed; a task is in both splits; holding out
            leaves nothing to train on; or fewer tasks are left than `config.max_tasks`.
    """
    train = [task for selection, names in _training(config, seed) for task in selection.tasks(names)]
    if not train:
        raise UserError(
            "data.sni_dir names no folder, and neither does data.p3_dir",
            "name one, or write the embedded benchmark first",
        )
    if config.validation_split is not None:
        selection, names = _selection(config, config.validation_split, seed)
        # Of a published collection these may be many, and they are read again and again.
        selection.max_examples = config.max_instances
        validation = selection.tasks(names)
        # A template of P3 may be in both, with its training and with its validation rows.
        trained = {(task.name, task.examples) for task in train}
        both = [task.name for task in validation if (task.name, task.examples) in trained]
        if both:
            raise UserError(
                f"{min(both)} is in both the training tasks and {config.validation_split}",
                "name a validation split apart from training",
            )
        return _trained_on(train, config, seed), validation
    if config.validation_tasks >= len(train):
        raise UserError(
            f"data.validation_tasks = {config.validation_tasks} of {len(train)} training tasks leaves none to train on",
            "lower --data.validation_tasks or name a --data.validation_split",
        )
    names = sorted(task.name for task in train)
    held_out = set(random.Random(f"{seed}/validation").sample(names, config.validation_tasks))
    rest = [task for task in train if task.name not in held_out]
    return _trained_on(rest, config, seed), [task for task in train if task.name in held_out]


def _trained_on(train: list[Task], config: DataConfig, seed: int) -> list[Task]:
    """As many of the tasks as are wanted, in their order, and with the labels that are wanted.

    Raises:
        UserError: there are fewer.
    """
    limit = config.max_tasks
    if limit is None:
        return with_label_noise(train, config.label_noise, seed)
    if limit > len(train):
        raise UserError(
            f"data.max_tasks is {limit}, and there are {len(train)} training tasks",
            f"give at most {len(train)}, or leave the field out for all of them",
        )
    names = sorted(task.name for task in train)
    random.Random(f"{seed}/tasks").shuffle(names)
    chosen = set(names[:limit])
    return with_label_noise([task for task in train if task.name in chosen], config.label_noise, seed)


def group_tasks(config: DataConfig, spec: str, seed: int) -> list[Task]:
    """The tasks of one group.

    Args:
        config: names the collections.
        spec: a split file of SNI (`test_tasks`), or `p3:` and a named split of P3 (`p3:mtest11`).
        seed: chooses the examples of tasks that have more than are wanted.

    Raises:
        UserError: the collection is not configured, the group unknown, or its data missing or malformed.
    """
    selection, names = _selection(config, spec, seed)
    return selection.tasks(names)


def left_out(config: DataConfig, seed: int) -> int:
    """Malformed rows and files that the training tasks are without (`data.malformed: skip`)."""
    if config.malformed == "error":
        return 0
    total = 0
    for selection, names in _training(config, seed):
        selection.tasks(names)
        total += selection.left_out
    return total


def _training(config: DataConfig, seed: int) -> Iterator[tuple[Selection, Sequence[str]]]:
    """What chooses the training tasks of each configured collection, and their names."""
    if config.sni_dir is not None:
        yield _selection(config, config.train_split, seed)
    if config.p3_dir is not None:
        yield _p3_selection(config, config.p3_train, "train", seed)


def _selection(config: DataConfig, spec: str, seed: int) -> tuple[Selection, Sequence[str]]:
    """What chooses the tasks of a group, and their names; errors as `group_tasks`."""
    if spec.startswith(P3):
        if config.p3_dir is None:
            raise UserError(f"the group {spec} needs P3, and data.p3_dir names no folder", "give --data.p3_dir FOLDER")
        return _p3_selection(config, spec.removeprefix(P3), "validation", seed)
    if config.sni_dir is None:
        raise UserError(
            f"the group {spec} needs SNI, and data.sni_dir names no folder",
            "give --data.sni_dir FOLDER, or name a split of P3 as p3:mtest11",
        )
    index = _open(config, _sni_source(config.sni_dir))
    split = f"{join(config.sni_dir, 'splits')}/{config.split}/{spec}.txt"
    names = sni.selection(index, config.split, spec)
    return Selection(config, seed, index, split, config.max_instances), names


def _p3_selection(config: DataConfig, named: str, group: str, seed: int) -> tuple[Selection, Sequence[str]]:
    index = _open(config, _p3_source(config, named, group, seed))
    # The index holds this split alone, and as many examples as were wanted.
    return Selection(config, seed, index, f"{P3}{named}", None), index.names


def evaluation_groups(config: RunConfig) -> dict[str, str]:
    """Name of each evaluated group -> what `group_tasks` takes: as configured, or the collection's own test tasks."""
    if config.evaluation.groups is not None:
        return config.evaluation.groups
    alone = config.data.sni_dir is None and config.data.p3_dir is not None
    return {"mtest11": f"{P3}mtest11"} if alone else {"test": "test_tasks"}


def one_task(path: str | Path, config: DataConfig, seed: int) -> Task:
    """The one task of a file in SNI's format, named after the file; of any language, and read without an index.

    Raises:
        UserError: the file is missing or malformed.
    """
    folder, _, name = str(path).rpartition("/")
    raw = sni.read_task_file(folder or ".", name)
    for row in raw.malformed[:1]:
        if not raw.examples or config.malformed == "error":
            raise malformed_error(folder or ".", row, len(raw.malformed))
    rows = choose_rows(len(raw.examples), config.max_instances, seed, raw.name)
    return Task(
        raw.name,
        raw.definition,
        raw.category,
        tuple(raw.examples[row] for row in rows),
        raw.paraphrases,
        raw.positives,
        raw.negatives,
        raw.source,
    )


def prepare_index(config: RunConfig) -> list[TaskIndex]:
    """Builds the indexes that a run reads and that are missing or out of date, and opens all.

    Raises:
        UserError: data are missing, or an index cannot be written.
    """
    data = config.data
    sources = [_sni_source(data.sni_dir)] if data.sni_dir is not None else []
    if data.p3_dir is not None:
        sources.append(_p3_source(data, data.p3_train, "train", config.seed))
        groups = [*evaluation_groups(config).values(), data.validation_split or ""]
        named = dict.fromkeys(spec.removeprefix(P3) for spec in groups if spec.startswith(P3))
        sources += [_p3_source(data, name, "validation", config.seed) for name in named]
    return [_open(data, source) for source in sources]


@dataclass(frozen=True)
class _Source:
    """A collection, or the part of one that has an index of its own.

    Attributes:
        collection, address: as configured; local addresses are absolute.
        scope: what beside the data decides the index' content.
        listing: facts that change when the data change; `files` lists them.
        scan: the tasks.
    """

    collection: str
    address: str
    scope: dict[str, Any]
    listing: Callable[[], dict[str, Any]]
    scan: Callable[[], Iterator[RawTask]]


def _sni_source(address: str) -> _Source:
    address = _absolute(address)
    return _Source("sni", address, {}, lambda: sni.listing(address), lambda: sni.scan(address))


def _p3_source(config: DataConfig, named: str, group: str, seed: int) -> _Source:
    assert config.p3_dir is not None
    address, limit = _absolute(config.p3_dir), config.p3_max_examples
    templates = None if config.p3_templates is None else _absolute(config.p3_templates)
    scope = {"split": named, "group": group, "max_examples": limit, "seed": seed, "templates": templates}
    return _Source(
        "p3",
        address,
        scope,
        lambda: p3.listing(address, templates, named, group),
        lambda: p3.scan(address, templates, named, group, limit, seed),
    )


def _open(config: DataConfig, source: _Source) -> TaskIndex:
    """The source's index; on rank 0 it is built first where it is missing, damaged or out of date.

    Other ranks take it as rank 0 left it: a launcher lets them in after rank 0 has prepared it.
    """
    identity = _hash([source.collection, source.address, source.scope])[:16]
    folder = _index_dir(config) / f"{source.collection}-{identity}"
    if not is_main():
        return TaskIndex(folder)
    listing = source.listing()
    facts = {"collection": source.collection, "address": source.address, "scope": source.scope, "key": _hash(listing)}
    index = _fresh(folder, facts)
    if index is not None:
        return index
    with _alone(folder):
        # Another job may have built it while this one waited.
        index = _fresh(folder, facts)
        if index is None:
            build_index(folder, source.scan(), facts, len(listing["files"]))
            index = TaskIndex(folder)
    return index


def _fresh(folder: Path, facts: dict[str, Any]) -> TaskIndex | None:
    """The index in `folder` where it is whole and of these data."""
    try:
        index = TaskIndex(folder) if folder.is_dir() else None
    except UserError:
        # Written by another version or cut short; it is of our making and can be made again.
        return None
    return index if index is not None and index.facts == facts else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job at a time builds an index; the others wait, and then find it."""
    ensure_writable(folder.parent)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        # Without locks (some file systems) several would build the same, and the last one's stays.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _index_dir(config: DataConfig) -> Path:
    if config.index_dir is not None:
        return Path(config.index_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tagi_ds" / "index"


def _absolute(address: str) -> str:
    return address if is_remote(address) else os.path.abspath(address)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
