"""Reading Super-NaturalInstructions: a checkout's ``tasks/*.json`` and ``splits/<split>/<name>.txt``, or rows.

Rows (jsonl or parquet files, as in hf://datasets/Muennighoff/natural-instructions) are read by
:mod:`tagi_ds.data.sni_rows`. Both come from a local folder or from an address.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tagi_ds.data import sni_rows
from tagi_ds.data.examples import UNCATEGORISED, Demonstration, Example
from tagi_ds.data.fields import first_text, is_scalar, is_unicode, texts
from tagi_ds.data.remote import PREPARE, find_files, join, open_file, read_bytes
from tagi_ds.data.task_index import UNREADABLE, WHOLE_FILE, MalformedRow, RawTask, TaskIndex
from tagi_ds.errors import UserError


def listing(address: str) -> dict[str, Any]:
    """What changes when the data change: every file's path, size and modification time.

    Raises:
        UserError: the address is missing, or holds neither task files nor rows.
    """
    files = find_files(address, (".json",), "tasks") or find_files(address, sni_rows.ENDINGS)
    files = [file for file in files if not file.path.startswith("splits/")]
    if not files:
        raise UserError(
            f"{address} holds no tasks: neither tasks/*.json nor files of rows ({', '.join(sni_rows.ENDINGS)})",
            f"name a checkout of natural-instructions, or fetch the data: {PREPARE}",
        )
    return {"files": [[file.path, file.size, file.mark] for file in files]}


def scan(address: str) -> Iterator[RawTask]:
    """Every task of the collection, in the order of the files' names; malformed ones too.

    Raises:
        UserError: the address cannot be read.
    """
    paths = [path for path, _, _ in listing(address)["files"]]
    if not is_checkout(paths):
        yield from sni_rows.scan(address, paths)
        return
    for path in paths:
        yield read_task_file(address, path)


def is_checkout(paths: list[str]) -> bool:
    """Whether the files are a checkout's task files rather than files of rows."""
    return paths[0].endswith(".json")


def selection(index: TaskIndex, split: str, split_file: str) -> list[str]:
    """Names of the tasks of a split, in its order.

    Rows without split files belong to the folder that they lie in: `train_tasks` are the tasks of ``train/``.

    Args:
        index: of the collection; its facts name the address.
        split: folder under ``splits/``: `default`, `xlingual`, ...
        split_file: file in it, without ``.txt``.

    Raises:
        UserError: the split is missing, empty or not text.
    """
    address = index.facts["address"]
    name = f"splits/{split}/{split_file}.txt"
    path = join(address, name)
    try:
        lines = read_bytes(address, name).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        named = [record.name for record in map(index.record, index.names) if _is_group(record.group, split_file)]
        if named:
            return named
        raise UserError(f"the split {path} is missing", f"choose one that exists: {_splits(index, split)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the split {path} is not text: {error}", "write one task name a line") from error
    names = [line.strip().removesuffix(".json") for line in lines if line.strip()]
    if not names:
        raise UserError(f"the split {path} is empty", "write one task name a line")
    return list(dict.fromkeys(names))


def is_english(languages: tuple[str, ...]) -> bool:
    """Whether all of a task's languages are English; a task that names none counts as English."""
    return all(language.strip().lower() == "english" for language in languages)


def read_task_file(address: str, path: str) -> RawTask:
    """One task file, malformed or not.

    Args:
        address: of the folder.
        path: of the file, relative to it.

    Raises:
        UserError: the file system fails.
    """
    name = path.rsplit("/", 1)[-1].removesuffix(".json")
    try:
        with open_file(address, path) as handle:
            data = handle.read()
    except FileNotFoundError:
        return broken_task(name, path, "is missing")
    except OSError as error:
        return broken_task(name, path, f"cannot be read: {error.strerror or error}", row=UNREADABLE)
    return parse_task(data, name, path)


def parse_task(data: bytes, name: str, path: str) -> RawTask:
    """A task file's content; without a definition or any instance that can be read, the task is malformed as a whole.

    Args:
        data: JSON.
        name: of the task.
        path: of the file, for `RawTask.file`.
    """
    digest = hashlib.sha256(data).hexdigest()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        return broken_task(name, path, f"is not JSON: {error}", digest)
    if not isinstance(content, dict):
        return broken_task(name, path, "is no task: its top level is not an object", digest)
    definitions = [text for text in texts(content.get("Definition")) if text.strip()]
    if not definitions or not is_unicode(*definitions):
        return broken_task(name, path, "has no Definition", digest)
    instances = content.get("Instances")
    if not isinstance(instances, list) or not instances:
        return broken_task(name, path, "has no Instances", digest)
    examples, malformed = [], []
    for index, instance in enumerate(instances):
        found = _example(name, index, instance)
        if isinstance(found, Example):
            examples.append(found)
        else:
            malformed.append(MalformedRow(path, index, found))
    return RawTask(
        name=name,
        definition=definitions[0],
        category=first_text(content.get("Categories")) or UNCATEGORISED,
        source=first_text(content.get("Source")) or name,
        collection="sni",
        paraphrases=tuple(definitions[1:]),
        positives=_demonstrations(content.get("Positive Examples")),
        negatives=_demonstrations(content.get("Negative Examples")),
        languages=tuple(texts(content.get("Input_language")) + texts(content.get("Output_language"))),
        file=path,
        digest=digest,
        examples=tuple(examples),
        malformed=tuple(malformed),
    )


def broken_task(name: str, path: str, reason: str, digest: str = "", row: int = WHOLE_FILE) -> RawTask:
    """A task whose file says nothing that can be used."""
    malformed = (MalformedRow(path, row, reason),)
    return RawTask(name, "", "", name, "sni", (), (), (), (), path, digest, (), malformed)


def _example(name: str, index: int, instance: Any) -> Example | str:
    """The example, or what is wrong with it."""
    fields = instance if isinstance(instance, dict) else {}
    given, output = fields.get("input"), fields.get("output")
    references = tuple(texts(output))
    if given is None or output is None or output == []:
        return "lacks its input or its output"
    if not is_scalar(given) or len(references) != (len(output) if isinstance(output, list) else 1):
        return "has an input or an output that is neither a text nor a number"
    given, identity = str(given), str(fields.get("id") or f"{name}-{index}")
    if not is_unicode(identity, given, *references):
        return "holds text that is not Unicode"
    return Example(identity, given, references)


def _demonstrations(value: Any) -> tuple[Demonstration, ...]:
    found = []
    for entry in value if isinstance(value, list) else []:
        fields = entry if isinstance(entry, dict) else {}
        given, output, explanation = (first_text(fields.get(name)) for name in ("input", "output", "explanation"))
        if given is not None and output is not None and is_unicode(given, output, explanation or ""):
            found.append(Demonstration(given, output, explanation))
    return tuple(found)


def _is_group(group: str, split_file: str) -> bool:
    return group != "" and group == split_file.removesuffix("_tasks")


def _splits(index: TaskIndex, split: str) -> str:
    files = find_files(index.facts["address"], (".txt",), "splits")
    here = [Path(file.path).stem for file in files if Path(file.path).parent.name == split]
    others = [f"--data.split {name}" for name in sorted({Path(file.path).parent.name for file in files} - {split})]
    groups = [f"{group}_tasks" for group in sorted({index.record(name).group for name in index.names} - {""})]
    return ", ".join(here + others + groups) or "none"
