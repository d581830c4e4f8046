from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.c4 import DocumentMixture, cut_points, shards_of
from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError

CONFIG = DataConfig(tasks_per_batch=4, document_tokens=40, min_part_tokens=3)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "en"
    folder.mkdir()
    for shard in range(3):
        texts = [f"lamp {shard} box {row} " * (1 + row) for row in range(1 + 4 * shard)]
        text = "".join(json.dumps({"text": t, "timestamp": "", "url": ""}) + "\n" for t in texts)
        if shard:
            (folder / f"c4-train.{shard:05d}-of-00003.json.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / "more.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def parts(batches: list[Batch]) -> list[tuple[str, list[int], list[int], list[int]]]:
    found = []
    for batch in batches:
        assert batch.instruction_ids is not None
        assert batch.task_index is not None
        assert batch.task_index.tolist() == list(range(len(batch.example_ids)))
        for n, identity in enumerate(batch.example_ids):
            texts = [[x for x in ids[n].tolist() if x > 0] for ids in (batch.instruction_ids, batch.input_ids)]
            found.append((identity, *texts, [x for x in batch.labels[n].tolist() if x > 0]))
    return found


def test_parts_make_up_the_document(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    mixture = DocumentMixture(corpus, tokenizer, CONFIG, 0)
    seen = set()
    while mixture.epoch < 1:
        for identity, a, b, c in parts(mixture.next_step()):
            name, row = identity.rsplit(":", 1)
            shard = 0 if name.endswith("jsonl") else int(name.split(".")[1].split("-")[0])
            text = f"lamp {shard} box {row} " * (1 + int(row))
            whole = tokenizer(text, add_special_tokens=False)["input_ids"][:40]
            assert a[-1] == b[-1] == c[-1] == tokenizer.eos_token_id
            assert a[:-1] + b[:-1] + c[:-1] == whole
            assert min(len(a), len(b), len(c)) >= 4
            assert cut_points(len(whole), 3, identity, 0) == (len(a) - 1, len(a) + len(b) - 2)
            seen.add(identity)
    expected = {(shard, row) for shard in range(3) for row in range(1 + 4 * shard)}
    short = [
        (shard, row)
        for shard, row in expected
        if len(tokenizer(f"lamp {shard} box {row} " * (1 + row), add_special_tokens=False)["input_ids"]) < 9
    ]
    assert short
    assert len(seen) == len(expected) - len(short)
    assert mixture.skipped >= len(short)


@given(st.integers(3, 200), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_cut_points(length: int, least: int, seed: int) -> None:
    length = max(length, 3 * least)
    i, j = cut_points(length, least, "document", seed)
    assert min(i, j - i, length - j) >= least


def test_cuts_are_uniform() -> None:
    counts: dict[tuple[int, int], int] = {}
    for seed in range(3000):
        cut = cut_points(8, 2, "d", seed)
        counts[cut] = counts.get(cut, 0) + 1
    assert len(counts) == 6
    assert all(400 < count < 600 for count in counts.values())


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (1, 4), (2, 2)])
def test_the_global_batch_does_not_depend_on_ranks(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, world_size: int, accumulation: int
) -> None:
    alone = DocumentMixture(corpus, tokenizer, CONFIG, 5)
    ranks = [
        DocumentMixture(corpus, tokenizer, CONFIG, 5, rank, world_size, accumulation) for rank in range(world_size)
    ]
    for _ in range(8):
        dealt = [rank.next_step() for rank in ranks]
        assert all(len(micro) == accumulation for micro in dealt)
        assert parts([batch for micro in dealt for batch in micro]) == parts(alone.next_step())


@pytest.mark.parametrize("steps", range(0, 12, 2))
def test_resuming_gives_the_very_next_batch(corpus: Path, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    unbroken = DocumentMixture(corpus, tokenizer, CONFIG, 1)
    for _ in range(steps):
        unbroken.next_step()
    resumed = DocumentMixture(corpus, tokenizer, CONFIG, 1)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    for _ in range(5):
        assert parts(resumed.next_step()) == parts(unbroken.next_step())
    assert resumed.state_dict() == unbroken.state_dict()
    assert (resumed.step, resumed.skipped) == (steps + 5, unbroken.skipped)


def test_another_corpus_or_setting_is_refused(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    state = DocumentMixture(corpus, tokenizer, CONFIG, 1).state_dict()
    with pytest.raises(UserError, match="taken with seed = 1"):
        DocumentMixture(corpus, tokenizer, CONFIG, 2).load_state_dict(state)
    (corpus / "more.jsonl").write_text('{"text": "lamp"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="taken with data = "):
        DocumentMixture(corpus, tokenizer, CONFIG, 1).load_state_dict(state)


@pytest.mark.parametrize("line", ["{broken", '{"words": "x"}', '{"text": 3}', "[1]", "5"])
def test_malformed_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, line: str) -> None:
    good = json.dumps({"text": "lamp box chair bell " * 5})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl: row 1 is malformed") as caught:
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0).next_step()
    assert "text" in caught.value.mend


def test_missing_empty_and_unreadable_corpora(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"corpus folder .*gone is missing"):
        shards_of(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no shard"):
        shards_of(tmp_path)
    (tmp_path / "short.jsonl").write_text('{"text": "lamp"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"no document in .* has 9 tokens"):
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0).next_step()
    (tmp_path / "short.jsonl").rename(tmp_path / "short.json.gz")
    with pytest.raises(UserError, match=r"short\.json\.gz cannot be read near row 0"):
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0).next_step()
    with pytest.raises(UserError, match=r"data\.tasks_per_batch = 4"):
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0, 0, 3)
    with pytest.raises(UserError, match=r"data\.document_tokens = 8 has no room"):
        DocumentMixture(tmp_path, tokenizer, DataConfig(document_tokens=8), 0)


def check_corpus(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(shards_of(folder)) == 4
    mixture = DocumentMixture(folder, tokenizer, DataConfig(tasks_per_batch=8, document_tokens=48), 0)
    for _ in range(10):
        (batch,) = mixture.next_step()
        assert batch.instruction_ids is not None
        assert batch.instruction_ids.shape[0] == 8
        assert batch.target_tokens >= 8 * 9
        assert torch.equal(batch.input_ids != 0, batch.attention_mask.bool())


def test_the_embedded_corpus(benchmark_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    check_corpus(benchmark_folder / "c4", tokenizer)


def test_real_shards(real_data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    check_corpus(real_data / "c4", tokenizer)
