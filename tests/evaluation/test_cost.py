"""What answering costs: operations against a count by hand, and how the four ways relate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Example, Task
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.evaluation import cost
from tagi_ds.evaluation.cost import WAYS, measured_cost, operations_of, spread, ways_of
from tagi_ds.evaluation.dealing import evaluating
from tagi_ds.evaluation.generation import GenerationSettings
from tagi_ds.experiments.compute import answering_flops
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.inference import Inference
from tagi_ds.model.merging import merging_pays
from tagi_ds.plan.shapes import shapes_of

DATA = DataConfig(prompt="plain", max_source_tokens=256, max_target_tokens=16)
SETTINGS = GenerationSettings(batch_examples=8, max_new_tokens=16)


def _task(name: str = "t", words: int = 40, examples: int = 12) -> Task:
    """An instruction of 40 words, inputs and answers of one."""
    instances = tuple(Example(f"{name}-{at}", "lamp", ("bell",)) for at in range(examples))
    return Task(name, "say the chair again " * (words // 4), "c", instances)


@pytest.fixture
def collators(tiny_tokenizer: PreTrainedTokenizerBase) -> tuple[Collator, Collator]:
    return Collator(tiny_tokenizer, DATA, "hypernetwork"), Collator(tiny_tokenizer, DATA, "concatenated")


@pytest.fixture
def measured(
    tiny_tagi: TagiForConditionalGeneration, collators: tuple[Collator, Collator], tmp_path: Path
) -> dict[str, Any]:
    return measured_cost(tiny_tagi, {"g": [_task()]}, collators, SETTINGS, 1, tmp_path / "cost.json", "k")


def _by_hand(config: Any, rows: int, length: int, new_tokens: int) -> int:
    """Multiplications and additions of a gated T5's generation: matrix products and attention's two, without biases."""
    d, inner, ff = config.d_model, config.num_heads * config.d_kv, config.d_ff
    encoder = rows * length * (4 * 2 * d * inner + 3 * 2 * d * ff) + rows * 4 * length * length * inner
    decoder = rows * length * 2 * 2 * d * inner  # cross-attention's keys and values, once
    for step in range(1, new_tokens + 1):
        decoder += rows * (4 * 2 * d * inner + 2 * 2 * d * inner + 3 * 2 * d * ff)
        decoder += rows * 4 * (step + length) * inner
    head = rows * new_tokens * 2 * d * config.vocab_size
    return int(config.num_layers * encoder + config.num_decoder_layers * decoder + head)


def test_concatenation_costs_what_counting_by_hand_gives_and_reading_once_is_cheaper(
    measured: dict[str, Any], tiny_tagi: TagiForConditionalGeneration, collators: tuple[Collator, Collator]
) -> None:
    task = _task()
    batches = [collators[1]([TaskChunk(task, 0, task.examples[at : at + 8], (0,) * 8)]) for at in (0,)]
    rest = collators[1]([TaskChunk(task, 0, task.examples[8:], (0,) * 4)])
    new_tokens = int((rest.labels[0] != -100).sum())
    expected = sum(
        _by_hand(tiny_tagi.backbone.config, *batch.input_ids.shape, new_tokens) for batch in (*batches, rest)
    )
    assert measured["flops"]["g"]["operations"]["concatenated"] == expected
    assert measured["flops"]["g"]["per_task"]["t"]["tokens"]["output"] == new_tokens

    flops = measured["flops"]["g"]
    shares = flops["relative"]
    assert shares["concatenated"] == 1
    assert 0 < shares["compiled"] < shares["once"] < shares["every_batch"] < 1
    # Two batches read the instruction twice and merge its adapters twice; once a task both are done once.
    rank = tiny_tagi.config.rank
    merging = sum(2 * site.d_out * rank * site.d_in for site in tiny_tagi.site_table)
    operations = flops["operations"]
    reading = operations["once"] - operations["compiled"]
    assert operations["every_batch"] - operations["compiled"] == 2 * reading + merging
    tokens = flops["per_task"]["t"]["tokens"]
    assert tokens["instruction"] > 10 * tokens["input"]
    # Each text ends with an end token of its own, and a line break joins them.
    assert abs(tokens["concatenated"] - tokens["instruction"] - tokens["input"]) <= 1
    assert (flops["examples"], list(flops["per_task"])) == (12, ["t"])
    assert flops["per_task"]["t"]["relative"] == shares
    cost = measured["cost"]["g"]
    assert set(cost["seconds"]) == set(cost["peak_memory"]) == set(WAYS)
    assert all(seconds > 0 for seconds in cost["seconds"].values())
    assert all(memory is None or memory >= 0 for memory in cost["peak_memory"].values())


def test_every_way_generates_as_many_tokens(
    tiny_tagi: TagiForConditionalGeneration, collators: tuple[Collator, Collator], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    class Watched(Inference):
        def generate(self, *args: Any, **settings: Any) -> Tensor:
            tokens = super().generate(*args, **settings)
            lengths.append(tokens.shape[1])
            return tokens

    monkeypatch.setattr(cost, "Inference", Watched)
    with torch.no_grad():
        cost._group(tiny_tagi, [_task()], collators, SETTINGS)
    assert len(lengths) == 2 * 2 * len(WAYS), "two batches, counted and timed"
    assert len(set(lengths)) == 1


def test_the_plain_backbone_is_the_backbone_without_any_hook(
    tiny_tagi: TagiForConditionalGeneration, tiny_backbone: Any
) -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    counts, answers = [], []
    for model in (tiny_tagi.backbone, tiny_backbone):
        meter = FlopMeter()
        with meter.counting():
            answers.append(model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False))
        counts.append(meter.flops)
    assert torch.equal(*answers)
    assert counts[0] == counts[1]


def test_it_is_measured_once(
    tiny_tagi: TagiForConditionalGeneration,
    collators: tuple[Collator, Collator],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "cost.json"
    first = measured_cost(tiny_tagi, {"g": [_task(examples=1)]}, collators, SETTINGS, 1, path, "k")
    calls: list[Any] = []
    group = cost._group
    monkeypatch.setattr(cost, "_group", lambda *given: calls.append(given) or group(*given))
    assert measured_cost(tiny_tagi, {"g": [_task(examples=1)]}, collators, SETTINGS, 1, path, "k") == first
    assert not calls
    again = measured_cost(tiny_tagi, {"g": [_task(examples=1)]}, collators, SETTINGS, 1, path, "another")
    assert len(calls) == 1
    assert again["flops"] == first["flops"], "operations are no matter of chance"


def test_tasks_are_spread_over_the_lengths() -> None:
    tasks = [_task(f"t{at}", words=4 * (at + 1)) for at in (4, 2, 0, 3, 1)]
    assert [task.name for task in spread(tasks, 1)] == ["t2"], "the median"
    assert [task.name for task in spread(tasks, 2)] == ["t1", "t3"]
    assert [task.name for task in spread(tasks, 9)] == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.parametrize(("inputs", "words", "merges"), [(48, 15, True), (1, 1, False)])
def test_what_a_study_reckons_is_about_what_is_counted(
    tiny_tagi: TagiForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerBase,
    inputs: int,
    words: int,
    merges: bool,
) -> None:
    instances = tuple(Example(f"{at}", " ".join(["lamp"] * words), ("bell lamp",)) for at in range(inputs))
    task = Task("t", "say the chair again " * 10, "c", instances)
    data = dataclasses.replace(DATA, pad_multiple=1)
    collators = Collator(tiny_tokenizer, data, "hypernetwork"), Collator(tiny_tokenizer, data, "concatenated")
    with evaluating(tiny_tagi):
        runs, tokens = ways_of(tiny_tagi, task, collators, GenerationSettings(batch_examples=inputs))
        counted = {way: operations_of(runs[way]) for way in ("once", "concatenated")}
    lengths = tuple(round(tokens[name]) for name in ("instruction", "input", "output"))
    assert merging_pays(tiny_tagi.site_table, inputs * lengths[1], inputs * lengths[2]) == merges
    own, plain = shapes_of(tiny_tagi.backbone, tiny_tagi), shapes_of(tiny_tagi.backbone, None)
    assert answering_flops(own, lengths, inputs) == pytest.approx(counted["once"], rel=0.05)
    joined = (0, round(tokens["concatenated"]), lengths[2])
    assert answering_flops(plain, joined, inputs) == pytest.approx(counted["concatenated"], rel=0.05)
