from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import COUNTS, Demonstration, Example, Task
from tagi_ds.data.prompts import concatenated_text, input_text, instruction_text

LAMP = Task(
    "lamp",
    "turn the lamp around\n",
    "light",
    (Example("1", "lamp box", ("box", "bell")), Example("2", "say lamp lamp chair", ("chair",))),
    paraphrases=("say lamp",),
    positives=(Demonstration("lamp", "bell."), Demonstration("box", "chair")),
)
BOX = Task("box", "say box", "wood", (Example("3", "box", ("box box box",)),))
CHUNKS = [
    TaskChunk(LAMP, 0, LAMP.examples[:1], (1,)),
    TaskChunk(BOX, 0, BOX.examples, (0,)),
    TaskChunk(LAMP, 0, LAMP.examples[1:], (0,)),
    TaskChunk(LAMP, 1, LAMP.examples[:1], (0,)),
]


def test_tk_instruct_wording() -> None:
    config = DataConfig(positives=2)
    instruction = (
        "Definition: turn the lamp around.\n\n"
        " Positive Example 1 -\nInput: lamp.\n Output: bell.\n\n"
        " Positive Example 2 -\nInput: box.\n Output: chair.\n\n"
    )
    rest = "Now complete the following example -\nInput: lamp box.\nOutput: "
    assert instruction_text(LAMP, 0, config) == instruction
    assert input_text("lamp box", config) == rest
    assert concatenated_text(LAMP, 0, "lamp box", config) == instruction + rest
    assert instruction_text(LAMP, 1, DataConfig()) == "Definition: say lamp.\n\n"


def test_plain_wording(plain: DataConfig) -> None:
    assert instruction_text(LAMP, 0, plain) == "turn the lamp around"
    assert input_text(" lamp", plain) == " lamp"
    assert concatenated_text(LAMP, 1, "box", plain) == "say lamp\nbox"


def test_distinct_instructions_once(tokenizer: PreTrainedTokenizerBase, plain: DataConfig) -> None:
    batch = Collator(tokenizer, plain)(CHUNKS)
    assert batch.tasks == ["lamp", "box", "lamp"]
    assert batch.units == ["light", "wood", "light"]
    assert batch.task_index.tolist() == [0, 1, 0, 2]
    assert batch.example_ids == ["1", "3", "2", "1"]
    assert batch.instruction_ids.shape[0] == 3
    read = [tokenizer.decode(row, skip_special_tokens=True) for row in batch.instruction_ids]
    assert read == ["turn the lamp around", "say box", "say lamp"]
    targets = batch.labels.masked_fill(batch.labels == -100, 0)
    assert tokenizer.batch_decode(targets, skip_special_tokens=True) == ["bell", "box box box", "chair", "box"]


def test_padding(tokenizer: PreTrainedTokenizerBase, plain: DataConfig) -> None:
    batch = Collator(tokenizer, plain)(CHUNKS)
    for ids, mask in (
        (batch.input_ids, batch.attention_mask),
        (batch.instruction_ids, batch.instruction_attention_mask),
    ):
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape
        assert ids.shape[1] % 8 == 0
        assert torch.equal(ids != 0, mask.bool())
        assert (mask.diff(dim=1) <= 0).all()
        last = mask.sum(1) - 1
        assert (ids[torch.arange(len(ids)), last] == tokenizer.eos_token_id).all()
        assert ids.shape[1] - int(mask.sum(1).max()) < 8
    assert batch.labels.shape[1] % 8 == 0
    assert not (batch.labels == 0).any()
    assert ((batch.labels == tokenizer.eos_token_id).sum(1) == 1).all()


@pytest.mark.parametrize("multiple", [1, 3, 16])
def test_lengths_are_padded_to_a_multiple_and_the_texts_are_the_same(
    tokenizer: PreTrainedTokenizerBase, plain: DataConfig, multiple: int
) -> None:
    usual = Collator(tokenizer, plain)(CHUNKS)
    plain.pad_multiple = multiple
    batch = Collator(tokenizer, plain)(CHUNKS)
    for name, padding in (("input_ids", 0), ("attention_mask", 0), ("instruction_ids", 0), ("labels", -100)):
        mine, theirs = getattr(batch, name), getattr(usual, name)
        longest = int((mine != padding).sum(1).max())
        assert mine.shape == (len(theirs), -(-longest // multiple) * multiple)
        assert torch.equal(mine[:, :longest], theirs[:, :longest])


def test_forms_and_units(tokenizer: PreTrainedTokenizerBase, plain: DataConfig) -> None:
    joined = Collator(tokenizer, plain, form="concatenated", unit="task")(CHUNKS)
    assert joined.instruction_ids is None
    assert joined.units == joined.tasks
    assert tokenizer.decode(joined.input_ids[0], skip_special_tokens=True) == "turn the lamp around lamp box"
    bare = Collator(tokenizer, plain, form="input_only")(CHUNKS)
    assert bare.instruction_ids is None
    assert tokenizer.decode(bare.input_ids[0], skip_special_tokens=True) == "lamp box"


@pytest.mark.parametrize("excess", [-1, 0, 1, 5])
def test_truncation_keeps_the_end_token_and_is_counted(tokenizer: PreTrainedTokenizerBase, excess: int) -> None:
    text = "lamp box chair bell lamp box"
    whole = tokenizer(text)["input_ids"]
    limit = len(whole) - excess
    collator = Collator(tokenizer, DataConfig(prompt="plain", max_source_tokens=1000, max_target_tokens=limit))
    task = Task("t", "say", "c", (Example("1", text, (text, "lamp")),))
    for _ in range(2):
        batch = collator([TaskChunk(task, 0, task.examples * 2, (0, 0)), TaskChunk(task, 0, task.examples, (1,))])
        expected = whole if excess <= 0 else [*whole[: limit - 1], 1]
        assert batch.labels[0, : len(expected)].tolist() == expected
        counts = {"truncated_instruction": 0, "truncated_input": 0, "truncated_target": 2 if excess > 0 else 0}
        counts["fewer_demonstrations"] = 0
        assert batch.counts == counts
        assert batch.counts.keys() <= set(COUNTS)
    assert collator.encode(text, "target").tolist() == expected
    assert collator.encode(text, "input").tolist() == whole


def test_every_cut_instruction_and_input_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = Collator(tokenizer, DataConfig(prompt="plain", max_source_tokens=3))(CHUNKS)
    ends = [batch.instruction_ids.shape[1], batch.input_ids.shape[1]]
    assert ends == [8, 8]
    # Of "turn the lamp around", "say box", "say lamp"; and of "lamp box", "box", "say lamp lamp chair", "lamp box".
    for kind, texts in (
        ("instruction", ["turn the lamp around", "say box", "say lamp"]),
        ("input", ["lamp box", "box", "say lamp lamp chair", "lamp box"]),
    ):
        assert batch.counts[f"truncated_{kind}"] == sum(len(tokenizer(text)["input_ids"]) > 3 for text in texts) > 0


def test_concatenation_is_cut_as_a_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    collator = Collator(tokenizer, DataConfig(prompt="plain", max_source_tokens=6), form="concatenated")
    batch = collator(CHUNKS[:1])
    whole = tokenizer("turn the lamp around lamp box")["input_ids"]
    assert batch.input_ids[0, :6].tolist() == [*whole[:5], 1]
    assert +Counter(batch.counts) == {"truncated_input": 1}


def test_a_concatenating_model_reads_the_published_prompt(
    tokenizer: PreTrainedTokenizerBase, plain: DataConfig
) -> None:
    example = Example("1", "lamp", ("bell",), rendered="turn the chair around and say bell")
    task = Task("t", "say", "c", (example,), collection="p3")
    for form, text in (("concatenated", example.rendered), ("hypernetwork", "lamp"), ("input_only", "lamp")):
        batch = Collator(tokenizer, plain, form=form)([TaskChunk(task, 0, (example,), (0,))])  # type: ignore[arg-type]
        assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == text


def test_demonstrations_that_do_not_fit_are_left_out_rather_than_the_input_cut(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole = len(tokenizer(concatenated_text(LAMP, 0, "lamp box", DataConfig(positives=2)))["input_ids"])
    without = len(tokenizer(concatenated_text(LAMP, 0, "lamp box", DataConfig()))["input_ids"])
    for limit, shown in ((whole, 2), (whole - 1, 1), (without, 0)):
        config = DataConfig(positives=2, max_source_tokens=limit)
        batch = Collator(tokenizer, config, form="concatenated")([TaskChunk(LAMP, 0, LAMP.examples[:1], (0,))])
        assert +Counter(batch.counts) == ({"fewer_demonstrations": 1} if shown < 2 else {})
        expected = concatenated_text(LAMP, 0, "lamp box", DataConfig(positives=shown))
        assert batch.input_ids[0, : int(batch.attention_mask.sum())].tolist() == tokenizer(expected)["input_ids"]


def test_an_instruction_without_all_its_demonstrations_is_counted_once_a_batch(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole = len(tokenizer(instruction_text(LAMP, 0, DataConfig(positives=2)))["input_ids"])
    for limit, fewer in ((whole, 0), (whole - 1, 1)):
        collator = Collator(tokenizer, DataConfig(positives=2, max_source_tokens=limit))
        batch = collator([TaskChunk(LAMP, 0, LAMP.examples[:1], (0,))] * 3)
        assert +Counter(batch.counts) == +Counter(fewer_demonstrations=fewer)


def test_what_is_kept_is_bounded(
    tokenizer: PreTrainedTokenizerBase, plain: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tagi_ds.data.collate.KEPT_BYTES", 5000)
    collator = Collator(tokenizer, plain)
    for _ in range(2):
        for number in range(200):
            text = f"lamp {number}"
            assert collator.encode(text, "input").tolist() == tokenizer(text)["input_ids"]
    assert 0 < len(collator._encoders["input"]._kept) < 20
