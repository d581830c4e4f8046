"""The logit teacher: one passage is the plain model, demonstrations are fused in the decoder, padding does not leak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.data.collate import TaskChunk
from tagi_ds.data.examples import Task
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.errors import UserError
from tagi_ds.model.backbone import load_backbone
from tagi_ds.teachers import logit_teacher
from tagi_ds.teachers.logit_teacher import (
    LogitTeacher,
    Reading,
    TeacherReader,
    demonstrations_of,
    load_teacher,
    teacher_folder,
    teacher_hash,
)
from tests.teachers.conftest import make_tasks

VOCABULARY = 330
CONFIG = DataConfig(prompt="plain", max_source_tokens=24, max_target_tokens=8)


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks(count=3, examples=6)


@pytest.fixture
def teacher(tiny_backbone: PreTrainedModel) -> LogitTeacher:
    return LogitTeacher(tiny_backbone, VOCABULARY)


def chunks_of(tasks: list[Task], per_task: int = 2) -> list[TaskChunk]:
    return [TaskChunk(task, 0, tuple(task.examples[i] for i in range(per_task)), (0,) * per_task) for task in tasks]


def plain(model: PreTrainedModel, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).logits
    return logits


def test_one_passage_is_the_plain_model(
    teacher: LogitTeacher, tasks: list[Task], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    reader, chunks = TeacherReader(tiny_tokenizer, CONFIG, 0, 3), chunks_of(tasks)
    batch = reader.batch(chunks)
    expected = plain(teacher.model, batch.input_ids, batch.attention_mask, batch.labels)
    assert torch.equal(teacher.logits(reader(chunks), batch.labels), expected)


def test_a_fused_passage_by_itself_is_the_plain_model_on_that_text(
    teacher: LogitTeacher, tasks: list[Task], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """With every passage but one taken away, whichever it is, what is left is an ordinary input."""
    reader, chunks = TeacherReader(tiny_tokenizer, CONFIG, 2, 3), chunks_of(tasks)
    batch, reading = reader.batch(chunks), reader(chunks)
    for place in range(3):
        passages = torch.full_like(reading.passages, -1)
        passages[:, place] = reading.passages[:, place]
        rows = reading.passages[:, place]
        expected = plain(teacher.model, reading.ids[rows], reading.mask[rows], batch.labels)
        found = teacher.logits(reading._replace(passages=passages), batch.labels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_decoder_attends_to_all_passages_each_encoded_by_itself(
    teacher: LogitTeacher, tasks: list[Task], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    reader, chunks = TeacherReader(tiny_tokenizer, CONFIG, 2, 3), chunks_of(tasks, 1)
    batch, reading = reader.batch(chunks), reader(chunks)
    found = teacher.logits(reading, batch.labels)
    for row, rows in enumerate(reading.passages):
        texts = [reading.ids[n][reading.mask[n].bool()][None] for n in rows]
        with torch.no_grad():
            memory = torch.cat([teacher.model.encoder(input_ids=ids).last_hidden_state for ids in texts], dim=1)
            labels = batch.labels[row : row + 1]
            expected = teacher.model(encoder_outputs=(memory,), labels=labels, use_cache=False).logits
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)
        alone = plain(teacher.model, texts[-1], torch.ones_like(texts[-1]), labels)
        assert (found[row] - alone[0]).abs().max() > 1e-3, "the demonstrations must be read"


def test_neither_padding_nor_other_passages_nor_the_encoders_batches_leak(
    teacher: LogitTeacher,
    tasks: list[Task],
    tiny_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, chunks = TeacherReader(tiny_tokenizer, CONFIG, 3, 3), chunks_of(tasks)
    batch, reading = reader.batch(chunks), reader(chunks)
    expected = teacher.logits(reading, batch.labels)
    wider = Reading(
        torch.nn.functional.pad(reading.ids, (0, 5), value=77),
        torch.nn.functional.pad(reading.mask, (0, 5)),
        torch.nn.functional.pad(reading.passages, (2, 0), value=-1),
    )
    torch.testing.assert_close(teacher.logits(wider, batch.labels), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(logit_teacher, "ENCODED_AT_ONCE", 4)
    torch.testing.assert_close(teacher.logits(reading, batch.labels), expected, atol=1e-5, rtol=1e-5)
    alone = reader(chunks[1:2])
    found = teacher.logits(alone, reader.batch(chunks[1:2]).labels)
    torch.testing.assert_close(found, expected[2:4, : found.shape[1]], atol=1e-5, rtol=1e-5)


def test_demonstrations_are_other_examples_chosen_by_seed_and_example(tasks: list[Task]) -> None:
    task = tasks[0]
    seen = set()
    for example in task.examples:
        shown = demonstrations_of(task, example, 3, seed=5)
        assert shown == demonstrations_of(task, example, 3, seed=5)
        assert len({other.id for other in shown} - {example.id}) == 3
        seen.add(tuple(other.id for other in shown))
        assert len(demonstrations_of(task, example, 50, seed=5)) == len(task.examples) - 1
    assert len(seen) > 1
    chosen = [[other.id for other in demonstrations_of(task, task.examples[0], 3, seed)] for seed in range(6)]
    assert len({tuple(ids) for ids in chosen}) > 1


def test_a_task_with_too_few_examples_has_fewer_passages(
    teacher: LogitTeacher, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    (lonely,) = make_tasks(count=1, examples=1)
    reader, chunks = TeacherReader(tiny_tokenizer, CONFIG, 3, 0), chunks_of([lonely], 1)
    batch, reading = reader.batch(chunks), reader(chunks)
    assert reading.passages.tolist() == [[-1, -1, -1, 0]]
    expected = plain(teacher.model, batch.input_ids, batch.attention_mask, batch.labels)
    torch.testing.assert_close(teacher.logits(reading, batch.labels), expected, atol=1e-5, rtol=1e-5)


def test_a_demonstration_is_cut_as_inputs_and_targets_are(
    tasks: list[Task], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    words = DataConfig(prompt="plain", max_source_tokens=400, max_target_tokens=60)
    reading = TeacherReader(tiny_tokenizer, words, 1, 0)(chunks_of(tasks[:1], 1))
    text = tiny_tokenizer.decode(reading.ids[0][reading.mask[0].bool()], skip_special_tokens=True)
    (shown,) = demonstrations_of(tasks[0], tasks[0].examples[0], 1, 0)
    assert text.startswith("# Input #")
    assert text.index(tasks[0].definition) < text.index(shown.input) < text.index("# Output #")
    assert text.endswith(shown.references[0])
    short = DataConfig(prompt="plain", max_source_tokens=24, max_target_tokens=20)
    cut = TeacherReader(tiny_tokenizer, short, 1, 0)(chunks_of(tasks[:1], 1))
    assert int(cut.mask[0].sum()) <= 24 + 20 - 1
    assert int(cut.ids[0][cut.mask[0].bool()][-1]) == tiny_tokenizer.eos_token_id


def test_a_peft_adapter_on_the_backbone_is_a_teacher(
    tiny_folder: Path, tied_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, tasks: list[Task]
) -> None:
    torch.manual_seed(0)
    settings = LoraConfig(TaskType.SEQ_2_SEQ_LM, r=2, lora_alpha=4, target_modules=["q", "v"], init_lora_weights=False)
    adapted = get_peft_model(load_backbone(tiny_folder), settings).eval()  # type: ignore[arg-type]
    adapted.save_pretrained(tmp_path / "adapter")
    config = RunConfig()
    config.teachers.logit_teacher = str(tmp_path / "adapter")
    folder = teacher_folder(config, tiny_folder, tiny_tokenizer)
    reader, chunks = TeacherReader(tiny_tokenizer, CONFIG, 0, 0), chunks_of(tasks)
    batch = reader.batch(chunks)
    found = load_teacher(folder, tiny_folder, torch.float32).logits(reader(chunks), batch.labels)
    expected = plain(adapted, batch.input_ids, batch.attention_mask, batch.labels)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    bare = plain(load_backbone(tiny_folder).eval(), batch.input_ids, batch.attention_mask, batch.labels)
    assert (found - bare).abs().max() > 1e-3
    assert teacher_hash(folder, tiny_folder) != teacher_hash(folder, tied_folder) != teacher_hash(tiny_folder, folder)
    wrong = tmp_path / "wrong"
    LoraConfig(TaskType.SEQ_2_SEQ_LM, r=2, target_modules=["query"]).save_pretrained(str(wrong))
    (wrong / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not fit the backbone"):
        load_teacher(wrong, tiny_folder, torch.float32)


@pytest.mark.parametrize("demonstrations", [0, 2])
def test_its_count_by_shapes_is_the_count_of_every_call(
    teacher: LogitTeacher,
    tasks: list[Task],
    tiny_tokenizer: PreTrainedTokenizerBase,
    demonstrations: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logit_teacher, "ENCODED_AT_ONCE", 4)
    reader = TeacherReader(tiny_tokenizer, CONFIG, demonstrations, 3)
    parts = [chunks_of(tasks, 1), chunks_of(tasks), chunks_of(tasks[:2], 4), chunks_of(tasks)]
    work = [(reader(chunks), reader.batch(chunks).labels) for chunks in parts]
    every = FlopMeter()
    with every.counting():
        plainly = [teacher.logits(*each) for each in work]
    teacher.meter = FlopMeter()
    counted = [teacher.logits(*each) for each in work]
    assert teacher.meter.flops == every.flops > 0
    assert all(map(torch.equal, plainly, counted))
