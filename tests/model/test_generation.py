"""Generation, and compiled tasks that answer as the full model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError
from tagi_ds.model import TagiConfig, TagiForConditionalGeneration
from tagi_ds.model.compiled import CompiledTask
from tests.conftest import MakeTagi

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
}


def inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def one_instruction(batch: Batch) -> torch.Tensor:
    assert batch.instruction_ids is not None
    return batch.instruction_ids[1:2]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("settings", [{}, {"fusion": False, "concatenate": False}], ids=["tagi", "hypertuning"])
def test_a_compiled_task_answers_as_the_model(
    decoding: str, settings: dict[str, Any], make_tagi: MakeTagi, tiny_batch: Batch, tmp_path: Path
) -> None:
    model, ids = make_tagi(**settings), one_instruction(tiny_batch)
    how = {"max_new_tokens": 8, **DECODINGS[decoding]}
    task = model.compile_task(ids)
    task.save(tmp_path / "task.safetensors")
    loaded = CompiledTask.load(tmp_path / "task.safetensors", model)
    answers = []
    for source in ({"instruction_ids": ids}, {"task": task}, {"task": loaded}):
        torch.manual_seed(4)
        answers.append(model.generate(**inputs(tiny_batch), **source, **how))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert len({tuple(row.tolist()) for row in answers[0]}) > 1
    # Another instruction gives other answers, or this comparison would show nothing.
    assert tiny_batch.instruction_ids is not None
    torch.manual_seed(4)
    other = model.generate(**inputs(tiny_batch), instruction_ids=tiny_batch.instruction_ids[2:, :3], **how)
    assert other.shape != answers[0].shape or not torch.equal(other, answers[0])


def test_a_compiled_task_never_encodes_its_instruction_again(
    tiny_tagi: TagiForConditionalGeneration, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny_tagi.compile_task(one_instruction(tiny_batch))

    def refuse(*_: Any) -> None:
        raise AssertionError("the instruction was compiled again")

    monkeypatch.setattr(tiny_tagi, "compile_instructions", refuse)
    monkeypatch.setattr(tiny_tagi.hypernetwork, "forward", refuse)
    tiny_tagi.generate(**inputs(tiny_batch), task=task, max_new_tokens=4)


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_the_cache_changes_nothing(decoding: str, tiny_tagi: TagiForConditionalGeneration, tiny_batch: Batch) -> None:
    how = {"max_new_tokens": 8, **DECODINGS[decoding]}
    many = {
        "instruction_ids": tiny_batch.instruction_ids,
        "instruction_attention_mask": tiny_batch.instruction_attention_mask,
        "task_index": tiny_batch.task_index,
    }
    cached, bare = (tiny_tagi.generate(**inputs(tiny_batch), **many, **how, use_cache=c) for c in (True, False))
    assert torch.equal(cached, bare)
    # And each example has its own task's answer, also where beams repeat the rows.
    assert tiny_batch.task_index is not None
    assert tiny_batch.instruction_attention_mask is not None
    for row, task in enumerate(tiny_batch.task_index.tolist()):
        words = int(tiny_batch.instruction_attention_mask[task].sum())
        length = int(tiny_batch.attention_mask[row].sum())
        alone = tiny_tagi.generate(
            tiny_batch.input_ids[row : row + 1, :length],
            instruction_ids=tiny_batch.instruction_ids[task : task + 1, :words],  # type: ignore[index]
            **how,
        )[0]
        assert cached[row, : len(alone)].tolist() == alone.tolist()


def test_a_task_of_another_model_is_refused(
    make_tagi: MakeTagi, tiny_batch: Batch, tied_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "task.safetensors"
    make_tagi().compile_task(one_instruction(tiny_batch)).save(path)
    for other in (make_tagi(rank=2), make_tagi(fusion=False), make_tagi(folder=tied_folder)):
        with pytest.raises(UserError, match=r"task\.safetensors was compiled by another model"):
            CompiledTask.load(path, other)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({}, "hypernetwork.fusion.layers.1.o.weight"),
        ({}, "hypernetwork.fusion.layers.0.norm.weight"),
        ({"also_train": "norms", "fusion": False}, "backbone.decoder.final_layer_norm.weight"),
    ],
)
def test_a_task_of_other_training_of_the_same_model_is_refused(
    settings: dict[str, Any], part: str, make_tagi: MakeTagi, tiny_batch: Batch, tmp_path: Path
) -> None:
    """Its adapters and memories would be answered by weights that never knew them."""
    path, other = tmp_path / "task.safetensors", make_tagi(**settings)
    make_tagi(**settings).compile_task(one_instruction(tiny_batch)).save(path)
    CompiledTask.load(path, other)
    with torch.no_grad():
        dict(other.named_parameters())[part].add_(0.1)
    with pytest.raises(UserError, match=r"task\.safetensors was compiled by another model: answering differ"):
        CompiledTask.load(path, other)


@pytest.mark.parametrize(("name", "settings"), [("fusion_heads", {"fusion_heads": 2}), ("fusion_norm", {})])
def test_a_task_of_another_fusion_is_refused(
    name: str, settings: dict[str, Any], make_tagi: MakeTagi, tiny_batch: Batch, tmp_path: Path
) -> None:
    path, other = tmp_path / "task.safetensors", make_tagi(fusion_norm="post")
    if settings:
        config = TagiConfig(**{**other.config.to_dict(), **settings, "fusion_norm": "pre"})
        other = TagiForConditionalGeneration(config).eval()
    make_tagi().compile_task(one_instruction(tiny_batch)).save(path)
    with pytest.raises(UserError, match=rf"another model: .*{name}"):
        CompiledTask.load(path, other)


@pytest.mark.parametrize("fusion", [True, False])
def test_a_file_that_does_not_say_its_weights_is_read_only_where_none_answer(
    fusion: bool, make_tagi: MakeTagi, tiny_batch: Batch, tmp_path: Path
) -> None:
    path, model = tmp_path / "task.safetensors", make_tagi(fusion=fusion)
    model.compile_task(one_instruction(tiny_batch)).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shape = json.loads(metadata["shape"])
    former = {key: shape[key] for key in shape if key not in ("fusion_heads", "fusion_norm", "answering")}
    save_file(tensors, path, {**metadata, "format": "tagi_ds compiled task 1", "shape": json.dumps(former)})
    if fusion:
        with pytest.raises(UserError, match="earlier version, which did not note whose weights answer it"):
            CompiledTask.load(path, model)
    else:
        assert CompiledTask.load(path, model).state.adapters.keys() == {site.name for site in model.site_table}


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_file_that_is_no_task_is_refused(
    content: bytes, tiny_tagi: TagiForConditionalGeneration, tmp_path: Path
) -> None:
    path = tmp_path / "task.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"task\.safetensors is not a compiled task"):
        CompiledTask.load(path, tiny_tagi)
