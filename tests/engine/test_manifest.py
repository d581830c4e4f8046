"""A folder's manifest: who hashes what, and what is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagi_ds.engine import manifest
from tagi_ds.engine.disk import require_parts
from tagi_ds.engine.manifest import MANIFEST, damage_of, facts_of, missing_of, seal
from tagi_ds.errors import UserError
from tagi_ds.files import sha256_of


def filled(folder: Path) -> list[Path]:
    (folder / "inner").mkdir(parents=True)
    files = [folder / "a", folder / "inner" / "b", folder / "inner" / "c"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * (1000 * number + 1))
    return files


def test_what_writers_say_makes_the_manifest_that_one_reader_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared = filled(tmp_path / "alone"), filled(tmp_path / "shared")
    seal(tmp_path / "alone")
    known = facts_of(tmp_path / "shared", shared[1:])
    read = []
    monkeypatch.setattr(manifest, "sha256_of", lambda file: (read.append(file), sha256_of(file))[1])
    seal(tmp_path / "shared", known)
    assert read == shared[:1], "what its writer has hashed is not read again"
    assert (tmp_path / "shared" / MANIFEST).read_bytes() == (tmp_path / "alone" / MANIFEST).read_bytes()
    assert len(alone) == len(shared)


def test_damage_is_found_by_the_part_that_has_the_file(tmp_path: Path) -> None:
    files = filled(tmp_path / "folder")
    seal(tmp_path / "folder")
    assert [damage_of(tmp_path / "folder", part, 5) for part in range(5)] == [None] * 5
    files[1].write_bytes(b"x" * files[1].stat().st_size)
    found = [damage_of(tmp_path / "folder", part, 5) for part in range(5)]
    assert sorted(found, key=str) == [None] * 4 + ["inner/b is not as it was written"]
    files[1].unlink()
    assert damage_of(tmp_path / "folder") == "inner/b is missing"


@given(st.lists(st.integers(0, 10**6), max_size=30), st.integers(1, 9))
def test_every_file_is_in_one_part_and_parts_are_alike(sizes: list[int], parts: int) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    dealt = manifest._dealt(named, parts)
    assert sorted(name for part in dealt for name in part) == sorted(named)
    loads = [sum(named[name] for name in part) for part in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_what_is_not_there_yet_is_waited_for_and_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = filled(tmp_path / "folder")
    parts = [{"host": "one", "files": {}}, {"host": "two", "files": facts_of(tmp_path / "folder", files)}]
    moved = files[2].rename(tmp_path / "away")
    assert missing_of(tmp_path / "folder", parts[1]["files"]) == ["inner/c"]  # type: ignore[arg-type]
    # It arrives while rank 0 waits.
    monkeypatch.setattr("tagi_ds.engine.disk.time.sleep", lambda seconds: moved.rename(files[2]))
    require_parts(tmp_path / "folder", parts)
    files[2].write_bytes(b"half")
    monkeypatch.setattr("tagi_ds.engine.disk.ARRIVES_S", -1.0)
    with pytest.raises(UserError, match=r"lacks what rank 1 on two has written there \(inner/c\)") as caught:
        require_parts(tmp_path / "folder", parts)
    assert "--output_dir" in caught.value.mend
