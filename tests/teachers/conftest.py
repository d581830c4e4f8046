"""A small data folder in SNI's layout, teachers' settings for it, and stores to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, RunConfig, TeacherConfig
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Example, Task
from tagi_ds.model.adapter import LowRank
from tagi_ds.teachers import logit_shards, logit_store, parameter_store
from tagi_ds.teachers.logit_entries import top_k
from tests.teachers.stage_process import STAGES, make_config, run_stage

SITES = {"encoder.q": (6, 5), "decoder.v": (4, 7)}
"""Site -> d_in, d_out of the hand-made parameter store."""
RANK, SCALING = 3, 2.0
BINDING = {"backbone": "b" * 64, "tokenizer": "t" * 64, "inputs": "d" * 64, "sites": list(SITES), "unit": "task"}
LOGIT_HEADER = {"method": "topk", "temperature": 1.0, "vocabulary": 330}
WORDS = ("lamp", "chair", "bell", "box")


Done = tuple[RunConfig, dict[str, dict[str, Any]]]
"""Configuration of a study, and stage -> summary."""


def make_tasks(count: int = 6, examples: int = 12) -> list[Task]:
    """Tasks of three categories; each answers every input with its own word, so that an adapter helps at once."""
    tasks = []
    for number in range(count):
        answer = WORDS[number % len(WORDS)]
        rows = tuple(
            Example(f"task{number}-{i}", f"say the {WORDS[i % 4]} {WORDS[i // 4 % 4]} again", (answer,))
            for i in range(examples)
        )
        tasks.append(Task(f"task{number}", f"say {answer} again", f"category {number % 3}", rows))
    return tasks


def write_sni(folder: Path, tasks: list[Task]) -> Path:
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for task in tasks:
        instances = [{"id": e.id, "input": e.input, "output": list(e.references)} for e in task.examples]
        content = {"Definition": [task.definition], "Categories": [task.category], "Instances": instances}
        (folder / "tasks" / f"{task.name}.json").write_text(json.dumps(content))
    names = "\n".join(task.name for task in tasks)
    (folder / "splits" / "default" / "train_tasks.txt").write_text(names)
    return folder


@pytest.fixture(scope="session")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sni(tmp_path_factory.mktemp("sni") / "data", make_tasks())


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, sni: Path, tiny_folder: Path) -> Done:
    """A study with both stages done in one unbroken process, and their summaries; not to be changed."""
    config = make_config(tmp_path_factory.mktemp("study"), sni, tiny_folder)
    return config, {name: run_stage(name, config) for name in STAGES}


@pytest.fixture
def toy_teachers() -> TeacherConfig:
    return TeacherConfig(
        unit="task", batched=2, examples=4, steps=8, learning_rate=3e-2, validation_share=0.25, top_k=12
    )


@pytest.fixture
def input_collator(tiny_tokenizer: PreTrainedTokenizerBase) -> Collator:
    return Collator(tiny_tokenizer, DataConfig(prompt="plain", max_source_tokens=32), "input_only")


def random_factors(seed: int) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        site: LowRank(torch.randn(RANK, d_in, generator=generator), torch.randn(d_out, RANK, generator=generator))
        for site, (d_in, d_out) in SITES.items()
    }


@pytest.fixture
def parameter_folder(tmp_path: Path) -> Path:
    """Teachers `one` and `two`, and `weak`, which is left out of the alignment; `never` was left out by choice."""
    folder = tmp_path / "parameters"
    parameter_store.write_common(folder, {site: pair.a for site, pair in random_factors(0).items()})
    units = {}
    for seed, unit in enumerate(("one", "two", "weak"), start=1):
        parameter_store.write_unit(folder, unit, random_factors(seed), {"settings": "s"})
        units[unit] = {"aligned": unit != "weak"}
    header = {"binding": BINDING, "gauge": "trained", "sites": list(SITES), "rank": RANK, "scaling": SCALING}
    parameter_store.finish(folder, units, header, left_out=["never"])
    return folder


def logit_rows(first: int, examples: int, k: int = 12, dtype: logit_shards.StoreDtype = "float16") -> list[dict]:
    """Rows of `examples` examples named ex<n>, and their labels by id, from random logits over 330 tokens."""
    generator = torch.Generator().manual_seed(first)
    labels = torch.randint(3, 330, (examples, 6), generator=generator)
    labels[1::2, 4:] = -100
    entries = top_k(torch.randn(examples, 6, 330, generator=generator) * 3, k, 1.0)
    names = [f"ex{first + i}" for i in range(examples)]
    return list(logit_shards.rows_of(names, labels, entries, logit_shards.Layout(dtype=dtype)))


@pytest.fixture
def logit_folder(tmp_path: Path) -> Path:
    """Two shards of four examples."""
    folder = tmp_path / "logits"
    shards = [folder / f"shard-{n:05d}.arrow" for n in range(2)]
    for number, path in enumerate(shards):
        logit_shards.write_shard(path, logit_rows(4 * number, 4), "s")
    binding = {"tokenizer": "t" * 64, "dataset": "d" * 64, "temperature": 1.0, "seed": 0}
    logit_store.finish(folder, shards, {"binding": binding, **LOGIT_HEADER})
    return folder
