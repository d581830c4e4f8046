"""What stages read: the tasks of every configured collection, through their indexes.

A collection's index is built once, by rank 0, and again when the data have changed. Which of its tasks and rows a run
reads (split, language, number, seed, malformed ones) is decided here, from the tasks' records alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.data import sni
from tagi_ds.data.examples import Task
from tagi_ds.data.indexes import open_index, p3_source, sni_source
from tagi_ds.data.label_noise import with_label_noise
from tagi_ds.data.remote import join
from tagi_ds.data.selection import Rows, Selection, alike, choose_rows, drawn, every, first, malformed_error
from tagi_ds.data.task_index import TaskIndex
from tagi_ds.errors import UserError

P3 = "p3:"
"""What a group of evaluation tasks begins with where it is a named split of P3."""


def training_split(config: DataConfig, seed: int) -> tuple[list[Task], list[Task]]:
    """The training and the validation tasks of every configured collection.

    Validation tasks are those of `config.validation_split` (at most `config.max_instances` instances each, of P3 the
    same for every seed), or `config.validation_tasks` tasks that the seed takes out of the training tasks. They do not
    depend on `config.max_tasks`, which limits what is left to train on, and have no part in `config.label_noise`.

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
        selection, names = _selection(config, config.validation_split, config.max_instances, seed)
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
    """The tasks of one group, with at most `config.max_instances` instances each.

    Args:
        config: names the collections.
        spec: a split file of SNI (`test_tasks`), or `p3:` and a named split of P3 (`p3:mtest11`).
        seed: draws the instances of SNI's tasks that have more; those of P3 are the same for every seed.

    Raises:
        UserError: the collection is not configured, the group unknown, or its data missing or malformed.
    """
    selection, names = _selection(config, spec, config.max_instances, seed)
    return selection.tasks(names)


@dataclass(frozen=True)
class EvaluatedGroup:
    """What a group is tested on.

    Attributes:
        tasks: with the instances that count.
        left_out: what the tasks are without (`Selection.omitted`); ``cut`` of P3 alone, where the published evaluation
            counts all rows.
    """

    tasks: list[Task]
    left_out: dict[str, Any]


def evaluated_group(config: DataConfig, spec: str, most: int) -> EvaluatedGroup:
    """The tasks of one group with the instances that are tested; neither seed nor limits of training bear on them.

    Of SNI these are the first ones, as in the published evaluation; of P3 all rows, which is the published evaluation,
    or as many as are wanted by a draw that depends on the data set alone.

    Args:
        config, spec: as `group_tasks`.
        most: instances a task at the most.

    Raises:
        UserError: as `group_tasks`.
    """
    selection, names = _selection(config, spec, most)
    tasks, left_out = selection.tasks(names), selection.omitted
    if not spec.startswith(P3):
        left_out.pop("cut", None)
    return EvaluatedGroup(tasks, left_out)


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
        yield _selection(config, config.train_split, config.max_instances, seed)
    if config.p3_dir is not None:
        # The index holds as many examples as were wanted.
        yield _p3_selection(config, config.p3_train, "train", every())


def _selection(config: DataConfig, spec: str, most: int, seed: int | None = None) -> tuple[Selection, Sequence[str]]:
    """What chooses the tasks of a group, and their names; errors as `group_tasks`.

    At most `most` instances a task: of SNI the first ones, or by a seed drawn ones.
    """
    if spec.startswith(P3):
        if config.p3_dir is None:
            raise UserError(f"the group {spec} needs P3, and data.p3_dir names no folder", "give --data.p3_dir FOLDER")
        return _p3_selection(config, spec.removeprefix(P3), "validation", alike(most))
    if config.sni_dir is None:
        raise UserError(
            f"the group {spec} needs SNI, and data.sni_dir names no folder",
            "give --data.sni_dir FOLDER, or name a split of P3 as p3:mtest11",
        )
    index = open_index(config, sni_source(config.sni_dir))
    split = f"{join(config.sni_dir, 'splits')}/{config.split}/{spec}.txt"
    names = sni.selection(index, config.split, spec)
    return Selection(config, index, split, first(most) if seed is None else drawn(most, seed)), names


def _p3_selection(config: DataConfig, named: str, group: str, rows: Rows) -> tuple[Selection, Sequence[str]]:
    index = open_index(config, p3_source(config, named, group))
    # The index holds this split alone.
    return Selection(config, index, f"{P3}{named}", rows), index.names


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
    sources = [sni_source(data.sni_dir)] if data.sni_dir is not None else []
    if data.p3_dir is not None:
        sources.append(p3_source(data, data.p3_train, "train"))
        groups = [*evaluation_groups(config).values(), data.validation_split or ""]
        named = dict.fromkeys(spec.removeprefix(P3) for spec in groups if spec.startswith(P3))
        sources += [p3_source(data, name, "validation") for name in named]
    return [open_index(data, source) for source in sources]
