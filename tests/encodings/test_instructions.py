"""The finetuning stage with its cache: when it is used, what is in it, and that a run goes on to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, LossConfig, RunConfig
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Batch
from tagi_ds.data.mixture import TaskMixture, evaluation_batches
from tagi_ds.encodings import instructions
from tagi_ds.encodings.instructions import open_cache
from tagi_ds.encodings.store import EncodingStore, key_of
from tagi_ds.engine import distributed
from tagi_ds.engine.strategy import make_strategy
from tagi_ds.errors import UserError
from tagi_ds.launch import Stage
from tagi_ds.model.backbone import load_backbone
from tagi_ds.model.configuration import TagiConfig
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.recipe_rules import check
from tests import finetuning
from tests.conftest import MakeTagi, model_inputs
from tests.finetuning import Variant
from tests.teachers.conftest import make_tasks, write_sni


@pytest.fixture(scope="module")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tasks, each with a second wording of its own and an example."""
    folder = write_sni(tmp_path_factory.mktemp("sni") / "data", make_tasks())
    for path in (folder / "tasks").iterdir():
        content = json.loads(path.read_text())
        content["Definition"].append(f"{content['Definition'][0]} and again, as {path.stem} says")
        content["Positive Examples"] = [{"input": "say the lamp", "output": "lamp"}]
        path.write_text(json.dumps(content))
    return folder


def make_config(study: Path, sni: Path, backbone: Path, name: str, cache: str = "on") -> RunConfig:
    config = finetuning.finetune_config(study, sni, backbone, name, Variant(cache=cache))
    config.loss = LossConfig()
    config.engine.evaluate_every = 6
    return config


def run(config: RunConfig, until: int = finetuning.STEPS) -> list[dict[str, float]]:
    """Finetunes; losses, validation figures and gradient norms of every step."""
    with pytest.MonkeyPatch.context() as patch:
        finetuning.finetune(config, patch, until)
    lines = map(json.loads, (Path(str(config.output_dir)) / "metrics.jsonl").read_text().splitlines())
    kept = ("loss/", "validation/", "grad_norm", "step")
    return [{name: value for name, value in line.items() if name.startswith(kept)} for line in lines]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, sni: Path, tiny_folder: Path) -> list[dict[str, float]]:
    return run(make_config(tmp_path_factory.mktemp("study"), sni, tiny_folder, "cached"))


def test_training_and_validation_are_those_of_encoding_in_every_step(
    cached: list[dict[str, float]], tmp_path: Path, sni: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "InstructionCache", pytest.fail)
    plain = run(make_config(tmp_path, sni, tiny_folder, "plain", cache="off"))
    assert len(plain) == len(cached) == finetuning.STEPS
    assert "validation/loss" in plain[-1]
    for mine, theirs in zip(cached, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("damage", ["none", "removed", "truncated"])
def test_an_interrupted_run_goes_on_to_the_last_bit(
    damage: str, cached: list[dict[str, float]], tmp_path: Path, sni: Path, tiny_folder: Path
) -> None:
    config = make_config(tmp_path, sni, tiny_folder, "broken")
    run(config, until=9)
    folder = tmp_path / "broken" / instructions.FOLDER
    file = next(folder.glob("encodings-*"))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "removed":
        for path in folder.iterdir():
            path.unlink()
    assert run(config) == cached
    assert not folder.exists(), "nothing reads it after the run"


@pytest.mark.parametrize("also_train", ["norms", "embeddings"])
def test_where_encodings_change_they_are_not_kept(
    also_train: str,
    tmp_path: Path,
    sni: Path,
    tiny_folder: Path,
    make_tagi: MakeTagi,
    tiny_tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(tmp_path, sni, tiny_folder, "refused")
    model = make_tagi()
    model.freeze(also_train)
    told = f"model.also_train {also_train}"
    stage = Stage("finetune", config, distributed.current(), tmp_path)
    collator = Collator(tiny_tokenizer, config.data)
    given: Any = (stage, model, [], [], collator, make_strategy(config.engine, distributed.current()))
    with pytest.raises(UserError, match=rf"engine\.instruction_cache on with {told}: .*\n.*mend: set"):
        open_cache(*given)
    config.engine.instruction_cache = "auto"
    assert open_cache(*given) is None
    assert capsys.readouterr().out == f"finetune: instructions are encoded in every step ({told})\n"
    config.engine.instruction_cache = "off"
    assert open_cache(*given) is None
    assert not capsys.readouterr().out


def test_rules_refuse_it_where_no_step_could_use_it() -> None:
    config = RunConfig()
    config.engine.instruction_cache = "on"
    with pytest.raises(UserError, match="in pretraining"):
        check(config, "pretrain")
    check(config, "finetune")
    config.model.also_train = "norms"
    with pytest.raises(UserError, match=r"model\.also_train norms"):
        check(config, "finetune")


def test_a_model_whose_encodings_change_takes_none(make_tagi: MakeTagi, tiny_batch: Batch) -> None:
    model = make_tagi()
    inputs = model_inputs(tiny_batch)
    encoding = model.encode_instructions(inputs["instruction_ids"], inputs["instruction_attention_mask"])
    model(**inputs, instruction_encoding=encoding)
    model.freeze("norms")
    with pytest.raises(ValueError, match="a frozen encoder alone"):
        model(**inputs, instruction_encoding=encoding)


def test_a_frozen_encoder_reads_instructions_without_dropout(tiny_folder: Path, tiny_batch: Batch) -> None:
    inputs = model_inputs(tiny_batch)
    asked = inputs["instruction_ids"], inputs["instruction_attention_mask"]
    backbone = load_backbone(tiny_folder, dropout_rate=0.5)
    model = TagiForConditionalGeneration.from_backbone(backbone, TagiConfig(rank=2, bottleneck=8)).train()
    constant = model.encode_instructions(*asked)
    assert torch.equal(constant, model.encode_instructions(*asked))
    assert all(module.training for module in model.modules()), "and goes on with dropout elsewhere"
    losses = {float(model(**inputs, instruction_encoding=constant).logits.detach().sum()) for _ in range(3)}
    assert len(losses) == 3
    model.freeze("all")
    assert not torch.equal(model.encode_instructions(*asked), model.encode_instructions(*asked))


def test_the_encoder_does_not_run_and_the_gradients_are_the_same(tiny_tagi: Any, tiny_batch: Batch) -> None:
    inputs = model_inputs(tiny_batch)
    mask = inputs["instruction_attention_mask"]
    encoding = tiny_tagi.encode_instructions(inputs["instruction_ids"], mask)
    passes: list[Any] = []
    tiny_tagi.backbone.encoder.register_forward_hook(lambda *given: passes.append(given))
    found = []
    for given in ({}, {"instruction_encoding": encoding * mask[..., None], "instruction_ids": None}):
        tiny_tagi.zero_grad()
        logits = tiny_tagi(**{**inputs, **given}).logits
        logits.logsumexp(-1).sum().backward()
        named = tiny_tagi.named_parameters()
        found.append((logits.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}, len(passes)))
    (plain, theirs, both), (cached, mine, one_more) = found
    assert (both, one_more) == (2, 3)
    torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-6)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("prompt", "positives"), [("plain", 0), ("tk_instruct", 2)])
def test_every_wording_that_a_batch_has_is_in_the_cache(
    prompt: Any, positives: int, sni: Path, tiny_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = RunConfig()
    config.data = DataConfig(sni_dir=str(sni), prompt=prompt, positives=positives, validation_tasks=2)
    tasks, validation_tasks = training_split(config.data, 0)
    collator = Collator(tiny_tokenizer, config.data)
    keys = {key_of(ids) for ids in instructions.wordings(tasks, validation_tasks, collator)}
    texts = {text for task in tasks for text in (task.definition, *task.paraphrases)}
    assert len(texts) > len(tasks)
    assert len(keys) == len(texts | {task.definition for task in validation_tasks})
    batches = evaluation_batches(validation_tasks, collator, 8)
    source = TaskMixture(tasks, collator, seed=1, tasks_per_batch=2, examples_per_task=2)
    batches += [batch for _ in range(40) for batch in source.next_step()]
    seen = set()
    for batch in batches:
        assert batch.instruction_ids is not None
        assert batch.instruction_attention_mask is not None
        lengths = batch.instruction_attention_mask.sum(1).tolist()
        seen |= {key_of(row[:length].numpy()) for row, length in zip(batch.instruction_ids, lengths, strict=True)}
    assert seen == keys, "and nothing else is"


def test_a_wording_that_is_not_there_is_an_error(
    tmp_path: Path, sni: Path, tiny_folder: Path, make_tagi: MakeTagi, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(tmp_path, sni, tiny_folder, "lacking")
    strategy = make_strategy(config.engine, distributed.current())
    strategy.prepare(make_tagi(), config.optimizer, 1)
    tasks, _ = training_split(config.data, 0)
    collator = Collator(tiny_tokenizer, config.data)
    stage = Stage("finetune", config, distributed.current(), tmp_path)
    cache = open_cache(stage, make_tagi(), tasks[:1], [], collator, strategy)
    assert cache is not None
    batches = [collator([TaskChunk(task, 0, (task.examples[0],), (0,))]) for task in tasks]
    with pytest.raises(RuntimeError, match="before they were encoded"):
        cache.attach(batches[0])
    cache.build(strategy)
    attached = cache.attached(batches[:1])[0:][0]
    assert attached.instruction_encoding is not None
    assert batches[0].instruction_encoding is None, "the list itself stays as small as it was"
    with pytest.raises(UserError, match="lacks an instruction"):
        cache.attach(batches[-1])
    assert len(EncodingStore(cache.folder, cache.binding)) == 2
