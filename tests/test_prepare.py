"""Preparing a folder: whole or absent, resumable, verified, and what it leaves is what stages then read."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from launchers import prepare as launcher
from tagi_ds import recipe
from tagi_ds.data import catalogue
from tagi_ds.errors import UserError
from tagi_ds.prepare import cloning, fetching, sources
from tagi_ds.prepare.fetching import RemoteFile
from tagi_ds.prepare.folder import PREPARED, SOURCES, prepare
from tagi_ds.prepare.plan import read_plan
from tests.data.test_validation import TASK, TEMPLATES


@pytest.fixture
def store() -> Iterator[str]:
    """An address whose files are in memory: SNI, P3, C4."""
    memory, name = fsspec.filesystem("memory"), uuid.uuid4().hex
    files: dict[str, bytes] = {"sni/splits/default/train_tasks.txt": b"one\ntwo\n"}
    files["sni/splits/default/test_tasks.txt"] = b"three\n"
    files["sni/splits/other/train_tasks.txt"] = b"four\n"
    for task in ("one", "two", "three", "four"):
        files[f"sni/tasks/{task}.json"] = json.dumps(TASK).encode()
    for shard in range(4):
        rows = "\n".join(json.dumps({"text": f"document {shard} {row} " * 20}) for row in range(8))
        files[f"c4/c4-train.0000{shard}-of-00004.json.gz"] = gzip.compress(rows.encode())
    files["c4/c4-validation.00000-of-00001.json.gz"] = files["c4/c4-train.00000-of-00004.json.gz"]
    row = json.dumps({"inputs_pretokenized": "Is tea good?", "targets_pretokenized": "yes"}).encode()
    for template in ("toy_good", "unwanted_other"):
        files[f"p3/{template}/train.jsonl"] = row
    files["templates/toy/templates.yaml"] = TEMPLATES.encode()
    for path, content in files.items():
        memory.pipe(f"/{name}/{path}", content)
    yield f"memory://{name}"
    memory.rm(f"/{name}", recursive=True)


@pytest.fixture
def written(tmp_path: Path, tiny_folder: Path, store: str) -> Path:
    """A recipe whose data are at addresses."""
    content = {
        "study_dir": str(tmp_path / "study"),
        "model": {"backbone": str(tiny_folder)},
        "data": {"sni_dir": f"{store}/sni", "c4_dir": f"{store}/c4", "validation_tasks": 1},
        "stages": {"pretrain": {"data": {"tasks_per_batch": 2}}, "finetune": {"engine": {"steps": 7}}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(written: Path, target: Path, *further: str, **settings: Any) -> Path:
    return prepare(read_plan(["--config", str(written), *further]), target, say=lambda _: None, show=False, **settings)


def files_of(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.rglob("*") if path.is_file() and "index" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def test_what_it_leaves_is_read_by_stages(written: Path, tmp_path: Path, store: str) -> None:
    target = tmp_path / "to"
    prepared = run(written, target, "--engine.steps", "5", "--optimizer.betas", "[0.9, 0.98]")
    assert prepared == target / PREPARED
    config = recipe.parse("finetune", ["--config", str(prepared)]).config
    assert config.engine.steps == 5, "the command line wins over the stage's entry"
    assert config.optimizer.betas == (0.9, 0.98)
    assert config.data.sni_dir == str(target / "data" / "sni")
    train, validation = catalogue.training_split(config.data, config.seed)
    assert sorted(task.name for task in train + validation) == ["one", "two"]
    # No split that the recipe reads names the fourth task, and two documents a batch want two shards.
    assert not (target / "data" / "sni" / "tasks" / "four.json").exists()
    shards = sorted(path.name for path in (target / "data" / "c4").iterdir())
    assert shards == ["c4-train.00000-of-00004.json.gz", "c4-train.00001-of-00004.json.gz"]
    record = json.loads((target / SOURCES).read_text())
    assert record[f"{store}/c4"] == {"folder": "data/c4", "files": 2, "bytes": record[f"{store}/c4"]["bytes"]}
    assert list((target / "index").iterdir())


def test_again_it_fetches_nothing_and_mends_what_is_damaged(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "to"
    run(written, target)
    before = files_of(target)
    fetched: list[str] = []
    real = MemoryFileSystem.get_file

    def counted(self: Any, path: str, *arguments: Any, **named: Any) -> Any:
        fetched.append(path.rsplit("/", 1)[-1])
        return real(self, path, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    run(written, target)
    assert fetched == []
    assert files_of(target) == before
    (target / "data" / "sni" / "tasks" / "one.json").write_text("{")
    (target / "data" / "sni" / "tasks" / "two.json").unlink()
    run(written, target)
    assert sorted(fetched) == ["one.json", "two.json"]
    after = files_of(target)
    assert {name: after[name] for name in after if name != fetching.LEDGER} == {
        name: before[name] for name in before if name != fetching.LEDGER
    }
    run(written, target, c4_shards=3)
    assert sorted(fetched)[0] == "c4-train.00002-of-00004.json.gz"


def test_an_index_whose_bytes_were_altered_is_made_anew(written: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    run(written, target)
    (altered,) = (target / "index").glob("*/examples.arrow")
    content = altered.read_bytes()
    assert content.count(b"two/0/a") == 1
    altered.write_bytes(content.replace(b"two/0/a", b"two/0/c"))
    run(written, target)
    assert altered.read_bytes() == content


@pytest.mark.parametrize("after", [0, 1, 3])
def test_interrupted_it_goes_on_with_what_is_missing(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = tmp_path / "whole"
    run(written, whole)
    target, real, calls = tmp_path / "to", MemoryFileSystem.get_file, threading.Semaphore(after)
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)

    def failing(self: Any, path: str, local: str, **named: Any) -> Any:
        if not calls.acquire(blocking=False):
            Path(local).write_bytes(b"half")
            raise ConnectionError("the network is gone")
        return real(self, path, local, **named)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "get_file", failing)
        with pytest.raises(UserError, match="the network is gone"):
            run(written, target)
    there = files_of(target)
    assert PREPARED not in there
    assert b"half" not in there.values()
    run(written, target)
    unlike = (PREPARED, fetching.LEDGER)
    assert {k: v for k, v in files_of(target).items() if k not in unlike} == {
        k: v for k, v in files_of(whole).items() if k not in unlike
    }


def test_a_moment_without_network_is_no_error(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = MemoryFileSystem.get_file, set()
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)

    def flaky(self: Any, path: str, local: str, **named: Any) -> Any:
        if path not in failed:
            failed.add(path)
            raise TimeoutError("slow")
        return real(self, path, local, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", flaky)
    assert run(written, tmp_path / "to").is_file()
    assert failed


@pytest.mark.parametrize("wrong", ["size", "sha256", "git_sha"])
def test_a_file_that_is_not_what_its_source_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)
    memory, content = fsspec.filesystem("memory"), b"content"
    memory.pipe("/one/file", content)
    right: dict[str, Any] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "git_sha": hashlib.sha1(b"blob 7\0" + content).hexdigest(),
    }
    fetching.fetch(memory, [RemoteFile("memory://one", "/one/file", "good", **right)], tmp_path, show=False)
    assert (tmp_path / "good").read_bytes() == content
    false = right | {wrong: 8 if wrong == "size" else "0" * 40}
    with pytest.raises(UserError, match="cannot be fetched"):
        fetching.fetch(memory, [RemoteFile("memory://one", "/one/file", "bad", **false)], tmp_path, show=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [fetching.LEDGER, "good"]


def test_a_ledger_cut_by_a_crash_costs_one_line(tmp_path: Path) -> None:
    entries = [{"local": f"f{number}", "size": number} for number in range(3)]
    for entry in entries[:2]:
        fetching._append(tmp_path / fetching.LEDGER, entry)
    path = tmp_path / fetching.LEDGER
    path.write_bytes(path.read_bytes()[:-4])
    fetching._append(path, entries[2])
    assert fetching.read_ledger(tmp_path) == {"f0": entries[0], "f2": entries[2]}


def test_a_small_disk_is_refused_before_anything_is_fetched(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage._replace(free=fetching.RESERVE))
    with pytest.raises(UserError, match="GB free"):
        run(written, tmp_path / "to")
    assert files_of(tmp_path / "to") == {}


def test_malformed_data_are_refused_and_named(written: Path, tmp_path: Path, store: str) -> None:
    place = f"/{store.removeprefix('memory://')}/sni/tasks/two.json"
    fsspec.filesystem("memory").pipe(place, b'{"Definition": ["x"]}')
    with pytest.raises(UserError, match=r"tasks/two\.json has no Instances") as refused:
        run(written, tmp_path / "to")
    assert "python -m tagi_ds.data validate" in refused.value.mend
    assert not (tmp_path / "to" / PREPARED).exists()
    fsspec.filesystem("memory").pipe(place, json.dumps(TASK).encode())
    run(written, tmp_path / "to")


def test_p3_brings_the_wanted_templates_alone(written: Path, tmp_path: Path, store: str) -> None:
    fields = ["--data.p3_dir", f"{store}/p3", "--data.p3_templates", f"{store}/templates", "--data.p3_train", "toy"]
    config = recipe.parse("finetune", ["--config", str(run(written, tmp_path / "to", *fields))]).config
    rows = sorted(path.parent.name for path in (tmp_path / "to" / "data" / "p3").rglob("*.jsonl"))
    assert rows == ["toy_good"]
    assert config.data.p3_templates == str(tmp_path / "to" / "data" / "p3_templates.json")
    train, validation = catalogue.training_split(config.data, config.seed)
    assert "toy_good" in {task.name for task in train + validation}


Git = Callable[..., str]


@pytest.fixture
def git(tmp_path: Path) -> Git:
    """Runs git in a repository of tasks, ``natural.git``, and returns what it says."""
    origin = tmp_path / "natural.git"
    (origin / "tasks").mkdir(parents=True)
    (origin / "splits" / "default").mkdir(parents=True)
    for name in ("one", "two"):
        (origin / "tasks" / f"{name}.json").write_text(json.dumps(TASK))
    (origin / "splits" / "default" / "train_tasks.txt").write_text("one\ntwo\n")

    def command(*words: str) -> str:
        called = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(called, check=True, capture_output=True, text=True).stdout.strip()

    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "tasks"]):
        command(*words)
    return command


def test_a_repository_is_cloned_once(written: Path, tmp_path: Path, git: Git) -> None:
    origin = tmp_path / "natural.git"
    address = f"file://{origin}"
    prepared = run(written, tmp_path / "to", "--data.sni_dir", address, c4_shards=1)
    commit = git("rev-parse", "HEAD")
    assert json.loads((tmp_path / "to" / SOURCES).read_text())[address]["revision"] == commit
    shutil.rmtree(origin)
    assert run(written, tmp_path / "to", "--data.sni_dir", address, c4_shards=1) == prepared
    with pytest.raises(UserError, match="cannot be cloned"):
        cloning.clone(address, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UserError, match=r"natural\.git@v9 cannot be cloned"):
        cloning.clone(f"{address}@v9", tmp_path / "to/data/sni")
    assert cloning.is_cloned(address, tmp_path / "to/data/sni"), "what was there is there"


def test_a_revision_is_cloned_and_another_repository_takes_its_place(tmp_path: Path, git: Git) -> None:
    git("tag", "-a", "v1", "-m", "first")
    first, address, folder = git("rev-parse", "HEAD"), f"file://{tmp_path}/natural.git", tmp_path / "clone"
    (tmp_path / "natural.git/tasks/three.json").write_text(json.dumps(TASK))
    git("add", ".")
    git("commit", "-q", "-m", "a third")
    second = git("rev-parse", "HEAD")
    shutil.copytree(tmp_path / "natural.git", tmp_path / "copy.git")
    other = f"file://{tmp_path}/copy.git"
    for named, commit in (
        (address, second),
        (f"{address}@v1", first),
        (f"{address}@{second}", second),
        (f"{address}@{first}#tasks", first),
        (other, second),
    ):
        assert cloning.is_repository(named)
        assert not cloning.is_cloned(named, folder)
        found = cloning.clone(named, folder)
        assert found == (folder / "tasks" if "#" in named else folder)
        assert cloning.is_cloned(named, folder)
        assert (cloning.revision(folder), (folder / "tasks/three.json").exists()) == (commit, commit == second)
    assert cloning.is_cloned(f"{other}@{second}#splits", folder), "the same commit by its name"
    with pytest.raises(UserError, match="has no folder nowhere"):
        cloning.clone(f"{other}#nowhere", folder)


def test_no_source_is_mixed_with_another(written: Path, tmp_path: Path, git: Git, store: str) -> None:
    rows = gzip.compress(json.dumps({"text": "another document " * 20}).encode())
    fsspec.filesystem("memory").pipe(f"{store.removeprefix('memory:/')}/other/x.json.gz", rows)
    target, address = tmp_path / "to", f"file://{tmp_path}/natural.git"
    run(written, target, "--data.sni_dir", address, c4_shards=1)
    with pytest.raises(UserError, match=r"data/sni is a clone, and memory://.* is to be fetched into it"):
        run(written, target, c4_shards=1)
    with pytest.raises(UserError, match=r"data/c4 holds c4-train.0000\d-of-00004.json.gz of .*/c4, and .*/other is"):
        run(written, target, "--data.sni_dir", address, "--data.c4_dir", f"{store}/other")
    shutil.rmtree(target / "data/sni/.git")
    with pytest.raises(UserError, match=r"data/sni is there and not a clone of file://.*natural\.git"):
        run(written, target, "--data.sni_dir", address, c4_shards=1)


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that fetching a model asks for."""

    files: dict[str, bytes]
    commit = "0123456789abcdef0123456789abcdef01234567"
    served: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        if self.path.startswith(f"/api/models/org/tiny/tree/{self.commit}"):
            lfs = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                | {"lfs": {"oid": lfs[name], "size": len(content), "pointerSize": 1}}
                for name, content in self.files.items()
            ]
            self.send(json.dumps(tree).encode(), body)
        elif self.path.startswith("/api/models/org/tiny"):
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": "0" * 40}
                | {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}}
                for name, content in self.files.items()
            ]
            self.send(json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": siblings}).encode(), body)
        elif self.path.startswith(f"/org/tiny/resolve/{self.commit}/"):
            name = self.path.rsplit("/", 1)[-1]
            if body:
                self.served.append(name)
            self.send(self.files[name], body, {"ETag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"'})
        else:
            self.send_error(404)

    def send(self, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in {
            "Content-Length": str(len(content)),
            "X-Repo-Commit": self.commit,
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.files = {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.is_file()}
    Hub.files |= {"pytorch_model.bin": b"the same weights once more", "flax_model.msgpack": b"x", "README.md": b"x"}
    Hub.served = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(sources, "HfApi", lambda: huggingface_hub.HfApi(endpoint=address))
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(sources, "snapshot_download", lambda *a, **named: real(*a, **named, endpoint=address))
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_model_comes_from_the_hub_once_and_whole(hub: type[Hub], written: Path, tmp_path: Path) -> None:
    prepared = run(written, tmp_path / "to", "--model.backbone", "org/tiny")
    folder = tmp_path / "to" / "models" / "org--tiny"
    config = recipe.parse("finetune", ["--config", str(prepared)]).config
    assert config.model.backbone == str(folder)
    there = {path.name for path in folder.iterdir() if path.is_file()}
    assert there == set(hub.files) - {"pytorch_model.bin", "flax_model.msgpack", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert json.loads((tmp_path / "to" / SOURCES).read_text())["org/tiny"]["revision"] == hub.commit
    assert len(hub.served) == len(there)
    run(written, tmp_path / "to", "--model.backbone", "org/tiny")
    assert len(hub.served) == len(there)
    damaged = folder / "model.safetensors"
    weights, time = bytearray(damaged.read_bytes()), damaged.stat().st_mtime
    weights[-1] ^= 1
    damaged.write_bytes(weights)
    # As a disk damages it: the hub's library fetches anew what was written more than a second after it came.
    os.utime(damaged, (time, time))
    with pytest.raises(UserError, match="not what the hub says"):
        run(written, tmp_path / "to", "--model.backbone", "org/tiny")
    run(written, tmp_path / "to", "--model.backbone", "org/tiny")
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_model_that_is_nowhere_is_named(hub: type[Hub], written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="org/none"):
        run(written, tmp_path / "to", "--model.backbone", "org/none")


def test_the_launcher(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "to"
    assert launcher.main(["--config", str(written), "--to", str(target), "--c4_shards", "0"]) == 0
    printed = capsys.readouterr().out
    assert f"--config {target / PREPARED}" in printed
    assert not (target / "data" / "c4").exists()
    assert launcher.main(["--config", str(written), "--to", str(target), "--data.sni_dri", "x"]) == 2
    assert "did you mean data.sni_dir" in capsys.readouterr().err.replace("--data", "data")
    assert launcher.main(["--to", str(target)]) == 2
    assert "--config" in capsys.readouterr().err
