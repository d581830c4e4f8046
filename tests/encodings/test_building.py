"""Building: the same bytes on any number of processes, whole or absent however it ends, one error where it cannot."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from tagi_ds.config import EngineConfig
from tagi_ds.data.collate import pad_ids
from tagi_ds.encodings import building, store
from tagi_ds.encodings.store import EncodingStore
from tagi_ds.engine.strategy import Strategy
from tagi_ds.errors import UserError
from tests.distributed import run_ranks
from tests.encodings import building_ranks
from tests.encodings.building_ranks import BATCH_TOKENS, instructions, make_cache, prepared
from tests.teachers.stage_process import KILLED, kill_at
from tests.test_equality import EVERYTHING_RELEASED


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH_TOKENS", BATCH_TOKENS)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> Strategy:
    return prepared(tiny_folder, EngineConfig(strategy="single", precision="fp32"))


@pytest.fixture(scope="module")
def built(alone: Strategy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by one process without interruption; not to be changed."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BATCH_TOKENS", BATCH_TOKENS)
        make_cache(folder).build(alone)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_kept_is_what_the_encoder_makes_of_each_instruction(built: Path, alone: Strategy) -> None:
    found = EncodingStore(built, make_cache(built).binding)
    module: Any = alone.module
    for ids in instructions():
        alone_in_its_batch = torch.from_numpy(ids)[None].long()
        wanted = module.encode_instructions(alone_in_its_batch, torch.ones_like(alone_in_its_batch))
        torch.testing.assert_close(found.read(*pad_ids([ids]))[:, : len(ids)], wanted, rtol=1e-5, atol=1e-6)
    assert found.manifest["flops"] > 0
    assert len(found.manifest["shards"]) > 4


def test_two_ranks_write_the_same_bytes_under_every_strategy(built: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "released.json").write_text(json.dumps(EVERYTHING_RELEASED))
    runs: list[dict[str, Any]] = [
        {"name": "zero2", "strategy": "zero2"},
        {"name": "zero3", "strategy": "zero3", "deepspeed": str(tmp_path / "released.json")},
        {"name": "pipeline", "strategy": "pipeline", "stages": 2},
    ]
    result = run_ranks(building_ranks.__file__, 2, [str(tiny_folder), str(tmp_path), json.dumps(runs)], timeout=120)
    assert "encoding 12 instructions once: 0.000 GB in" in result.outputs[0]
    assert "encoding instructions: 12/12 (100 %)" in result.outputs[0]
    assert not result.outputs[1].strip(), "rank 0 speaks"
    for run in runs:
        assert contents(tmp_path / run["name"]) == contents(built), run["name"]


@pytest.mark.parametrize("replacement", [1, 3, "last"])
def test_a_build_that_was_killed_goes_on_to_the_same_bytes(
    replacement: Any, built: Path, alone: Strategy, tmp_path: Path
) -> None:
    # The manifest is written last.
    replacement = len(list(built.glob("encodings-*"))) + 1 if replacement == "last" else replacement
    folder = tmp_path / "cache"
    child = os.fork()
    if child == 0:
        kill_at(replacement)
        make_cache(folder).build(alone)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    assert not (folder / "manifest.json").exists()
    assert list(folder.glob(".*.part")), "what was being written lies aside"
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("encodings-*")}
    assert len(there) == replacement - 1
    with pytest.raises(UserError, match="not a finished store"):
        EncodingStore(folder, make_cache(folder).binding)
    make_cache(folder).build(alone)
    # The manifest counts what the build that ended it computed.
    assert {**contents(folder), "manifest.json": b""} == {**contents(built), "manifest.json": b""}
    assert all((folder / name).stat().st_mtime_ns == time for name, time in there.items()), "none is encoded twice"


def test_a_second_start_encodes_nothing(
    built: Path, alone: Strategy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(built, folder)

    monkeypatch.setattr(alone, "encode_instructions", pytest.fail)
    make_cache(folder).build(alone)
    assert contents(folder) == contents(built)
    assert not capsys.readouterr().out


def test_truncated_files_are_made_anew(
    built: Path, alone: Strategy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(built, folder)
    first, second, *rest = sorted(folder.glob("encodings-*"))
    first.write_bytes(first.read_bytes()[:-9])
    second.unlink()
    kept = {path: path.stat().st_mtime_ns for path in rest}
    make_cache(folder).build(alone)
    assert f"2 of {len(rest) + 2} files in {folder} are missing or damaged" in capsys.readouterr().out
    assert {**contents(folder), "manifest.json": b""} == {**contents(built), "manifest.json": b""}
    assert {path: path.stat().st_mtime_ns for path in rest} == kept


@pytest.mark.parametrize("field", ["backbone", "tokenizer", "dtype", "prompt"])
def test_a_cache_of_another_run_is_made_anew_and_said(
    field: str, built: Path, alone: Strategy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(built, folder)
    other = make_cache(folder, **{field: "another"})
    with pytest.raises(UserError, match=f"differing: {field} "):
        EncodingStore(folder, other.binding)
    other.build(alone)
    assert f"were encoded for another {field}: they are encoded anew" in capsys.readouterr().out
    assert other.store.manifest["binding"][field] == "another"
    assert not contents(folder).keys() & contents(built).keys() - {"manifest.json"}, "nothing of the other remains"


def test_a_disk_without_room_is_refused_before_anything_is_encoded(
    alone: Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(UserError, match=r"needs 0\.000 GB for encoded instructions, and its disk has 0\.000 GB free"):
        make_cache(tmp_path / "cache").build(alone)
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_that_fills_up_is_one_error_and_leaves_no_half_file(
    alone: Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes, seen = Path.write_bytes, [0]

    def full(path: Path, content: Any) -> int:
        seen[0] += 1
        if seen[0] == 3:
            write_bytes(path, content[:10])
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match=r"No space left on device(.|\n)*mend: free space"):
        make_cache(folder).build(alone)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in folder.glob("encodings-*"))
    assert len(list(folder.iterdir())) == 2
