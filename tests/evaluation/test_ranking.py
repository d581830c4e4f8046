"""Rank classification: the likelihoods, how often the encoder runs, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import Collator, Form, TaskChunk
from tagi_ds.data.examples import Example, Task
from tagi_ds.evaluation import ranking
from tagi_ds.evaluation.dealing import collate_pairs
from tagi_ds.evaluation.generation import GenerationSettings
from tagi_ds.evaluation.predictions import Prediction
from tagi_ds.evaluation.ranking import chosen, has_choices, rank
from tagi_ds.model import TagiForConditionalGeneration
from tests.conftest import MakeTagi

DATA = DataConfig(prompt="plain", max_source_tokens=64, max_target_tokens=8)
CHOICES = ("lamp", "the bell again", "chair", "say")


def ranked_tasks() -> list[Task]:
    """Three tasks whose examples have two to four choices, one of them too long for eight tokens."""

    def example(task: int, number: int) -> Example:
        choices = CHOICES[: 2 + (task + number) % 3]
        if number == 3:
            choices = (*choices, "box " * 20)
        text = f"say the {CHOICES[number % 4]} " * (1 + number % 3)
        return Example(f"t{task}-{number}", text, (choices[number % 2],), choices)

    return [
        Task(f"t{at}", f"{CHOICES[at]} or chair?", "c", tuple(example(at, n) for n in range(5)), source=f"s{at}")
        for at in range(3)
    ]


def run(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, form: Form, folder: Path, rows: int = 6
) -> list[Prediction]:
    collator = Collator(tokenizer, DATA, form)
    settings = GenerationSettings(rows, 8)
    return rank(
        model,
        ranked_tasks(),
        collate_pairs(collator),
        lambda text: collator.encode(text, "target"),
        settings,
        folder,
        "g",
        {"model": "x"},
        progress=False,
    )


@pytest.fixture(params=["hypernetwork", "concatenated"])
def form(request: pytest.FixtureRequest) -> Form:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def model(form: Form, make_tagi: MakeTagi, tiny_backbone: nn.Module) -> Any:
    return make_tagi() if form == "hypernetwork" else tiny_backbone


@torch.no_grad()
def _alone(
    model: Any, tokenizer: PreTrainedTokenizerBase, form: Form, task: Task, example: Example
) -> list[list[float]]:
    """The log-probability of every token of every choice, one forward of the whole model for each."""
    collator = Collator(tokenizer, DATA, form)
    scores = []
    for choice in example.choices:
        one = Example("x", example.input, (choice,))
        batch = collator([TaskChunk(task, 0, (one,), (0,))])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
        if form == "hypernetwork":
            inputs |= {"instruction_ids": batch.instruction_ids, "task_index": batch.task_index}
            inputs |= {"instruction_attention_mask": batch.instruction_attention_mask}
        probabilities = model(**inputs).logits[0].log_softmax(-1)
        tokens = [token for token in batch.labels[0].tolist() if token != -100]
        scores.append([float(probabilities[at, token]) for at, token in enumerate(tokens)])
    return scores


def test_likelihoods_are_those_of_each_choice_alone(
    model: Any, tiny_tokenizer: PreTrainedTokenizerBase, form: Form, tmp_path: Path
) -> None:
    found = run(model, tiny_tokenizer, form, tmp_path)
    examples = [(task, example) for task in ranked_tasks() for example in task.examples]
    assert [one.id for one in found] == [example.id for _, example in examples]
    for one, (task, example) in zip(found, examples, strict=True):
        scores = _alone(model, tiny_tokenizer, form, task, example)
        assert one.lengths == tuple(len(tokens) for tokens in scores)
        assert one.likelihoods == pytest.approx([sum(tokens) for tokens in scores], abs=2e-5)
        means = [sum(tokens) / len(tokens) for tokens in scores]
        sums = [sum(tokens) for tokens in scores]
        assert one.prediction == chosen(one, normalised=True) == example.choices[means.index(max(means))]
        assert chosen(one, normalised=False) == example.choices[sums.index(max(sums))]
    assert max(length for one in found for length in one.lengths) == 8, "cut as targets are"
    assert any(chosen(one, True) != chosen(one, False) for one in found), "lengths matter in this test"
    assert len({one.prediction for one in found}) > 1


def test_the_encoder_reads_each_input_once_and_a_batch_is_one_forward(
    model: Any, tiny_tokenizer: PreTrainedTokenizerBase, form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = model.backbone if form == "hypernetwork" else model
    read: list[int] = []
    decoded: list[int] = []
    backbone.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    backbone.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: decoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    planned: list[Sequence[Any]] = []
    plan = ranking.plan_batches
    monkeypatch.setattr(ranking, "plan_batches", lambda *args: planned.extend(plan(*args)) or planned)
    run(model, tiny_tokenizer, form, tmp_path)
    choices = [sum(len(example.choices) for _, example in batch) for batch in planned]
    assert decoded == choices
    assert max(choices) <= 6
    inputs = [len(batch) for batch in planned]
    if form == "concatenated":
        assert read == inputs
    else:
        expected, known = [], set()
        for batch in planned:
            new = {task.name for task, _ in batch} - known
            known |= new
            expected += [*[1] * len(new), len(batch)]
        assert read == expected, "each instruction once, however many batches ask for it"


def test_keys_and_values_of_an_input_are_projected_once_for_its_choices(
    model: Any, tiny_tokenizer: PreTrainedTokenizerBase, form: Form, tmp_path: Path
) -> None:
    backbone = model.backbone if form == "hypernetwork" else model
    projected: list[int] = []
    attention = backbone.decoder.block[1].layer[1].EncDecAttention
    attention.k.register_forward_hook(lambda *given: projected.append(len(given[2])))
    run(model, tiny_tokenizer, form, tmp_path)
    instructions = 3 if form == "hypernetwork" else 0
    assert sum(projected) == 15 + instructions, "as many as there are examples, and instructions, rather than choices"


def test_interrupted_it_goes_on_to_the_same_file(
    model: Any, tiny_tokenizer: PreTrainedTokenizerBase, form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, tiny_tokenizer, form, tmp_path / "whole")
    score, calls = ranking.choice_likelihoods, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(ranking, "choice_likelihoods", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, tiny_tokenizer, form, tmp_path / "broken")
    assert run(model, tiny_tokenizer, form, tmp_path / "broken") == [
        Prediction(**{**vars(one), "seconds": 0.0}) for one in whole
    ]
    files = [(tmp_path / name / "g.jsonl").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]
    batches = len(calls)
    run(model, tiny_tokenizer, form, tmp_path / "broken")
    assert len(calls) == batches, "what is done is read"


def test_a_group_is_ranked_only_where_every_example_has_choices() -> None:
    tasks = ranked_tasks()
    assert has_choices(tasks)
    assert not has_choices([*tasks, Task("open", "say", "c", (Example("o", "in", ("out",)),))])


def test_an_example_may_have_more_choices_than_a_batch_has_rows(
    tiny_tagi: TagiForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = run(tiny_tagi, tiny_tokenizer, "hypernetwork", tmp_path, rows=1)
    assert len(found) == 15
