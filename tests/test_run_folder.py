"""The run folder: created, resumed, refused."""

import dataclasses
import fcntl
import os
import threading
from pathlib import Path

import pytest
import yaml

from tagi_ds import run_folder
from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.recipe import parse
from tagi_ds.run_folder import differing_fields, done_summary, is_done, mark_done, open_run


def _config(folder: Path, *flags: str) -> RunConfig:
    return parse("finetune", ["--output_dir", str(folder), *flags]).config


def _begun(folder: Path, *flags: str) -> Path:
    """The folder of a run that has taken steps."""
    open_run(_config(folder, *flags), "finetune", 1)
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def test_a_fresh_folder_records_configuration_and_circumstances(tmp_path: Path) -> None:
    config = _config(tmp_path / "run", "--data.tasks_per_batch", "6", "--data.examples_per_task", "2")
    folder = open_run(config, "finetune", world_size=4)
    assert folder == tmp_path / "run"
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    run = saved["run"]
    assert (run["stage"], run["world_size"], run["global_batch"]) == ("finetune", 4, 12)
    assert set(run["versions"]) == {"python", "torch", "deepspeed", "transformers", "tagi_ds"}
    assert "git" in run
    assert parse("finetune", ["--config", str(folder / "config.yaml")]).config == config


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = open_run(_config(tmp_path / "run"), "finetune", world_size=2, rank=1)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    folder = open_run(_config(tmp_path / "run"), "finetune", 1)
    (folder / "metrics.jsonl").write_text("{}\n")
    again = ["--engine.log_every", "3", "--engine.checkpoint_every", "7", "--engine.timeout_s", "5"]
    again += ["--engine.keep_checkpoints", "9", "--engine.evaluate_every", "4", "--study_dir", "elsewhere"]
    for world_size in (1, 2):
        assert open_run(_config(tmp_path / "run", *again), "finetune", world_size) == folder


def test_a_run_may_change_its_layout_and_records_each(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def start(world_size: int, *flags: str) -> list[dict[str, object]]:
        open_run(_config(folder, *flags), "finetune", world_size)
        (folder / "metrics.jsonl").write_text("{}\n")
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["run"]["layouts"]

    def reached(step: int) -> None:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "latest").write_text(f"step_{step}\n")

    first = {"from_step": 0, "world_size": 4, "strategy": "zero3", "stages": 1, "accumulation": 1, "deepspeed": None}
    assert start(8) == [{**first, "world_size": 8}]
    assert start(4) == [first], "the start before it has left nothing"
    reached(6)
    assert start(4) == [first]
    moved = ["--engine.strategy", "zero2", "--engine.accumulation", "2", "--engine.activation_checkpointing", "true"]
    second = {**first, "from_step": 6, "world_size": 2, "strategy": "zero2", "accumulation": 2}
    assert start(2, *moved) == [first, second]
    reached(9)
    assert start(2, *moved) == [first, second]
    assert start(1, *moved) == [first, second, {**second, "from_step": 9, "world_size": 1}]
    assert start(2, *moved) == [first, second], "nor has this one"


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--engine.steps", "17", "engine.steps: 1000 -> 17"),
        ("--model.sites", "[q]", "model.sites: ['q', 'v'] -> ['q']"),
        ("--seed", "1", "seed: 0 -> 1"),
        ("--data.sni_dir", "elsewhere", "data.sni_dir: None -> elsewhere"),
        ("--data.tasks_per_batch", "8", "data.tasks_per_batch: 16 -> 8"),
        ("--engine.precision", "fp32", "engine.precision: bf16 -> fp32"),
    ],
)
def test_another_run_is_refused_and_its_fields_named(tmp_path: Path, flag: str, value: str, expected: str) -> None:
    folder = _begun(tmp_path / "run")
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError) as refused:
        open_run(_config(tmp_path / "run", flag, value), "finetune", 1)
    assert expected in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "--output_dir" in refused.value.mend
    assert (folder / "config.yaml").read_bytes() == before


def test_another_stage_is_refused(tmp_path: Path) -> None:
    _begun(tmp_path / "run")
    with pytest.raises(UserError, match="stage finetune, not meta_train"):
        open_run(_config(tmp_path / "run"), "meta_train", 1)


def test_a_run_that_never_began_may_be_corrected(tmp_path: Path) -> None:
    folder = open_run(_config(tmp_path / "run"), "finetune", 1)
    open_run(_config(folder, "--seed", "4"), "finetune", 1)
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["seed"] == 4
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="seed: 4 -> 5"):
            open_run(_config(folder, "--seed", "5"), "finetune", 1)
    open_run(_config(folder, "--seed", "5"), "finetune", 1)


def test_a_folder_is_held_once_those_who_look_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_held", [])
    with (tmp_path / ".lock").open("w") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        gone = threading.Timer(0.3, looker.close)
        gone.start()
        run_folder.hold(tmp_path)
        gone.join()
    monkeypatch.setattr(run_folder, "_LOOKED_AT_S", 0.1)
    with pytest.raises(UserError, match="another process is running"):
        run_folder.hold(tmp_path)
    run_folder._held.pop().close()
    run_folder.hold(tmp_path)
    run_folder._held.pop().close()


def test_a_path_spelled_otherwise_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _begun(tmp_path / "run", "--data.sni_dir", "sni")
    open_run(_config(tmp_path / "run", "--data.sni_dir", str(tmp_path / "sni")), "finetune", 1)
    with pytest.raises(UserError, match=r"data\.sni_dir"):
        open_run(_config(tmp_path / "run", "--data.sni_dir", "other"), "finetune", 1)


def test_a_field_that_the_saved_run_did_not_know_had_its_default() -> None:
    assert differing_fields(RunConfig(), {"run": {"stage": "finetune"}}) == []
    changed = dataclasses.replace(RunConfig(), seed=5)
    assert differing_fields(changed, {}) == ["seed: 0 -> 5"]
    assert differing_fields(RunConfig(), {"engine": {"forgotten": 1}}) == ["engine.forgotten: 1 -> None"]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        open_run(_config(tmp_path), "finetune", 1)
    assert sorted(os.listdir(tmp_path)) == ["thesis.tex"]


def test_half_made_files_and_runs_inside_are_no_foreign_files(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.part").write_text("half")
    open_run(_config(tmp_path / "inner"), "finetune", 1)
    assert open_run(_config(tmp_path), "finetune", 1) == tmp_path


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="not a folder"):
        open_run(_config(tmp_path / "run"), "finetune", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write to"):
        open_run(_config(tmp_path / "locked" / "run"), "finetune", 1)


def test_a_folder_that_no_one_can_write_to() -> None:
    with pytest.raises(UserError, match="cannot write to"):
        open_run(_config(Path("/proc/tagi_run")), "finetune", 1)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("engine: [")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        open_run(_config(tmp_path), "finetune", 1)


def test_done(tmp_path: Path) -> None:
    folder = open_run(_config(tmp_path / "run"), "finetune", 1)
    assert not is_done(folder)
    with pytest.raises(UserError, match=r"done\.json is missing"):
        done_summary(folder)
    mark_done(folder, {"steps": 20, "seconds": 1.5})
    assert is_done(folder)
    assert done_summary(folder) == {"steps": 20, "seconds": 1.5}
    assert open_run(_config(tmp_path / "run"), "finetune", 1) == folder
