from __future__ import annotations

import gzip
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.c4 import DocumentMixture, cut_points, recompute, shards_of
from tagi_ds.data.cuts import Cutter
from tagi_ds.data.drawing import Drawn
from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError

CONFIG = DataConfig(tasks_per_batch=4, document_tokens=40, min_part_tokens=3, shuffle_block=4)


def text_of(shard: int, row: int) -> str:
    return f"lamp {shard} box {row} " * (1 + row)


def write_shard(folder: Path, number: int, texts: Sequence[str]) -> None:
    lines = "".join(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in texts)
    if number % 2:
        (folder / f"c4-train.{number:05d}-of-00009.json.gz").write_bytes(gzip.compress(lines.encode()))
    else:
        (folder / f"c4-train.{number:05d}-of-00009.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "en"
    folder.mkdir()
    for shard in range(3):
        write_shard(folder, shard, [text_of(shard, row) for row in range(1 + 4 * shard)])
    return tmp_path


def parts(batches: Sequence[Batch]) -> list[tuple[str, list[int], list[int], list[int]]]:
    found = []
    for batch in batches:
        assert batch.instruction_ids is not None
        assert batch.task_index is not None
        assert batch.task_index.tolist() == list(range(len(batch.example_ids)))
        for n, identity in enumerate(batch.example_ids):
            texts = [[x for x in ids[n].tolist() if x > 0] for ids in (batch.instruction_ids, batch.input_ids)]
            found.append((identity, *texts, [x for x in batch.labels[n].tolist() if x > 0]))
    return found


def first_epoch(mixture: DocumentMixture) -> tuple[dict[int, list[Drawn]], Counter[str]]:
    """Examples drawn by epoch, and what was passed over, until every lane is beyond the first epoch."""
    drawn: dict[int, list[Drawn]] = {}
    counts: Counter[str] = Counter()
    behind = True
    while behind:
        step = mixture.draw_step()
        for entry in step.values():
            drawn.setdefault(entry.epoch, []).append(entry)
            counts.update(entry.counts)
        behind = any(entry.epoch == 0 for entry in step.values())
    return drawn, counts


def drain(mixture: DocumentMixture) -> None:
    for _ in range(20):
        mixture.next_step()


def names(drawn: Sequence[Drawn]) -> list[str]:
    return [entry.cut.id for entry in drawn]


def test_parts_make_up_the_document(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    mixture = DocumentMixture(corpus, tokenizer, CONFIG, 0)
    seen = set()
    for _ in range(40):
        for identity, a, b, c in parts(mixture.next_step()):
            name, row = identity.rsplit(":", 1)
            whole = tokenizer(text_of(int(name.split(".")[1][:5]), int(row)), add_special_tokens=False)["input_ids"]
            assert a[-1] == b[-1] == c[-1] == tokenizer.eos_token_id
            assert a[:-1] + b[:-1] + c[:-1] == whole[:40]
            assert min(len(a), len(b), len(c)) >= 4
            assert cut_points(len(whole[:40]), 3, identity, 0) == (len(a) - 1, len(a) + len(b) - 2)
            seen.add(identity)
    rows = [(shard, row) for shard in range(3) for row in range(1 + 4 * shard)]
    long = [at for at in rows if len(tokenizer(text_of(*at), add_special_tokens=False)["input_ids"]) >= 9]
    assert 0 < len(seen) == len(long) < len(rows)


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


@pytest.mark.parametrize("mode", ["truncate", "windows"])
def test_any_example_can_be_recomputed(corpus: Path, tokenizer: PreTrainedTokenizerBase, mode: Any) -> None:
    config = replace(CONFIG, documents=mode)
    mixture = DocumentMixture(corpus, tokenizer, config, 3)
    for _ in range(6):
        for entry in mixture.draw_step().values():
            again = recompute(entry.cut.id, corpus, tokenizer, config, 3)
            assert [list(part) for part in (again.a, again.b, again.c)] == [
                list(part) for part in (entry.cut.a, entry.cut.b, entry.cut.c)
            ]
    good = entry.cut.id
    for wrong in (good.replace("en/", "de/"), "nonsense", good + "7" * 9, good[: good.rindex(":")]):
        with pytest.raises(UserError, match="no example"):
            recompute(wrong, corpus, tokenizer, config, 3)


def test_windows_cover_a_long_document(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = replace(CONFIG, documents="windows", document_tokens=16, tasks_per_batch=2)
    drawn, counts = first_epoch(DocumentMixture(corpus, tokenizer, config, 1))
    found: dict[str, dict[int, list[int]]] = {}
    for entry in drawn[0]:
        document, window = entry.cut.id.split("#")
        pieces = [int(x) for part in (entry.cut.a, entry.cut.b, entry.cut.c) for x in part]
        assert int(window) not in found.setdefault(document, {}), "a window came twice in an epoch"
        found[document][int(window)] = pieces
    dropped = 0
    for shard in shards_of(corpus):
        number = int(shard.name.split(".")[1][:5])
        for row in range(1 + 4 * number):
            whole = tokenizer(text_of(number, row), add_special_tokens=False)["input_ids"]
            windows = [whole[at : at + 16] for at in range(0, len(whole), 16)]
            dropped += len(windows[-1]) < 9
            kept = {n: ids for n, ids in enumerate(windows) if len(ids) >= 9}
            assert found.get(f"{shard.name}:{row}", {}) == kept
    assert max(len(windows) for windows in found.values()) > 2
    assert counts["too_short"] >= dropped > 0


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("mode", ["truncate", "windows"])
def test_the_global_batch_does_not_depend_on_ranks(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, world_size: int, accumulation: int, mode: Any
) -> None:
    config = replace(CONFIG, documents=mode)
    alone = DocumentMixture(corpus, tokenizer, config, 5)
    ranks = [
        DocumentMixture(corpus, tokenizer, config, 5, rank, world_size, accumulation) for rank in range(world_size)
    ]
    for _ in range(8):
        dealt = [rank.next_step() for rank in ranks]
        assert all(len(micro) == accumulation for micro in dealt)
        flat, whole = [batch for micro in dealt for batch in micro], alone.next_step()
        assert sorted(parts(flat)) == sorted(parts(whole))
        assert sum((Counter(batch.counts) for batch in flat), Counter()) == Counter(whole[0].counts)
    assert ranks[0].join([rank.state_dict() for rank in ranks]) == alone.state_dict()


def test_a_rank_deals_its_documents_to_micro_batches_by_length(
    corpus: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    positions = {"order": 0, "length": 0}
    for dealing in positions:
        config = replace(CONFIG, tasks_per_batch=16, dealing=dealing, pad_multiple=1)
        mixture = DocumentMixture(corpus, tokenizer, config, 5, 1, 2, 4)
        for _ in range(6):
            batches = mixture.next_step()
            assert sorted(len(batch.example_ids) for batch in batches)[0] >= 1
            assert sum(len(batch.example_ids) for batch in batches) == 8
            for batch in batches:
                assert batch.instruction_ids is not None
                positions[dealing] += batch.instruction_ids.numel() + batch.input_ids.numel() + batch.labels.numel()
    assert positions["length"] < 0.95 * positions["order"]


def test_a_rank_opens_the_shards_of_its_own_lanes_only(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for shard in range(8):
        write_shard(tmp_path, shard, [text_of(shard, row) for row in range(5, 9)])
    ranks = [DocumentMixture(tmp_path, tokenizer, CONFIG, 0, rank, 4) for rank in range(4)]
    # An epoch of eight shards has two for each of four lanes, and each rank has one lane.
    opened = [{name.split(":")[0] for _ in range(8) for name in names(list(r.draw_step().values()))} for r in ranks]
    assert [len(shards) for shards in opened] == [2, 2, 2, 2]
    assert len(set.union(*opened)) == 8
    assert all(rank.epoch == 0.5 for rank in ranks)


@pytest.mark.parametrize("steps", range(0, 12, 2))
@pytest.mark.parametrize("mode", ["truncate", "windows"])
def test_resuming_gives_the_very_next_batch(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, steps: int, mode: Any
) -> None:
    config = replace(CONFIG, documents=mode)
    unbroken = DocumentMixture(corpus, tokenizer, config, 1)
    resumed = DocumentMixture(corpus, tokenizer, config, 1)
    for _ in range(steps):
        unbroken.next_step()
    # Twice in a row, the second time from the resumed one's state.
    for _ in range(2):
        state = json.loads(json.dumps((resumed if resumed.step else unbroken).state_dict()))
        resumed = DocumentMixture(corpus, tokenizer, config, 1)
        resumed.load_state_dict(state)
        assert resumed.epoch == unbroken.epoch
        for _ in range(3):
            assert parts(resumed.next_step()) == parts(unbroken.next_step())
        assert resumed.state_dict() == unbroken.state_dict()
    assert resumed.step == steps + 6


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    lanes=st.sampled_from([1, 2, 3, 4, 6]),
    block=st.integers(1, 5),
    seed=st.integers(0, 99),
    stops=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    worlds=st.lists(st.sampled_from([1, 2, 3]), min_size=3, max_size=3),
    relaned=st.none() | st.sampled_from([1, 2, 3, 4, 6]),
    mode=st.sampled_from(["truncate", "windows"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_example_comes_once_an_epoch_through_any_interruptions(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    sizes: list[int],
    lanes: int,
    block: int,
    seed: int,
    stops: list[int],
    worlds: list[int],
    relaned: int | None,
    mode: Any,
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    for shard, size in enumerate(sizes):
        write_shard(folder, shard, [f"lamp {shard} box {row} " * (3 + 5 * (row % 3)) for row in range(size)])
    config = replace(CONFIG, tasks_per_batch=lanes, shuffle_block=block, documents=mode)
    unbroken = DocumentMixture(folder, tokenizer, config, seed)
    dealt: list[Drawn] = []
    state: dict[str, Any] | None = None
    for place, steps in enumerate(stops):
        world = worlds[place] if lanes % worlds[place] == 0 else 1
        ranks = [DocumentMixture(folder, tokenizer, config, seed, rank, world) for rank in range(world)]
        if state is not None:
            for rank in ranks:
                rank.load_state_dict(state)
        for _ in range(steps):
            step: dict[int, Drawn] = {}
            for rank in ranks:
                mine = rank.draw_step()
                assert not step.keys() & mine.keys()
                step |= mine
            # The same global batches in the same order, whoever reads them.
            assert names([step[lane] for lane in range(lanes)]) == names(list(unbroken.draw_step().values()))
            dealt += step.values()
        state = json.loads(json.dumps(ranks[0].join([rank.state_dict() for rank in ranks])))
        assert state == json.loads(json.dumps(unbroken.state_dict()))
    last = DocumentMixture(folder, tokenizer, replace(config, tasks_per_batch=relaned or lanes), seed)
    assert state is not None
    last.load_state_dict(state)
    drawn, _ = first_epoch(last)
    expected, _ = first_epoch(DocumentMixture(folder, tokenizer, replace(config, tasks_per_batch=1), seed))
    mine = [entry for entry in dealt if entry.epoch == 0] + drawn.get(0, [])
    assert Counter(names(mine)) == Counter(names(expected[0]))
    assert max(Counter(names(mine)).values()) == 1
    later = [entry for entry in [*dealt, *(e for es in drawn.values() for e in es)] if entry.epoch > 0]
    assert max(Counter((entry.epoch, entry.cut.id) for entry in later).values()) == 1


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_workers_change_nothing(corpus: Path, tokenizer: PreTrainedTokenizerBase, workers: int) -> None:
    alone = DocumentMixture(corpus, tokenizer, CONFIG, 2)
    many = DocumentMixture(corpus, tokenizer, replace(CONFIG, workers=workers), 2)
    try:
        for _ in range(5):
            assert parts(many.next_step()) == parts(alone.next_step())
            assert many.state_dict() == alone.state_dict()
        # On with another number, from what was consumed and not from what was prepared.
        fewer = DocumentMixture(corpus, tokenizer, replace(CONFIG, workers=workers - 1), 2)
        fewer.load_state_dict(json.loads(json.dumps(many.state_dict())))
        try:
            for _ in range(4):
                assert parts(fewer.next_step()) == parts(alone.next_step())
        finally:
            fewer.close()
    finally:
        many.close()


def test_a_workers_error_is_the_users(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for path in corpus.rglob("*.jsonl"):
        path.write_text("{broken\n", encoding="utf-8")
    mixture = DocumentMixture(corpus, tokenizer, replace(CONFIG, workers=1), 0)
    with pytest.raises(UserError, match=r"jsonl: row 0 is malformed"):
        drain(mixture)


def test_another_corpus_or_setting_is_refused(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    state = DocumentMixture(corpus, tokenizer, CONFIG, 1).state_dict()
    with pytest.raises(UserError, match="taken with seed = 1"):
        DocumentMixture(corpus, tokenizer, CONFIG, 2).load_state_dict(state)
    with pytest.raises(UserError, match="taken with shuffle_block = 4"):
        DocumentMixture(corpus, tokenizer, replace(CONFIG, shuffle_block=5), 1).load_state_dict(state)
    (corpus / "more.jsonl").write_text('{"text": "lamp"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="taken with data = "):
        DocumentMixture(corpus, tokenizer, CONFIG, 1).load_state_dict(state)


def test_shares_that_do_not_belong_together_are_not_joined(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ranks = [DocumentMixture(corpus, tokenizer, CONFIG, 1, rank, 2) for rank in range(2)]
    with pytest.raises(RuntimeError, match="not of one step"):
        ranks[0].join([ranks[0].state_dict()] * 2)
    ranks[0].next_step()
    with pytest.raises(RuntimeError, match="not of one step"):
        ranks[0].join([rank.state_dict() for rank in ranks])


def test_the_state_does_not_grow(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    mixture = DocumentMixture(corpus, tokenizer, CONFIG, 1)
    mixture.next_step()
    early = len(json.dumps(mixture.state_dict()))
    for _ in range(300):
        mixture.next_step()
    assert mixture.epoch > 20
    assert len(json.dumps(mixture.state_dict())) < early + 8 * CONFIG.tasks_per_batch * 6


@pytest.mark.parametrize("line", ["{broken", '{"words": "x"}', '{"text": 3}', "[1]", "5", "[" * 90000])
def test_malformed_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"text": "lamp box chair bell " * 5})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n\n  \n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl: row [14] is malformed") as caught:
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0).next_step()
    assert "text" in caught.value.mend
    skipping = DocumentMixture(tmp_path, tokenizer, replace(CONFIG, malformed="skip", tasks_per_batch=1), 0)
    counts = sum((Counter(skipping.next_step()[0].counts) for _ in range(9)), Counter())
    # Each once, though they come again in every epoch.
    said = capsys.readouterr().err.splitlines()
    assert sorted(text.split(f" of {tmp_path}/bad.jsonl: ")[0] for text in said) == [
        f"data.malformed skip: left out row {row}" for row in (1, 4)
    ]
    assert 16 <= counts["malformed"] <= 18
    assert counts["too_short"] == 0


def test_a_line_without_end_is_malformed(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tagi_ds.data.corpus.LONGEST_LINE", 4096)
    rows = [json.dumps({"text": "lamp box chair bell " * n}) for n in (5, 900, 6)]
    (tmp_path / "bad.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"row 1 is malformed \(a line of more than"):
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0).next_step()
    mixture = DocumentMixture(tmp_path, tokenizer, replace(CONFIG, malformed="skip"), 0)
    found = {name for _ in range(4) for name in mixture.next_step()[0].example_ids}
    assert f"left out row 1 of {tmp_path}/bad.jsonl: a line of more than" in capsys.readouterr().err
    assert found == {"bad.jsonl:0", "bad.jsonl:2"}


def test_missing_empty_and_unreadable_corpora(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "lamp"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"no document in .* has 9 tokens"):
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0).next_step()
    (tmp_path / "short.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"no document in .* has 9 tokens"):
        DocumentMixture(tmp_path, tokenizer, replace(CONFIG, workers=1), 0).next_step()
    with pytest.raises(UserError, match=r"data\.tasks_per_batch = 4"):
        DocumentMixture(tmp_path, tokenizer, CONFIG, 0, 0, 3)
    with pytest.raises(UserError, match=r"data\.document_tokens = 8 has no room"):
        DocumentMixture(tmp_path, tokenizer, DataConfig(document_tokens=8), 0)


def test_an_error_comes_again_when_the_step_is_asked_for_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "bad.jsonl").write_text("{broken\n", encoding="utf-8")
    mixture = DocumentMixture(tmp_path, tokenizer, CONFIG, 0)
    for _ in range(2):
        with pytest.raises(UserError, match="row 0 is malformed"):
            mixture.next_step()


def test_only_the_beginning_of_a_long_text_is_tokenised(tokenizer: PreTrainedTokenizerBase) -> None:
    cutter = Cutter(tokenizer, CONFIG, 0)
    text = "turn the lamp around " * 5000
    assert cutter.tokens(text).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][:40]
    sparse = "lamp" + " " * 400 + "turn the box around " * 40
    assert cutter.tokens(sparse).tolist() == tokenizer(sparse, add_special_tokens=False)["input_ids"][:40]


def check_corpus(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(shards_of(folder)) == 4
    mixture = DocumentMixture(folder, tokenizer, DataConfig(tasks_per_batch=8, document_tokens=48), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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


def test_an_epoch_of_the_real_shards_has_every_row_once(real_data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = DataConfig(tasks_per_batch=6, document_tokens=24, min_part_tokens=1, shuffle_block=100)
    drawn, counts = first_epoch(DocumentMixture(real_data / "c4", tokenizer, config, 0))
    rows = sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in (real_data / "c4").rglob("*.json.gz"))
    assert len(drawn[0]) == len(set(names(drawn[0]))) == rows == 1200
    assert not counts
