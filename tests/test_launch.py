"""What surrounds a stage: what is assumed and said, predecessors, a run that is done, errors of one rank."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tagi_ds import launch as launching_room
from tagi_ds import recipe, run_folder, study
from tagi_ds.config import STAGES, RunConfig
from tagi_ds.engine import distributed
from tagi_ds.errors import UserError
from tagi_ds.launch import REAL_DATA, Stage
from tests.distributed import ROOT, run_ranks
from tests.launching import let_go_of_folders


class Rig:
    """Stages launched in this process: what ran, what was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        self.launched: list[tuple[str, list[str]]] = []
        self.worked: list[Stage] = []
        monkeypatch.setattr(launching_room, "start", lambda timeout_s: distributed.current())
        monkeypatch.setattr(launching_room, "leave", lambda: None)
        monkeypatch.setattr(launching_room, "prepare_index", lambda config: None)
        monkeypatch.setattr(study, "launch", self._launch)
        (folder / "data" / "tokenizer").mkdir(parents=True)

    def run(self, stage: str, *flags: str) -> None:
        self.monkeypatch.setattr(sys, "argv", [stage, "--study_dir", str(self.folder), *flags])
        launching_room._run(stage, self._work)
        let_go_of_folders()

    def finish(self, *stages: str) -> None:
        for stage in stages:
            (self.folder / stage).mkdir()
            run_folder.mark_done(self.folder / stage, {})

    def _launch(self, stage: str, arguments: list[str]) -> None:
        self.launched.append((stage, arguments))
        self.finish(stage)

    def _work(self, stage: Stage) -> dict[str, Any]:
        self.worked.append(stage)
        return {"steps": 3}


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    return Rig(monkeypatch, tmp_path / "study")


@pytest.mark.parametrize("stage", STAGES)
def test_without_a_recipe_it_says_what_it_assumes_and_runs_what_is_missing(
    stage: str, rig: Rig, capsys: pytest.CaptureFixture
) -> None:
    rig.finish("backbone") if stage != "backbone" else None
    rig.run(stage, "--scale", "0.5", "--seed", "7")
    said = capsys.readouterr().out
    assert f"no --config given: the embedded default quickstart.yaml in {rig.folder}" in said
    assert f"on real data: deepspeed launchers/{stage}.py {REAL_DATA[stage]}" in said
    missing = [name for name in study.PREDECESSORS[stage] if name != "backbone"]
    assert [name for name, _ in rig.launched] == missing
    for name, arguments in rig.launched:
        assert f"{stage} builds on {name}, which is not there yet" in said
        parsed = recipe.parse(name, arguments)
        assert (parsed.scale, parsed.config.seed, parsed.config.study_dir) == (0.5, 7, str(rig.folder))
    (worked,) = rig.worked
    assert (worked.name, worked.run_dir) == (stage, rig.folder / stage)
    assert worked.config.data.sni_dir == str(rig.folder / "data")
    assert worked.config.data.c4_dir == str(rig.folder / "data" / "c4" / "en")
    summary = run_folder.done_summary(rig.folder / stage)
    assert summary["steps"] == 3
    assert summary["seconds"] >= 0


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "backbone"])
def test_the_command_for_real_data_is_one_that_the_launcher_reads(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed = recipe.parse(stage, shlex.split(REAL_DATA[stage]))
    assert not parsed.is_default
    assert parsed.config.output_dir is not None
    assert parsed.config.study_dir != RunConfig().study_dir, "real data go into a study of their own"


def test_every_predecessor_is_a_stage_that_comes_before() -> None:
    assert study.PREDECESSORS.keys() == set(STAGES)
    for stage, before in study.PREDECESSORS.items():
        for number, name in enumerate(before):
            assert set(study.PREDECESSORS[name]) <= set(before[:number]), (stage, name)


def test_models_that_are_there_are_evaluated_without_a_study(rig: Rig, tiny_folder: Path, tmp_path: Path) -> None:
    rig.run("evaluate", "--evaluation.methods", json.dumps({"mine": str(tiny_folder)}))
    assert (rig.launched, len(rig.worked)) == ([], 1)
    missing = {"mine": str(tiny_folder), "later": str(tmp_path / "later")}
    rig.run("evaluate", "--evaluation.methods", json.dumps(missing), "--output_dir", str(tmp_path / "other"))
    assert rig.launched


@pytest.mark.parametrize(("stage", "field"), [("finetune", "sni_dir"), ("pretrain", "c4_dir"), ("evaluate", "sni_dir")])
def test_a_recipe_without_data_never_falls_back_on_the_embedded(
    stage: str, field: str, rig: Rig, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("engine: {steps: 2}\n")
    with pytest.raises(UserError, match=rf"{stage} reads data\.{field}[\s\S]*give --data\.{field}"):
        rig.run(stage, "--config", str(path))
    assert not rig.worked


def test_with_a_recipe_nothing_else_is_run(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("engine: {steps: 2}\n")
    rig.run("finetune", "--config", str(path), "--data.sni_dir", "mine", "--data.c4_dir", "corpus")
    assert (rig.launched, len(rig.worked)) == ([], 1)
    assert (rig.worked[0].config.data.sni_dir, rig.worked[0].config.data.c4_dir) == ("mine", "corpus")
    assert "no --config given" not in capsys.readouterr().out


def test_a_stage_that_is_done_returns_at_once(rig: Rig, capsys: pytest.CaptureFixture) -> None:
    rig.run("backbone")
    rig.run("backbone")
    assert len(rig.worked) == 1
    assert f"backbone: done before, in {rig.folder / 'backbone'}; delete that folder" in capsys.readouterr().out
    rig.finish("train_teachers", "store_logits", "pretrain", "finetune")
    rig.run("convert")
    rig.run("convert", "--convert.to", "peft")
    assert [stage.name for stage in rig.worked] == ["backbone", "convert", "convert"], "conversions may be many"


def test_work_that_fails_is_not_done(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage: Stage) -> dict[str, Any]:
        raise UserError("no luck", "try again")

    monkeypatch.setattr(rig, "_work", fail)
    with pytest.raises(UserError, match="no luck"):
        rig.run("backbone")
    assert not run_folder.is_done(rig.folder / "backbone")


@pytest.mark.parametrize(
    ("status", "expected"),
    [(0, None), (1, UserError), (2, UserError), (-9, UserError), (130, KeyboardInterrupt), (-2, KeyboardInterrupt)],
)
def test_a_launched_stage_has_its_own_ranks_and_its_end_is_understood(
    status: int, expected: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    class Ended:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append((command, env))

        def wait(self) -> int:
            return status

    monkeypatch.setattr(subprocess, "Popen", Ended)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if expected is None:
        study.launch("pretrain", ["--seed", "3"], processes=2)
    else:
        with pytest.raises(expected):
            study.launch("pretrain", ["--seed", "3"], processes=2)
    command, environment = seen[0]
    assert command[command.index("--num_accelerators") + 1] == "2"
    assert command[-3:] == [str(ROOT / "launchers" / "pretrain.py"), "--seed", "3"]
    assert not {"RANK", "WORLD_SIZE"} & environment.keys()
    if expected is None:
        study.launch("convert", ["--seed", "3"], processes=1)
        assert seen[-1][0] == [sys.executable, str(ROOT / "launchers" / "convert.py"), "--seed", "3"]


ONE_RANK_FAILS = """
from tagi_ds import launch
from tagi_ds.engine.distributed import barrier
from tagi_ds.errors import UserError
from tagi_ds.launch import run_stage

launch.prepare_index = lambda config: None

def work(stage):
    if stage.ranks.rank == int(FAILING):
        raise UserError("the disk of this machine is full", "free space on it")
    try:
        barrier()
    except RuntimeError as error:
        if not WRAPS:
            raise
        raise UserError("cannot load a file", "fetch it again") from error
    return {}

run_stage("backbone", work)
"""


CRASH = """
import faulthandler
from tagi_ds import launch

launch.prepare_index = lambda config: None
launch.run_stage("backbone", lambda stage: faulthandler._sigsegv())
"""


def test_a_crash_in_a_library_tells_its_line(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(CRASH)
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    ended = run_ranks(script, 1, ["--study_dir", str(tmp_path)], check=False)
    assert ended.statuses[0] == -signal.SIGSEGV
    assert re.search(rf'Segmentation fault[\s\S]*File "{script}", line 6 in <lambda>', ended.text)


@pytest.mark.parametrize(("failing", "wraps"), [(0, False), (1, True)])
def test_an_error_of_one_rank_is_told_once_and_ends_all(failing: int, wraps: bool, tmp_path: Path) -> None:
    """`wraps`: what loads in shards takes the other rank's end for a damaged file."""
    script = tmp_path / "stage.py"
    script.write_text(ONE_RANK_FAILS.replace("FAILING", repr(str(failing))).replace("WRAPS", repr(wraps)))
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    ended = run_ranks(script, 2, ["--study_dir", str(tmp_path), "--engine.timeout_s", "60"], check=False)
    assert ended.statuses == [2, 2], ended.text
    own = ended.outputs[failing]
    prefix = "[rank 1] " if failing else ""
    assert f"{prefix}error: the disk of this machine is full\n  mend: free space on it" in own
    assert "error: " not in ended.outputs[1 - failing]
    assert "Traceback" not in ended.text
    assert "cannot load a file" not in ended.text
    assert not (tmp_path / "backbone" / "done.json").exists()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(ONE_RANK_FAILS.replace("FAILING", "'0'").replace("WRAPS", "False"))
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        # Rank 0 of two, whose port another program has; its fellow never comes to the question.
        ended = run_ranks(
            script, 1, ["--study_dir", str(tmp_path)], check=False, env={"MASTER_PORT": port, "WORLD_SIZE": "2"}
        )
    assert ended.statuses == [1], ended.text
    assert f"error: the processes cannot meet at 127.0.0.1:{port}: " in ended.text
    assert "EADDRINUSE" in ended.text
    assert "--master_port" in ended.text
    assert "has ended" not in ended.text
    assert "Traceback" not in ended.text


def test_launchers_name_a_stage_of_their_own() -> None:
    """Each stage has its launcher, and each launcher that runs a stage runs its own."""
    for stage in STAGES:
        text = (ROOT / "launchers" / f"{stage}.py").read_text(encoding="utf-8")
        assert f'run_stage("{stage}", ' in text
