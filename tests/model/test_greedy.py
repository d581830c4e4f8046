"""Greedy decoding of our own against transformers' ``generate``: the same tokens, in fewer rows as they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedModel

from tagi_ds.data.examples import Batch
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone
from tagi_ds.model.greedy import decode, decodes
from tagi_ds.runs import runs_of
from tests.conftest import MakeTagi, padded

NEW_TOKENS = 40
EVERY_SITE = ["q", "k", "v", "o", "wi", "wo"]
TASKS = {"one task": [1] * 7, "equal runs": [0, 0, 1, 1, 2, 2], "uneven": [0, 0, 0, 1, 2], "interleaved": [0, 1, 0, 1]}


def end_early(model: Any, answers: Tensor) -> None:
    """Makes a token that a row has, and that others lack or have later, the end token beside the usual one."""
    token = int(answers[0, 4])
    for each in {id(part): part for part in (model, getattr(model, "backbone", model))}.values():
        each.generation_config.eos_token_id = [1, token]


def ours(model: Any, ids: Tensor, mask: Tensor, state: Any = None, least: int = 0) -> Tensor:
    with torch.no_grad():
        if state is None:
            return decode(model, model.encoder(ids, mask).last_hidden_state, mask, NEW_TOKENS, least)
        memory, _ = model.encode_input(ids, mask, state)
        more: dict[str, Any] = {"scaling": model.config.scaling, "concatenate": model.config.concatenate}
        return decode(model.backbone, memory, mask, NEW_TOKENS, least, state, **more)


@pytest.mark.parametrize("kind", ["tiny_folder", "tied_folder"])
def test_a_plain_t5(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = load_backbone(folder).eval()
    ids, mask = padded([7, 4, 9, 6, 5, 12, 3], torch.Generator().manual_seed(3))
    how: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": NEW_TOKENS}
    expected = model.generate(**how)
    assert decodes(model)
    assert torch.equal(ours(model, ids, mask), expected)
    assert torch.equal(ours(model, ids, mask, least=9), model.generate(**how, min_new_tokens=9))
    end_early(model, expected)
    assert torch.equal(ours(model, ids, mask), model.generate(**how))
    assert torch.equal(ours(model, ids, mask, least=9), model.generate(**how, min_new_tokens=9))


def test_a_plain_mt5() -> None:
    sizes: dict[str, Any] = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    tokens: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model: Any = MT5ForConditionalGeneration(MT5Config(**sizes, **tokens)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    ids, mask = padded([7, 4, 9, 6], torch.Generator().manual_seed(3))
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert decodes(model)
    assert torch.equal(ours(model, ids, mask), expected)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"sites": EVERY_SITE}, {"fusion": False, "concatenate": False, "sites": EVERY_SITE}],
    ids=["tagi", "every site", "hypertuning"],
)
def test_a_tagi_model(tasks: str, settings: dict[str, Any], make_tagi: MakeTagi) -> None:
    model, generator = make_tagi(**settings), torch.Generator().manual_seed(7)
    instructions = padded([6, 10, 3], generator)
    index = torch.tensor(TASKS[tasks])
    ids, mask = padded([4 + 3 * at % 7 for at in range(len(index))], generator)
    with torch.no_grad():
        state = model.compile_instructions(*instructions)
    how: dict[str, Any] = {"task_index": index, "do_sample": False, "max_new_tokens": NEW_TOKENS}
    expected = model.generate(ids, mask, task=state, **how)
    for early in (False, True):
        if early:
            end_early(model, expected)
            expected = model.generate(ids, mask, task=state, **how)
            assert len({tuple(row.tolist()) for row in expected}) > 1
        state.kept = None
        assert torch.equal(ours(model, ids, mask, state.at(runs_of(index))), expected)


def test_rows_that_have_ended_are_not_decoded_on(
    tiny_tagi: TagiForConditionalGeneration, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_batch.instruction_ids is not None
    task = tiny_tagi.compile_task(tiny_batch.instruction_ids[1:2])
    given = tiny_batch.input_ids, tiny_batch.attention_mask
    answers = tiny_tagi.generate(*given, task=task, max_new_tokens=NEW_TOKENS, do_sample=False)
    end_early(tiny_tagi, answers)
    answers = tiny_tagi.generate(*given, task=task, max_new_tokens=NEW_TOKENS, do_sample=False)
    rows: list[int] = []
    tiny_tagi.backbone.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found = ours(tiny_tagi, *given, task.state)
    assert torch.equal(found, answers)
    ends = torch.tensor(tiny_tagi.generation_config.eos_token_id)
    ended = torch.isin(found[:, 1:], ends)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, NEW_TOKENS)
    assert len(set(lengths.tolist())) > 1, "or nothing would be shown"
    assert len(rows) == int(lengths.max())
    assert sum(rows) < len(rows) * len(found)
    assert rows[-1] <= 0.75 * len(found)


def test_what_is_left_to_transformers(tiny_backbone: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decodes(tiny_backbone)
    assert not decodes(torch.nn.Linear(2, 2))
    assert tiny_backbone.generation_config is not None
    with monkeypatch.context() as patch:
        patch.setattr(tiny_backbone.generation_config, "repetition_penalty", 1.5)
        assert not decodes(tiny_backbone)
    assert decodes(tiny_backbone)
    with monkeypatch.context() as patch:
        patch.setattr(next(tiny_backbone.parameters()), "ds_id", 3, raising=False)
        assert not decodes(tiny_backbone)
    assert not decodes(tiny_backbone.half())
