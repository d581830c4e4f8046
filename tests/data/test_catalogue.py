from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.data import indexes
from tagi_ds.data.catalogue import evaluation_groups, group_tasks, one_task, prepare_index, training_split
from tagi_ds.data.mixture import fingerprint
from tagi_ds.data.task_index import EXAMPLES, RawTask, TaskIndex
from tagi_ds.engine import distributed
from tagi_ds.errors import UserError
from tagi_ds.stages.evaluate import evaluated_groups
from tests.data.test_sni import GOOD, write
from tests.distributed import run_ranks

TEMPLATE = """
dataset: imdb
templates:
  11111111-1111-1111-1111-111111111111: !Template
    answer_choices: negative ||| positive
    id: 11111111-1111-1111-1111-111111111111
    jinja: 'Review: {{text}} Is it {{"positive"}} or {{"negative"}}? ||| {{answer_choices[label]}}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      metrics: [Accuracy]
      original_task: true
    name: Is it
    reference: ''
"""


@pytest.fixture
def sni(tmp_path: Path) -> Path:
    return write(tmp_path / "sni", {f"t{n}": GOOD for n in range(5)})


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of the indexes that were built."""
    built: list[Path] = []
    build = indexes.build_index

    def record(folder: Path, raw: Iterator[RawTask], *others: object) -> None:
        built.append(folder)
        build(folder, raw, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(indexes, "build_index", record)
    return built


def test_fewer_tasks_are_among_more_and_validation_stays(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"t{i}": GOOD for i in range(10)})
    config = DataConfig(sni_dir=str(folder), validation_tasks=3)
    everything, held_out = training_split(config, 0)
    chosen: list[set[str]] = []
    for limit in (1, 4, 7):
        train, validation = training_split(replace(config, max_tasks=limit), 0)
        assert (len(train), validation) == (limit, held_out)
        assert [task for task in everything if task in train] == train, "in their order"
        chosen.append({task.name for task in train})
    assert chosen[0] < chosen[1] < chosen[2]
    assert len({training_split(replace(config, max_tasks=1), seed)[0][0].name for seed in range(8)}) > 1
    with pytest.raises(UserError, match=r"data\.max_tasks is 8, and there are 7 training tasks"):
        training_split(replace(config, max_tasks=8), 0)


def test_training_and_validation(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(10)]
    splits = {"train_tasks": names, "validation_tasks": ["v"], "overlap": ["v", "t3"]}
    folder = write(tmp_path, dict.fromkeys([*names, "v"], GOOD), splits)
    config = DataConfig(sni_dir=str(folder), validation_tasks=3)
    train, validation = training_split(config, 0)
    assert (len(train), len(validation)) == (7, 3)
    assert {t.name for t in train} | {t.name for t in validation} == set(names)
    assert validation == training_split(config, 0)[1]
    assert len({tuple(t.name for t in training_split(config, seed)[1]) for seed in range(5)}) > 1
    named = replace(config, validation_split="validation_tasks")
    assert [t.name for t in training_split(named, 0)[1]] == ["v"]
    assert len(training_split(named, 0)[0]) == 10
    with pytest.raises(UserError, match="t3 is in both"):
        training_split(replace(config, validation_split="overlap"), 0)
    with pytest.raises(UserError, match="leaves none to train on"):
        training_split(replace(config, validation_tasks=10), 0)
    with pytest.raises(UserError, match="sni_dir names no folder"):
        training_split(DataConfig(), 0)
    with pytest.raises(UserError, match=r"data\.p3_dir names no folder"):
        group_tasks(config, "p3:mtest11", 0)
    with pytest.raises(UserError, match=r"data\.sni_dir names no folder"):
        group_tasks(DataConfig(p3_dir="p3"), "test_tasks", 0)


def test_an_index_is_built_once_and_again_when_data_change(sni: Path, tmp_path: Path, builds: list[Path]) -> None:
    config = DataConfig(sni_dir=str(sni), index_dir=str(tmp_path / "index"))
    first = group_tasks(config, "train_tasks", 0)
    (folder,) = builds
    assert folder.parent == tmp_path / "index"
    # Only the selection differs, which is not the index' business.
    group_tasks(replace(config, max_instances=1, english_only=False, malformed="skip"), "train_tasks", 3)
    group_tasks(replace(config, sni_dir=os.path.relpath(sni)), "train_tasks", 0)
    (sni / "splits/default/other.txt").write_text("t0\n")
    group_tasks(config, "other", 0)
    assert len(builds) == 1
    (sni / "tasks/t3.json").write_text(json.dumps({**GOOD, "Instances": GOOD["Instances"][:2]}))
    changed = group_tasks(config, "train_tasks", 0)
    assert len(changed[3].examples) == 2
    assert builds == [folder, folder]
    assert fingerprint(changed) != fingerprint(first)
    assert [entry.name for entry in folder.parent.iterdir() if not entry.name.startswith(".")] == [folder.name]
    # What was opened before goes on reading what it opened.
    assert [len(list(task.examples)) for task in first] == [3] * 5
    other = write(tmp_path / "elsewhere", {"t0": GOOD})
    group_tasks(replace(config, sni_dir=str(other)), "train_tasks", 0)
    assert len(set(builds)) == 2
    assert len(group_tasks(config, "train_tasks", 0)) == 5
    assert len(builds) == 3


def test_a_truncated_index_is_built_again(sni: Path, tmp_path: Path, builds: list[Path]) -> None:
    config = DataConfig(sni_dir=str(sni), index_dir=str(tmp_path / "index"))
    expected = fingerprint(group_tasks(config, "train_tasks", 0))
    content = (builds[0] / EXAMPLES).read_bytes()
    (builds[0] / EXAMPLES).write_bytes(content[:-100])
    assert fingerprint(group_tasks(config, "train_tasks", 0)) == expected
    assert len(builds) == 2
    TaskIndex(builds[0]).verify()


def test_other_ranks_open_what_rank_0_prepared(
    sni: Path, tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(data=DataConfig(sni_dir=str(sni), index_dir=str(tmp_path / "index")))
    monkeypatch.setattr(indexes, "is_main", lambda: False)
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        training_split(replace(config.data, validation_tasks=1), 0)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(indexes, "is_main", distributed.is_main)
    prepare_index(config)
    assert len(builds) == 1
    monkeypatch.setattr(indexes, "is_main", lambda: False)
    monkeypatch.setattr(indexes.sni, "listing", lambda address: pytest.fail("a rank listed the data again"))
    assert len(training_split(replace(config.data, validation_tasks=1), 0)[0]) == 4


def test_two_jobs_build_one_index(sni: Path, tmp_path: Path, builds: list[Path]) -> None:
    config = DataConfig(sni_dir=str(sni), index_dir=str(tmp_path / "index"))
    found: list[str] = []

    def read() -> None:
        found.append(fingerprint(group_tasks(config, "train_tasks", 0)))

    jobs = [threading.Thread(target=read) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(found) == 4
    assert len(set(found)) == len(builds) == 1


def test_one_task_needs_no_index(tmp_path: Path, builds: list[Path]) -> None:
    french = {**GOOD, "Output_language": ["French"]}
    folder = write(tmp_path, {"fr": french, "bad": {**GOOD, "Instances": [{}, *GOOD["Instances"]]}, "no": "{"})
    task = one_task(folder / "tasks/fr.json", DataConfig(max_instances=2), 0)
    assert (task.name, task.definition, len(task.examples)) == ("fr", "Add the numbers.\n\n", 2)
    with pytest.raises(UserError, match=r"bad\.json: instance 0 lacks"):
        one_task(folder / "tasks/bad.json", DataConfig(), 0)
    assert len(one_task(folder / "tasks/bad.json", DataConfig(malformed="skip"), 0).examples) == 3
    for malformed in ("error", "skip"):
        with pytest.raises(UserError, match=r"no\.json is not JSON"):
            one_task(folder / "tasks/no.json", DataConfig(malformed=malformed), 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"gone\.json is missing"):
        one_task(folder / "tasks/gone.json", DataConfig(), 0)
    assert not builds


@pytest.fixture
def p3(tmp_path: Path) -> Path:
    folder = tmp_path / "p3"
    (folder / "templates/imdb").mkdir(parents=True)
    (folder / "templates/imdb/templates.yaml").write_text(TEMPLATE)
    for group, rows in (("train", 6), ("validation", 2)):
        lines = [
            {
                "inputs_pretokenized": f"Review: number {n} of {group}. Is it positive or negative?",
                "targets_pretokenized": "positive",
                "answer_choices": ["negative", "positive"],
            }
            for n in range(rows)
        ]
        (folder / "imdb_Is_it").mkdir(exist_ok=True)
        (folder / f"imdb_Is_it/{group}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_sni_and_p3_together(sni: Path, p3: Path, tmp_path: Path) -> None:
    data = DataConfig(sni_dir=str(sni), p3_dir=str(p3), p3_train="imdb", index_dir=str(tmp_path / "index"))
    data = replace(data, validation_tasks=1, p3_max_examples=4)
    train, validation = training_split(data, 0)
    tasks = {task.name: task for task in train + validation}
    assert len(tasks) == 6
    review = tasks["imdb_Is_it"]
    assert (review.collection, review.source, len(review.examples)) == ("p3", "imdb", 4)
    assert review.examples[0].choices == ("negative", "positive")
    assert len({e.id for t in tasks.values() for e in t.examples}) == 5 * 3 + 4
    (evaluated,) = group_tasks(data, "p3:imdb", 0)
    assert len(evaluated.examples) == 2
    assert not {e.id for e in evaluated.examples} & {e.id for e in review.examples}
    alone, _ = training_split(replace(data, sni_dir=None, validation_split="p3:imdb"), 0)
    assert [task.name for task in alone] == ["imdb_Is_it"]
    validation = training_split(replace(data, validation_split="p3:imdb", max_instances=1), 0)[1]
    assert [len(task.examples) for task in validation] == [1]
    with pytest.raises(UserError, match="t0 is in both"):
        training_split(replace(data, validation_split="train_tasks"), 0)


def _reviews(folder: Path, template: str, rows: int, unlike: int | None = None) -> None:
    """Rows of a template to be tested on; one of them may be unlike its wording."""
    lines = [
        {
            "inputs_pretokenized": "?" if n == unlike else f"Review: number {n}. Is it positive or negative?",
            "targets_pretokenized": "positive",
            "answer_choices": ["negative", "positive"],
        }
        for n in range(rows)
    ]
    (folder / f"imdb_{template}").mkdir(exist_ok=True)
    (folder / f"imdb_{template}/validation.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_rows_of_p3_are_tested_whatever_seed_and_training_cap(p3: Path, tmp_path: Path, builds: list[Path]) -> None:
    second = TEMPLATE.split("templates:\n")[1].replace("1111-1111", "2222-2222").replace("Is it\n", "Was it\n")
    (p3 / "templates/imdb/templates.yaml").write_text(TEMPLATE + second)
    _reviews(p3, "Is_it", 60)
    _reviews(p3, "Was_it", 60, unlike=0)
    data = DataConfig(p3_dir=str(p3), p3_train="imdb", p3_max_examples=4, malformed="skip")
    config = RunConfig(data=replace(data, index_dir=str(tmp_path / "index"), max_instances=5))
    config.evaluation.groups = {"reviews": "p3:imdb"}

    def tested(most: int, **data: object) -> list[list[str]]:
        config.evaluation.max_instances = most
        run = replace(config, data=replace(config.data, **data))  # type: ignore[arg-type]
        return [[e.id.split("/")[-1] for e in task.examples] for task in evaluated_groups(run)["reviews"].tasks]

    assert [len(rows) for rows in tested(100)] == [60, 59], "the cap on training examples has no say"
    assert evaluated_groups(config)["reviews"].left_out == {"malformed": {"imdb_Was_it": 1}}
    some = tested(30)
    cut = {"imdb_Is_it": 60, "imdb_Was_it": 59}
    assert evaluated_groups(config)["reviews"].left_out == {"malformed": {"imdb_Was_it": 1}, "cut": cut}
    assert [len(rows) for rows in some] == [30, 30]
    assert len(set(some[0]) ^ set(some[1])) <= 2, "both templates have the same reviews, but for what cannot be read"
    assert some[0] != [str(n) for n in range(30)], "drawn: the first ones may be of one kind"
    assert [set(less) < set(more) for less, more in zip(tested(10), some, strict=True)] == [True, True]
    assert tested(30, max_instances=1, p3_max_examples=2) == some
    read = len(builds)
    for seed in range(3):
        config.seed = seed
        prepare_index(config)
        assert tested(30) == some
        train, validation = training_split(replace(config.data, validation_split="p3:imdb"), seed)
        assert [len(task.examples) for task in [*train, *validation]] == [4, 5, 5]
    assert len(builds) == read + 1, "P3 is read once for all seeds: to be tested on before, and now to be trained on"


def test_a_run_prepares_every_index_that_it_reads(sni: Path, p3: Path, tmp_path: Path, builds: list[Path]) -> None:
    data = DataConfig(sni_dir=str(sni), p3_dir=str(p3), p3_train="imdb", index_dir=str(tmp_path / "index"))
    config = RunConfig(data=replace(data, validation_tasks=1))
    config.evaluation.groups = {"seen": "train_tasks", "reviews": "p3:imdb"}
    assert len(prepare_index(config)) == 3
    training_split(config.data, config.seed)
    for spec in evaluation_groups(config).values():
        group_tasks(config.data, spec, config.seed)
    assert len(builds) == 3


def test_groups_where_none_are_named() -> None:
    assert evaluation_groups(RunConfig(data=DataConfig(sni_dir="s"))) == {"test": "test_tasks"}
    assert evaluation_groups(RunConfig(data=DataConfig(sni_dir="s", p3_dir="p"))) == {"test": "test_tasks"}
    assert evaluation_groups(RunConfig(data=DataConfig(p3_dir="p"))) == {"mtest11": "p3:mtest11"}


_FIRST = """
import os, sys, time
from tagi_ds.engine.distributed import barrier, leave, main_first, start
from tagi_ds.errors import UserError
from tagi_ds.stages.evaluate import evaluated_groups
ranks = start(20)
def work():
    assert ranks.is_main
    time.sleep(1)
    if sys.argv[1] == "refuse":
        raise UserError("the data are gone", "fetch them")
    if sys.argv[1] == "die":
        os._exit(7)
    print("prepared", flush=True)
try:
    for _ in range(2):
        main_first(work)
    print("went on", flush=True)
    barrier()
except UserError as error:
    print(f"told: {error.problem}", flush=True)
leave()
"""


@pytest.mark.parametrize("how", ["work", "refuse", "die"])
def test_the_others_wait_for_rank_0_and_learn_how_it_ended(how: str, tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(_FIRST)
    ended = run_ranks(script, 2, [how], check=False)
    if how == "work":
        assert ended.statuses == [0, 0], ended.text
        assert ended.outputs[0].count("prepared") == 2
        assert "went on" in ended.outputs[1]
    elif how == "refuse":
        assert [output.count("told: the data are gone") for output in ended.outputs] == [1, 1]
    else:
        assert ended.statuses[0] == 7
        assert ended.statuses[1] not in (0, -9), ended.text
        assert "frame #" not in ended.outputs[1], "a C++ trace"
