"""The cache's files: what is read is what was written, whatever the lengths; nothing else passes for it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ds.data.collate import pad_ids
from tagi_ds.encodings import store
from tagi_ds.encodings.store import EncodingStore, finish, is_whole, key_of, plan_shards, write_shard
from tagi_ds.errors import UserError
from tests.teachers.test_damage import KINDS

BINDING = {"backbone": "b" * 64, "dtype": "float32"}
IDS = st.lists(st.integers(0, 400), min_size=1, max_size=40).map(lambda ids: np.array(ids, dtype=np.int32))


def made_up(ids: np.ndarray, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An encoding that tells its instruction."""
    generator = torch.Generator().manual_seed(int(key_of(ids)[:8], 16))
    return torch.randn(len(ids), width, generator=generator).to(dtype)


def write(folder: Path, rows: list[np.ndarray], width: int = 6, dtype: torch.dtype = torch.float32) -> EncodingStore:
    shards = plan_shards(rows, BINDING)
    for shard in shards:
        padded = torch.full((len(shard.rows), len(shard.rows[0]), width), 7.0, dtype=dtype)
        for to, ids in zip(padded, shard.rows, strict=True):
            to[: len(ids)] = made_up(ids, width, dtype)
        write_shard(folder / shard.name, shard, padded)
    finish(folder, shards, BINDING, flops=5)
    return EncodingStore(folder, BINDING)


@settings(max_examples=30)
@given(
    rows=st.lists(IDS, min_size=1, max_size=20),
    tokens=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_instruction_is_read_as_it_was_written(
    rows: list[np.ndarray], tokens: int, dtype: torch.dtype, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BATCH_TOKENS", tokens)
        found = write(tmp_path_factory.mktemp("store"), rows, dtype=dtype)
    distinct = {key_of(ids): ids for ids in rows}
    assert len(found) == len(distinct)
    assert found.bytes >= sum(map(len, distinct.values())) * 6 * dtype.itemsize
    # Any batch of them, in any order, some more than once.
    chosen = random.Random(seed).choices(rows, k=5)
    ids, mask = pad_ids(chosen)
    read = found.read(ids, mask)
    assert read.shape == (*ids.shape, 6)
    assert read.dtype == dtype
    for row, each in zip(read, chosen, strict=True):
        assert torch.equal(row[: len(each)], made_up(each, 6, dtype))
        assert not row[len(each) :].any(), "padding is not stored, and zero when read"


@given(rows=st.lists(IDS, min_size=1, max_size=20), tokens=st.integers(8, 100), seed=st.integers(0, 99))
def test_the_plan_depends_on_nothing_but_the_instructions(rows: list[np.ndarray], tokens: int, seed: int) -> None:
    shuffled = [*rows, rows[0]]
    random.Random(seed).shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BATCH_TOKENS", tokens)
        plan, again = plan_shards(rows, BINDING), plan_shards(shuffled, BINDING)
        other = plan_shards(rows, {**BINDING, "backbone": "c" * 64})
    assert [shard.name for shard in plan] == [shard.name for shard in again]
    assert not {shard.name for shard in plan} & {shard.name for shard in other}
    keys = [[key_of(ids) for ids in shard.rows] for shard in plan]
    assert keys == [[key_of(ids) for ids in shard.rows] for shard in again]
    assert sorted(key for part in keys for key in part) == sorted({key_of(ids) for ids in rows})
    for shard in plan:
        padded = len(shard.rows) * (-(-len(shard.rows[0]) // 8) * 8)
        assert len(shard.rows) == 1 or padded <= tokens
        assert len(shard.rows[-1]) >= 0.75 * len(shard.rows[0]), "no more than a third of it is padding"
    lengths = [len(ids) for shard in plan for ids in shard.rows]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_not_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH_TOKENS", 16)
    rows = [np.arange(at, at + 9, dtype=np.int32) for at in range(4)]
    for seed in range(10):
        folder = tmp_path / str(seed)
        write(folder, rows)
        files = sorted(folder.glob("encodings-*"))
        assert all(map(is_whole, files))
        # Two files of one size: not even they pass for each other.
        assert len({file.stat().st_size for file in files}) == 1
        (folder / "manifest.json").unlink()
        KINDS[kind](files[seed % len(files)], random.Random(f"{kind} {seed}"))
        assert sum(map(is_whole, files)) == len(files) - (2 if kind == "swapped" else 1)


def test_what_is_not_there_is_an_error_and_not_silence(tmp_path: Path) -> None:
    rows = [np.array([4, 5, 1]), np.array([6, 1])]
    found = write(tmp_path, rows)
    with pytest.raises(UserError, match=r"lacks an instruction of 2 tokens that begins \[4, 5\]"):
        found.read(*pad_ids([np.array([4, 5])]))


def test_a_cache_of_something_else_or_without_a_file_is_refused(tmp_path: Path) -> None:
    rows = [np.array([4, 5, 1])]
    write(tmp_path, rows)
    with pytest.raises(UserError, match="differing: backbone "):
        EncodingStore(tmp_path, {**BINDING, "backbone": "c" * 64})
    found = EncodingStore(tmp_path, BINDING)
    file = next(tmp_path.glob("encodings-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{file.name} is missing or damaged"):
        EncodingStore(tmp_path, BINDING)
    with pytest.raises(UserError, match=rf"{file.name} is missing or damaged"):
        found.read(*pad_ids(rows))


def test_a_read_brings_in_its_own_pages_alone(tmp_path: Path) -> None:
    """One instruction of a file that is far larger: what the process holds in memory hardly grows."""
    rows = [np.arange(at, at + 1000, dtype=np.int32) for at in range(8)]
    found = write(tmp_path, rows, width=2048)
    assert found.bytes > 60_000_000
    small = write(tmp_path / "small", [rows[0]], width=2048)
    small.read(*pad_ids([rows[0]]))
    before = _resident()
    found.read(*pad_ids([rows[5]]))
    # The answer and its pages, and what the allocator keeps.
    assert _resident() - before < 30_000_000


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
