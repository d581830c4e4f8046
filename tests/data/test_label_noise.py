from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tagi_ds.config import DataConfig
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.examples import Example, Task
from tagi_ds.data.label_noise import with_label_noise
from tagi_ds.data.mixture import fingerprint
from tests.data.test_sni import GOOD, write


def task_of(examples: int) -> Task:
    rows = tuple(Example(f"t-{at}", f"input {at}", (f"output {at}",)) for at in range(examples))
    return Task("t", "Answer.", "c", rows)


def wrong(noisy: Task, clean: Task) -> set[str]:
    return {
        a.id for a, b in zip(noisy.examples, clean.examples, strict=True) if a.references != b.references
    }  # fmt: skip


@given(st.integers(1, 40), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 5))
def test_wrong_answers_are_another_examples_and_grow_with_the_share(
    examples: int, share: float, other: float, seed: int
) -> None:
    clean = task_of(examples)
    less, more = (with_label_noise([clean], each, seed)[0] for each in sorted((share, other)))
    assert wrong(less, clean) <= wrong(more, clean)
    answers = {example.references for example in clean.examples}
    assert all(example.references in answers for example in more.examples)
    assert [(e.id, e.input) for e in more.examples] == [(e.id, e.input) for e in clean.examples]
    assert list(more.examples[1:3]) == [more.examples[at] for at in range(1, min(3, examples))]
    assert examples > 1 or not wrong(more, clean)


def test_about_so_many_are_wrong() -> None:
    clean = task_of(2000)
    found = [len(wrong(with_label_noise([clean], 0.3, seed)[0], clean)) / 2000 for seed in (0, 1)]
    # Three standard errors of a share of 0.3 among 2,000.
    assert all(abs(share - 0.3) < 0.031 for share in found)
    assert found[0] != found[1]


def test_none_leaves_the_tasks_as_they_are() -> None:
    clean = [task_of(3)]
    assert with_label_noise(clean, 0.0, 0) == clean
    assert fingerprint(with_label_noise(clean, 0.5, 0)) != fingerprint(clean)
    assert fingerprint(with_label_noise(clean, 0.5, 0)) != fingerprint(with_label_noise(clean, 0.5, 1))


def test_training_alone_is_noisy(tmp_path: Path) -> None:
    good = json.loads(json.dumps(GOOD))
    good["Instances"] = [{"id": f"i{at}", "input": f"in {at}", "output": [f"out {at}"]} for at in range(8)]
    folder = write(tmp_path, {f"t{i}": good for i in range(4)})
    config = DataConfig(sni_dir=str(folder), validation_tasks=1)
    clean, held_out = training_split(config, 0)
    for limit in (None, 2):
        noisy, validation = training_split(replace(config, label_noise=0.9, max_tasks=limit), 0)
        assert validation == held_out
        right = {task.name: task for task in clean}
        assert any(wrong(task, right[task.name]) for task in noisy)
