from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagi_ds.config import DataConfig, TeacherConfig
from tagi_ds.data import sni, sni_rows
from tagi_ds.data.catalogue import group_tasks, left_out
from tagi_ds.data.examples import Demonstration, Task
from tagi_ds.data.quotas import plan
from tagi_ds.data.task_index import MalformedRow
from tagi_ds.errors import UserError
from tagi_ds.teachers.units import make_units

GOOD: dict[str, Any] = {
    "Definition": ["Add the numbers.\n\n", "Sum up."],
    "Categories": ["Mathematics"],
    "Source": ["numbers", "others"],
    "Input_language": ["English"],
    "Output_language": ["English"],
    "Positive Examples": [{"input": "1 1", "output": 2, "explanation": "one and one"}, {"input": "no answer"}],
    "Negative Examples": [{"input": "1 1", "output": ["3"]}],
    "Instances": [
        {"id": "x-0", "input": "1 2", "output": [3, "three"]},
        {"input": "2 2", "output": "4"},
        {"id": "x-0", "input": 7, "output": [7.5]},
    ],
}


def write(folder: Path, tasks: dict[str, Any], splits: dict[str, list[str]] | None = None) -> Path:
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    for name, content in tasks.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"tasks/{name}.json").write_text(text, encoding="utf-8")
    for name, names in (splits or {"train_tasks": list(tasks)}).items():
        file = folder / "splits" / (f"{name}.txt" if "/" in name else f"default/{name}.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder


def read(address: object, split_file: str = "train_tasks", seed: int = 0, **settings: Any) -> list[Task]:
    return group_tasks(DataConfig(sni_dir=str(address), **settings), split_file, seed)


def test_fields_and_missing_fields(tmp_path: Path) -> None:
    bare = {"Definition": "Say hi.", "Instances": [{"input": "", "output": ["hi"]}]}
    full, poor = read(write(tmp_path, {"a": GOOD, "b": bare}))
    assert (full.definition, full.paraphrases, full.category) == ("Add the numbers.\n\n", ("Sum up.",), "Mathematics")
    assert (full.source, full.collection) == ("numbers", "sni")
    assert full.positives == (Demonstration("1 1", "2", "one and one"),)
    assert full.negatives == (Demonstration("1 1", "3"),)
    assert [e.references for e in full.examples] == [("3", "three"), ("4",), ("7.5",)]
    assert [e.input for e in full.examples] == ["1 2", "2 2", "7"]
    assert full.examples[0].id == "x-0"
    assert len({e.id for e in full.examples} | {e.id for e in poor.examples}) == 4
    assert (poor.definition, poor.category, poor.positives, poor.source) == ("Say hi.", "Uncategorised", (), "b")


def test_english_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {
        "en": GOOD,
        "out": {**GOOD, "Output_language": ["French"]},
        "in": {**GOOD, "Input_language": ["English", "Hindi"]},
        "unsaid": {key: value for key, value in GOOD.items() if "language" not in key},
        "half": {**GOOD, "Input_language": " english", "Output_language": None},
    }
    folder = write(tmp_path, tasks)
    for _ in range(2):
        assert [t.name for t in read(folder)] == ["en", "unsaid", "half"]
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("data.english_only: left out 2 of 5 tasks of ")
    assert said.endswith(": out (English, French), in (English, Hindi)")
    assert len(read(folder, english_only=False)) == 5
    write(tmp_path, {}, {"foreign": ["out"]})
    with pytest.raises(UserError, match="no task of split foreign"):
        read(folder, "foreign")


def test_splits(tmp_path: Path) -> None:
    splits = {"train_tasks": ["b.json", "", "a", "b"], "xlingual/test_tasks": ["c"], "add/test_tasks": ["a"]}
    folder = write(tmp_path, dict.fromkeys("abc", GOOD), splits)
    assert [t.name for t in read(folder)] == ["b", "a"]
    assert [t.name for t in read(folder, "test_tasks", split="xlingual")] == ["c"]
    with pytest.raises(UserError, match=r"default/test_tasks\.txt is missing") as caught:
        read(folder, "test_tasks")
    assert "train_tasks" in caught.value.mend
    assert "--data.split xlingual" in caught.value.mend


def test_instances_are_chosen_by_the_seed(tmp_path: Path) -> None:
    many = {**GOOD, "Instances": [{"input": str(i), "output": ["y"]} for i in range(50)]}
    folder = write(tmp_path, {"a": many})

    def chosen(seed: int) -> list[str]:
        return [e.id for e in read(folder, seed=seed, max_instances=10)[0].examples]

    assert len(set(chosen(0))) == 10
    assert chosen(0) == chosen(0) != chosen(1)
    # Recorded runs and stores were made with these.
    assert chosen(0) == [f"a-{n}" for n in RECORDED]


RECORDED = [0, 5, 8, 14, 18, 22, 29, 34, 36, 49]


@pytest.mark.parametrize(
    "content, problem",
    [
        ("{not json", r"a\.json is not JSON: .*line 1 column 2"),
        ("[1]", r"a\.json is no task"),
        ("[" * 200_000, r"a\.json is not JSON"),
        ({k: v for k, v in GOOD.items() if k != "Instances"}, r"a\.json has no Instances"),
        ({**GOOD, "Instances": []}, r"a\.json has no Instances"),
        ({k: v for k, v in GOOD.items() if k != "Definition"}, r"a\.json has no Definition"),
        ({**GOOD, "Definition": ["  "]}, r"a\.json has no Definition"),
        ({**GOOD, "Instances": [*GOOD["Instances"], {"input": "1"}]}, r"a\.json: instance 3 lacks"),
        ({**GOOD, "Instances": ["1 2"]}, r"a\.json: instance 0 lacks"),
        ({**GOOD, "Instances": [{"input": "\ud83d", "output": "x"}]}, r"a\.json: instance 0 holds text that is not"),
        ({**GOOD, "Instances": [{}, {}, {}]}, r"instance 0 lacks its input or its output \(and 2 more"),
        ({**GOOD, "Instances": [{"input": "1", "output": []}]}, r"a\.json: instance 0 lacks"),
        *(
            ({**GOOD, "Instances": [{"input": given, "output": output}]}, r"instance 0 has .* neither a text nor a num")
            for given, output in (({"a": 1}, "x"), (["a"], "x"), ("1", {"x": 1}), ("1", ["x", ["y"]]), ("1", [None]))
        ),
    ],
)
def test_malformed_tasks(tmp_path: Path, content: Any, problem: str) -> None:
    folder = write(tmp_path, {"a": content, "b": GOOD})
    with pytest.raises(UserError, match=problem) as caught:
        read(folder)
    assert "--data.malformed skip" in caught.value.mend
    assert str(folder) in caught.value.problem


def test_malformed_rows_and_files_are_skipped_counted_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    instances = [*GOOD["Instances"], {"input": "1"}, "x"]
    tasks = {"a": "{", "b": {**GOOD, "Instances": instances}, "c": {**GOOD, "Instances": [3]}}
    folder = write(tmp_path, tasks, {"train_tasks": ["a", "b", "c", "gone"]})
    for _ in range(2):
        (task,) = read(folder, malformed="skip")
    assert (task.name, len(task.examples)) == ("b", 3)
    said = capsys.readouterr().err.strip().splitlines()
    assert "left out 3 rows and 2 files of" in said[0]
    named = [
        "a.json is not JSON",
        "b.json: instance 3 l",
        "b.json: instance 4 l",
        "c.json: instance 0 l",
        "gone.json is",
    ]
    assert len(said) == 1 + len(named)
    assert all(place in line for place, line in zip(named, said[1:], strict=True))
    config = DataConfig(sni_dir=str(folder), malformed="skip", validation_tasks=0)
    assert left_out(config, 0) == 3 + 2
    assert left_out(replace(config, malformed="error"), 0) == 0
    (folder / "splits/default/other.txt").write_text("b\n")
    assert left_out(replace(config, train_split="other"), 0) == 2
    with pytest.raises(UserError, match="can be read"):
        read(write(tmp_path / "none", {"a": "{"}), malformed="skip")


def test_broken_splits(tmp_path: Path) -> None:
    folder = write(tmp_path / "sni", {"a": GOOD}, {"train_tasks": ["a", "gone"], "none": []})
    with pytest.raises(UserError, match=r"train_tasks\.txt names gone, but .*gone\.json is missing"):
        read(folder)
    with pytest.raises(UserError, match=r"none\.txt is empty"):
        read(folder, "none")
    (folder / "splits/default/bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bytes\.txt is not text"):
        read(folder, "bytes")
    with pytest.raises(UserError, match=r"data folder .*nowhere is missing"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no tasks"):
        read(tmp_path / "empty")


@given(content=st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5))
@pytest.mark.parametrize("field", ["Definition", "Categories", "Source", "Input_language", "Positive Examples"])
def test_any_content_of_a_field_is_read_or_named(field: str, content: Any) -> None:
    raw = sni.parse_task(json.dumps({**GOOD, field: content}).encode(), "a", "tasks/a.json")
    assert raw.definition or raw.malformed
    assert all(isinstance(text, str) for text in (raw.definition, raw.category, raw.source, *raw.languages))


@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_task_or_malformed(data: bytes) -> None:
    (row,) = sni.parse_task(data, "a", "tasks/a.json").malformed
    assert (row.file, row.row) == ("tasks/a.json", -1)


def rows(task: str, count: int, **others: Any) -> list[dict[str, Any]]:
    facts = {"task_name": task, "definition": f"Do {task}.", **others}
    return [{**facts, "id": f"{task}-{n}", "inputs": f"in {n}", "targets": f"out {n}"} for n in range(count)]


def jsonl(*lines: Any) -> bytes:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


def parquet(found: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found), buffer, row_group_size=2)
    return buffer.getvalue()


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.makedirs("/sets/ni", exist_ok=True)
    yield "memory://sets/ni"
    system.store.clear()


def put(address: str, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        with fsspec.open(f"{address}/{path}", "wb") as handle:
            handle.write(content)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_from_an_address(memory: str, ending: str) -> None:
    train = [*rows("task1_a", 3), *rows("task2_b", 2)]
    train.insert(1, {**train[0], "targets": "another"})
    written = {"train": train, "test": rows("task3_c", 4)}
    write_as = {".jsonl": lambda r: jsonl(*r), ".jsonl.gz": lambda r: gzip.compress(jsonl(*r)), ".parquet": parquet}
    put(memory, {f"{group}/part{ending}": write_as[ending](found) for group, found in written.items()})
    put(memory, {"README.md": b"no data", ".hidden/x.jsonl": b"{"})
    first, second = read(memory)
    assert (first.name, first.definition, first.positives, first.category) == (
        "task1_a",
        "Do task1_a.",
        (),
        "Uncategorised",
    )
    assert [e.references for e in first.examples] == [("out 0", "another"), ("out 1",), ("out 2",)]
    assert [e.id for e in second.examples] == ["task2_b-0", "task2_b-1"]
    assert [t.name for t in read(memory, "test_tasks")] == ["task3_c"]
    with pytest.raises(UserError, match=r"validation_tasks\.txt is missing") as caught:
        read(memory, "validation_tasks")
    assert "test_tasks, train_tasks" in caught.value.mend


def test_what_rows_do_not_have_is_not_silently_missed(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"{memory}/bare"
    put(address, {"train/a.jsonl": jsonl(*rows("task1_a", 3), *rows("task2_b", 2))})
    for kind in ("positives", "negatives"):
        with pytest.raises(UserError, match=rf"data\.{kind} is 2, and none of the 2 tasks of .*train_tasks") as caught:
            read(address, **{kind: 2})
        assert "checkout of natural-instructions" in caught.value.mend
        assert len(read(address, prompt="plain", **{kind: 2})) == 2, "plain shows none anyway"
    tasks = read(address)
    assert (
        "no task of memory://sets/ni/bare/splits/default/train_tasks.txt names its language" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="none of the 2 training tasks names its own: one teacher for all"):
        make_units(tasks, TeacherConfig(unit="category"), 0)
    assert len(make_units(tasks, TeacherConfig(unit="task"), 0)) == 2
    assert len(make_units(tasks[:1], TeacherConfig(unit="category"), 0)) == 1
    with pytest.raises(UserError, match=r"data\.sampling category, and none of the 2 training tasks"):
        plan(tasks, 1, "category")


def test_some_tasks_may_lack_examples_and_categories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = {"Definition": "Say hi.", "Instances": [{"input": "", "output": ["hi"]}]}
    tasks = read(write(tmp_path, {"a": GOOD, "b": bare}), positives=2, negatives=1)
    assert {unit.name for unit in make_units(tasks, TeacherConfig(unit="category"), 0)} == {
        "Mathematics",
        "Uncategorised",
    }
    assert not capsys.readouterr().err


def test_a_checkout_and_its_splits_from_an_address(memory: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": GOOD, "b": GOOD}, {"train_tasks": ["b"], "xlingual/test_tasks": ["a"]})
    put(memory, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert [t.name for t in read(memory)] == ["b"]
    (there,), (here,) = (read(place, "test_tasks", split="xlingual") for place in (memory, folder))
    assert there == here
    assert list(there.examples) == list(here.examples)


def test_changed_rows_at_an_address_are_read_again(memory: str) -> None:
    put(memory, {"train/a.jsonl": jsonl(*rows("a", 2))})
    assert len(read(memory)[0].examples) == 2
    put(memory, {"train/a.jsonl": jsonl(*rows("a", 3))})
    assert len(read(memory)[0].examples) == 3


def test_an_address_that_is_missing_or_unknown(memory: str) -> None:
    with pytest.raises(UserError, match="memory://sets/other is missing") as caught:
        read("memory://sets/other")
    assert "launchers/prepare.py" in caught.value.mend
    with pytest.raises(UserError, match=r"cannot open nosuch://x: .*nosuch"):
        read("nosuch://x")
    put(memory, {"README.md": b"no data"})
    with pytest.raises(UserError, match="holds no tasks"):
        read(memory)


def test_malformed_rows_are_named(memory: str) -> None:
    good = rows("a", 3)
    bad = [{**good[0], "inputs": None}, {**good[0], "targets": []}, {**good[0], "definition": 3}]
    put(memory, {"train/a.jsonl": jsonl(good[0], bad[0], "", *bad[1:], good[1], "{broken", {"inputs": "x"}, good[2])})
    put(memory, {"train/cut.jsonl.gz": gzip.compress(jsonl(*rows("b", 900)))[:500]})
    put(memory, {"train/poor.parquet": parquet([{"task_name": "c", "inputs": "x"}])})
    found: Counter[MalformedRow] = Counter(row for task in sni.scan(memory) for row in task.malformed)
    assert {(row.file, row.row) for row in found} == {
        *(("train/a.jsonl", number) for number in (1, 3, 4, 6, 7)),
        ("train/cut.jsonl.gz", -1),
        ("train/poor.parquet", -1),
    }
    reasons = {row.row: row.reason for row in found if row.file == "train/a.jsonl"}
    assert "is not JSON" in reasons[6]
    assert reasons[7] == "lacks its task_name"
    with pytest.raises(UserError, match=r"train/"):
        read(memory)
    kept = {task.name: len(task.examples) for task in read(memory, malformed="skip")}
    assert kept["a"] == 3


@given(order=st.permutations([(task, n) for task in "abc" for n in range(4)]), held=st.integers(0, 60))
def test_rows_in_any_order_are_gathered_by_task(order: list[tuple[str, int]], held: int) -> None:
    system = fsspec.filesystem("memory")
    system.store.clear()
    by_task = {task: rows(task, 4) for task in "abc"}
    for shard in range(3):
        part = [by_task[task][n] for task, n in order[shard::3]]
        put("memory://mixed", {f"train/{shard}.jsonl": jsonl(*part)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sni_rows, "HELD_CHARACTERS", held)
        parts = list(sni.scan("memory://mixed"))
    found = Counter((part.name, example.id) for part in parts for example in part.examples)
    assert found == Counter((task, row["id"]) for task in "abc" for row in by_task[task])
    assert all(part.definition == f"Do {part.name}." for part in parts)


def test_training_and_test_rows_of_one_task_stay_apart(memory: str) -> None:
    put(memory, {"test/a.jsonl": jsonl(*rows("a", 2)), "train/a.jsonl": jsonl(*rows("a", 5))})
    tasks = {split: read(memory, split)[0] for split in ("train_tasks", "test_tasks")}
    assert {split: len(task.examples) for split, task in tasks.items()} == {"train_tasks": 5, "test_tasks": 2}
    assert len({task.name for task in tasks.values()}) == 2


def test_real_tasks(real_data: Path) -> None:
    folder = real_data / "sni"
    expected = {}
    for name in (folder / "splits/default/train_tasks.txt").read_text(encoding="utf-8").split():
        content = json.loads((folder / f"tasks/{name}.json").read_text(encoding="utf-8"))
        if content.get("Input_language", ["English"]) == content.get("Output_language", ["English"]) == ["English"]:
            expected[name] = min(100, len(content["Instances"]))
    tasks = read(folder)
    assert {t.name: len(t.examples) for t in tasks} == expected
    assert [t.name for t in tasks] == list(expected)
    assert len(tasks) == 59
    every = {t.name for t in read(folder, english_only=False)}
    assert {name.split("_")[0] for name in every - {t.name for t in tasks}} == {"task1239", "task1435"}
    numeric = next(t for t in tasks + read(folder, "test_tasks") if "task1759" in t.name)
    assert all(r.lstrip("-").isdigit() for e in numeric.examples for r in e.references)
    ids = [e.id for t in tasks for e in t.examples]
    assert len(set(ids)) == len(ids) == sum(expected.values())
