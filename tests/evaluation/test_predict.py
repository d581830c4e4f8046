"""Predictions: which batches, what the model is given, and what an interruption leaves."""

import itertools
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ds.config import DataConfig, EvaluationConfig
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.tokenizer import train_tokenizer
from tagi_ds.errors import UserError
from tagi_ds.evaluation.dealing import Pair, collate_pairs, plan_batches
from tagi_ds.evaluation.generation import GenerationSettings, predict
from tagi_ds.evaluation.results import evaluate, gather_results, read_methods
from tagi_ds.files import read_json
from tagi_ds.model import TagiConfig, TagiForConditionalGeneration
from tagi_ds.run_folder import mark_done

SETTINGS = GenerationSettings(batch_examples=4, max_new_tokens=16)
BATCHES = [3, 2] * 3
"""Rows of the batches of three tasks of five examples."""


def make_tasks(tasks: int = 3, examples: int = 5) -> list[Task]:
    return [
        Task(
            name=f"task{at}",
            definition=f"say {at}",
            category="echo",
            examples=tuple(Example(f"task{at}-{n}", f"{at} " + "x" * (n * 7 % 5), (f"{at}",)) for n in range(examples)),
        )
        for at in range(tasks)
    ]


class Letters:
    """Bytes as tokens, shifted past the special ones."""

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [[byte + 3 for byte in text.encode()] + [1] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, (ids != 0).long()

    def batch_decode(self, tokens: Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [
            bytes(token - 3 for token in row if 3 <= token < 259).decode(errors="replace") for row in tokens.tolist()
        ]


def collate_with_instructions(pairs: Sequence[Pair]) -> Batch:
    names = list(dict.fromkeys(task.name for task, _ in pairs))
    definitions = {task.name: task.definition for task, _ in pairs}
    ids, mask = Letters().encode([example.input for _, example in pairs])
    instruction_ids, instruction_mask = Letters().encode([definitions[name] for name in names])
    index = torch.tensor([names.index(task.name) for task, _ in pairs])
    return Batch(ids, mask, ids, instruction_ids, instruction_mask, index)


def collate_concatenated(pairs: Sequence[Pair]) -> Batch:
    ids, mask = Letters().encode([f"{task.definition} {example.input}" for task, example in pairs])
    return Batch(ids, mask, ids)


class Echo(nn.Module):
    """Answers each input by its instruction, a colon and the input; fails in the call number `fails_at`."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.fails_at = fails_at
        self.calls: list[dict[str, Any]] = []

    def generate(self, **inputs: Any) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(inputs)
        said = Letters().batch_decode(inputs["instruction_ids"], True)
        given = Letters().batch_decode(inputs["input_ids"], True)
        answers = [f" {said[at]}:{text}" for at, text in zip(inputs["task_index"].tolist(), given, strict=True)]
        return Letters().encode(answers)[0]


def tiny_t5() -> T5ForConditionalGeneration:
    """Random weights far from their neutral start, so that different inputs get different answers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def _predict(model: nn.Module, folder: Path, tasks: list[Task] | None = None, **changed: Any) -> list[Any]:
    arguments: dict[str, Any] = {"settings": SETTINGS, "fingerprint": {"model": "a"}, **changed}
    tasks = make_tasks() if tasks is None else tasks
    return predict(
        model, Letters(), tasks, collate_with_instructions, folder=folder, group="g", progress=False, **arguments
    )


def test_answers_come_in_the_data_sets_order_with_their_own_instruction(tmp_path: Path) -> None:
    model = Echo().train()
    found = _predict(model, tmp_path)
    expected = [
        (example.id, f"{task.definition}:{example.input}".strip()) for task in make_tasks() for example in task.examples
    ]
    assert [(one.id, one.prediction) for one in found] == expected
    assert model.training, "the mode is put back"
    assert [len(call["input_ids"]) for call in model.calls] == BATCHES
    assert {(call["max_new_tokens"], call["num_beams"], call["do_sample"]) for call in model.calls} == {(16, 1, False)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.jsonl", "g.timing.json"]
    assert "seconds" not in (tmp_path / "g.jsonl").read_text(encoding="utf-8")
    assert read_json(tmp_path / "g.timing.json")["seconds"] > 0


def test_batches_hold_every_example_once_with_tasks_together() -> None:
    pairs = [(task, example) for task in make_tasks(5, 7) for example in task.examples]
    batches = plan_batches(pairs[::-1], 8)
    assert sorted(example.id for batch in batches for _, example in batch) == sorted(example.id for _, example in pairs)
    assert [len(batch) for batch in batches] == [7] * 5
    order = [task.name for batch in batches for task, _ in batch]
    assert len([1 for one, next_one in itertools.pairwise(order) if one != next_one]) == 4
    for name in set(order):
        lengths = [len(example.input) for batch in batches for task, example in batch if task.name == name]
        assert lengths == sorted(lengths, reverse=True)
    assert batches == plan_batches(pairs, 8), "the given order plays no part"
    assert [len(batch) for batch in plan_batches(pairs, 6)] == [4, 3] * 5, "of like sizes"
    small = plan_batches(pairs, 15)
    assert [len(batch) for batch in small] == [15, 15, 5], "tasks of less than half a batch share"
    runs = [[task.name for task, _ in batch] for batch in small]
    assert all(len(set(names)) == 1 + sum(a != b for a, b in itertools.pairwise(names)) for names in runs)


def test_a_task_of_half_a_batch_has_its_own() -> None:
    large, *rest = make_tasks(4, 3)
    large = Task("large", "say", "echo", tuple(Example(f"large-{n}", "y" * n, ("y",)) for n in range(11)))
    batches = plan_batches([(task, one) for task in (*rest, large) for one in task.examples], 8)
    assert [{task.name for task, _ in batch} for batch in batches][:2] == [{"large"}] * 2
    assert [len(batch) for batch in batches] == [6, 5, 8, 1]


def test_a_batch_is_read_while_the_one_before_is_answered(tmp_path: Path) -> None:
    read: list[int] = []
    ahead: list[int] = []

    class Slow(Echo):
        def generate(self, **inputs: Any) -> Tensor:
            deadline = time.monotonic() + 20
            while len(read) < min(len(self.calls) + 2, len(BATCHES)) and time.monotonic() < deadline:
                time.sleep(0.001)
            ahead.append(len(read) - len(self.calls))
            return super().generate(**inputs)

    def collate(pairs: Sequence[Pair]) -> Batch:
        assert threading.current_thread() is not threading.main_thread()
        batch = collate_with_instructions(pairs)
        read.append(len(pairs))
        return batch

    found = predict(Slow(), Letters(), make_tasks(), collate, SETTINGS, tmp_path, "g", {}, progress=False)
    assert read == BATCHES
    assert ahead == [2] * (len(BATCHES) - 1) + [1], "two batches are held at the most"
    assert len(found) == 15


def test_what_fails_in_reading_is_told(tmp_path: Path) -> None:
    def collate(pairs: Sequence[Pair]) -> Batch:
        raise ArithmeticError("no such text")

    with pytest.raises(ArithmeticError, match="no such text"):
        predict(Echo(), Letters(), make_tasks(), collate, SETTINGS, tmp_path, "g", {}, progress=False)


def test_a_concatenating_model_gets_no_instruction(tmp_path: Path) -> None:
    model = tiny_t5()
    tasks = make_tasks(2, 3)
    found = predict(
        model, Letters(), tasks, collate_concatenated, SETTINGS, tmp_path, "g", {"model": "t5"}, progress=False
    )
    texts = [f"{task.definition} {one.input}" for task in tasks for one in task.examples]
    for text, answer in zip(texts, found, strict=True):
        ids, _ = Letters().encode([text])
        alone = model.eval().generate(input_ids=ids, max_new_tokens=16, do_sample=False)
        assert answer.prediction == Letters().batch_decode(alone, True)[0].strip()
    assert len({answer.prediction for answer in found}) > 1


@pytest.mark.parametrize("form", ["hypernetwork", "concatenated"])
def test_real_models_through_the_collator_answer_as_alone(
    tmp_path: Path, form: Literal["hypernetwork", "concatenated"]
) -> None:
    tasks = make_tasks(2, 3)
    texts = [text for task in tasks for text in (task.definition, *(one.input for one in task.examples))] * 20
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer", 300)
    config = DataConfig(prompt="plain")
    backbone = tiny_t5()
    model: Any = backbone
    if form == "hypernetwork":
        model = TagiForConditionalGeneration.from_backbone(backbone, TagiConfig(rank=2, alpha=2.0, bottleneck=8))
        with torch.no_grad():
            for parameter in model.hypernetwork.parameters():  # off its neutral start, so that instructions matter
                parameter.add_(torch.randn_like(parameter) * 0.5)
    collate = collate_pairs(Collator(tokenizer, config, form))
    found = predict(model, tokenizer, tasks, collate, SETTINGS, tmp_path / "out", "g", {}, progress=False)
    model.eval()
    alone = []
    for pair in [(task, one) for task in tasks for one in task.examples]:
        batch = collate([pair])
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if form == "hypernetwork":
            given |= {"instruction_ids": batch.instruction_ids, "task_index": batch.task_index}
        tokens = model.generate(**given, max_new_tokens=16, do_sample=False)
        alone.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert [one.prediction for one in found] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_an_interrupted_run_goes_on(tmp_path: Path, fails_at: int) -> None:
    unbroken = _predict(Echo(), tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        _predict(Echo(fails_at), tmp_path / "broken")
    resumed = Echo()
    found = _predict(resumed, tmp_path / "broken")
    assert [(one.id, one.prediction) for one in found] == [(one.id, one.prediction) for one in unbroken]
    assert sum(len(call["input_ids"]) for call in resumed.calls) == 15 - sum(BATCHES[:fails_at])
    again = Echo(fails_at=0)
    assert _predict(again, tmp_path / "broken") == found, "a finished group is read, not generated"


def test_a_half_written_line_is_cut_off_and_generated_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _predict(Echo(2), tmp_path)
    shard = tmp_path / "g.rank0.jsonl"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(KeyboardInterrupt):
        _predict(Echo(1), tmp_path)
    lines = shard.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 + 2
    assert len({json.loads(line)["id"] for line in lines}) == 5, "a batch is answered as a whole or not at all"
    resumed = Echo()
    assert len(_predict(resumed, tmp_path)) == 15
    assert sum(len(call["input_ids"]) for call in resumed.calls) == 15 - 5


def test_shards_of_other_numbers_of_ranks_are_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _predict(Echo(2), tmp_path)
    (tmp_path / "g.rank0.jsonl").rename(tmp_path / "g.rank11.jsonl")
    (tmp_path / "g.rank0.old.jsonl").write_text("another tool's file\n")
    resumed = Echo()
    _predict(resumed, tmp_path)
    assert sum(len(call["input_ids"]) for call in resumed.calls) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.jsonl", "g.rank0.old.jsonl", "g.timing.json"]


@pytest.mark.parametrize(
    "changed",
    [
        {"fingerprint": {"model": "b"}},
        {"settings": GenerationSettings(4, max_new_tokens=15)},
        {"settings": GenerationSettings(4, 16, beams=2)},
        {"tasks": [Task("task0", "say 9", "echo", make_tasks()[0].examples), *make_tasks()[1:]]},
    ],
)
def test_predictions_of_something_else_are_not_reused(tmp_path: Path, changed: dict[str, Any]) -> None:
    _predict(Echo(), tmp_path)
    model = Echo()
    found = _predict(model, tmp_path, **changed)
    answered = [text for call in model.calls for text in Letters().batch_decode(call["input_ids"], True)]
    if "tasks" not in changed:
        assert len(answered) == 15
    else:
        assert len(answered) == 5, "two batches hold the task's five examples, and no other's"
        assert found[0].prediction.startswith("say 9:")


def test_another_batch_size_keeps_the_predictions(tmp_path: Path) -> None:
    _predict(Echo(), tmp_path)
    assert len(_predict(Echo(fails_at=0), tmp_path, settings=GenerationSettings(7, 16))) == 15


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "g.rank0.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"g\.rank0\.jsonl, line 1"):
        _predict(Echo(), tmp_path)


def test_the_same_id_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same id"):
        _predict(Echo(), tmp_path, tasks=make_tasks(1) * 2)


def test_evaluation_writes_its_results(tmp_path: Path) -> None:
    study = tmp_path / "study"
    run_dir = study / "evaluate" / "echo"
    config = EvaluationConfig(batch_examples=4, max_instances=2)
    groups = {"first": make_tasks(1), "both": make_tasks(2)}
    groups["both"][0] = Task("task0", "say", "echo", (Example("e", "say", ("other", "Say: say.")),))
    results = evaluate(
        Echo(), Letters(), groups, collate_with_instructions, config, 16, run_dir, "echo", "default", {"model": "a"}
    )
    assert read_json(run_dir / "results.json") == results
    assert (results["method"], results["split"], results["examples"]) == ("echo", "default", 5)
    assert read_json(run_dir / "predictions" / "both.timing.json")["seconds"] > 0
    assert results["per_task"]["both"]["task0"]["rouge_l"] == 100
    assert results["per_task"]["both"]["task1"]["examples"] == 2
    assert results["per_task"]["first"]["task0"]["instruction"] == "say 0"
    # "say:say" loses its colon and becomes one word; ROUGE-L keeps two.
    assert results["metrics"]["both"]["exact_match"] == 0
    assert results["metrics"]["both"]["rouge_l"] > 100 / 3
    mark_done(study / "finetune", {"steps": 3, "seconds": 2.5})
    assert read_methods(study) == {"echo": results}
    assert gather_results(study) == {
        "methods": {"echo": results["metrics"]},
        "steps": {"finetune": 3},
        "seconds": {"finetune": 2.5},
    }


def test_a_group_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="group empty"):
        evaluate(
            Echo(), Letters(), {"empty": []}, collate_with_instructions, EvaluationConfig(), 16, tmp_path, "m", "s", {}
        )
