"""The leak check against a plain comparison of all pairs, and on real tasks."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tagi_ds.config import DataConfig
from tagi_ds.data.catalogue import group_tasks
from tagi_ds.data.examples import Example, Task
from tagi_ds.data.leaks import SHOWN_PAIRS, Leaks, find_group_leaks, leak_counts

WORDS = st.sampled_from(["a b", "A  b ", "c", "\tC", "d", "", " "])


def make(name: str, definition: str, category: str, inputs: list[str], paraphrases: tuple[str, ...] = ()) -> Task:
    examples = tuple(Example(f"{name}-{i}", text, ("x",)) for i, text in enumerate(inputs))
    return Task(name, definition, category, examples, paraphrases)


@st.composite
def tasks(draw: st.DrawFn, prefix: str) -> list[Task]:
    return [
        make(
            f"{prefix}{number}",
            draw(WORDS),
            draw(st.sampled_from(["QA", "qa", "Title"])),
            draw(st.lists(WORDS, max_size=5)),
            tuple(draw(st.lists(WORDS, max_size=2))),
        )
        for number in range(draw(st.integers(0, 4)))
    ]


def find_leaks(train: list[Task], other: list[Task]) -> Leaks:
    return find_group_leaks(train, {"": other})[""]


def plain(text: str) -> str:
    return " ".join(text.lower().split())


@given(tasks("train"), tasks("test"))
def test_counts_are_those_of_comparing_everything_with_everything(train: list[Task], test: list[Task]) -> None:
    found = find_leaks(train, test)
    trained = {plain(e.input) for t in train for e in t.examples}
    assert found.input.examples == sum(plain(e.input) in trained for t in test for e in t.examples)
    assert found.input.shared == len(trained & {plain(e.input) for t in test for e in t.examples})
    assert found.input.tasks == sum(any(plain(e.input) in trained for e in t.examples) for t in test)
    wordings = {plain(w) for t in train for w in (t.definition, *t.paraphrases) if w.strip()}
    hit = [t for t in test if wordings & {plain(w) for w in (t.definition, *t.paraphrases)}]
    assert found.instruction.tasks == len(hit)
    assert found.instruction.examples == sum(len(t.examples) for t in hit)
    same = {plain(t.category) for t in train} & {plain(t.category) for t in test}
    assert found.category.shared == len(same)
    assert found.category.train_tasks == sum(plain(t.category) in same for t in train)
    assert found.category.total == sum(len(t.examples) for t in test)


@given(tasks("train"), tasks("one"), tasks("two"))
def test_groups_together_are_as_each_by_itself(train: list[Task], one: list[Task], two: list[Task]) -> None:
    found = find_group_leaks(train, {"one": one, "two": two})
    assert found == {"one": find_leaks(train, one), "two": find_leaks(train, two)}


@given(tasks("t"))
def test_every_task_leaks_into_itself(some: list[Task]) -> None:
    found = find_leaks(some, some)
    assert found.input.examples == found.input.total
    assert found.category.tasks == len(some)


def test_pairs_name_the_tasks_that_share_most_first() -> None:
    train = [make("one", "d1", "A", ["x", "y"]), make("two", "d2", "B", ["Y ", "z", "x"])]
    test = [make("test", "d3", "C", ["x", "y", "z", "w", "x"])]
    found = find_leaks(train, test).input
    assert [(p.train, p.other, p.shared) for p in found.pairs] == [("two", "test", 3), ("one", "test", 2)]
    assert found.counts == {"shared": 3, "train_tasks": 2, "tasks": 1, "examples": 4, "total": 5}
    many = [make(f"m{i}", "d", "A", ["x"]) for i in range(SHOWN_PAIRS + 5)]
    assert len(find_leaks(many, test).input.pairs) == SHOWN_PAIRS


def test_real_tasks_agree_with_an_independent_count(real_data: Path, tmp_path: Path) -> None:
    config = DataConfig(sni_dir=str(real_data / "sni"), index_dir=str(tmp_path))
    train, test = group_tasks(config, "train_tasks", 0), group_tasks(config, "test_tasks", 0)
    counts = leak_counts(find_group_leaks(train, {"test": test}))["test"]
    trained = {plain(example.input) for task in train for example in task.examples}
    assert counts["input"]["examples"] == sum(plain(e.input) in trained for t in test for e in t.examples)
    assert counts["input"]["total"] == sum(len(task.examples) for task in test)
    shared = {task.category for task in train} & {task.category for task in test}
    assert counts["category"]["shared"] == len(shared)
