"""What goes wrong from outside: runs killed at any step go on to the last digit, bad input is named and mended."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tagi_ds import launch as launching_room
from tagi_ds import recipe
from tagi_ds.engine import distributed
from tagi_ds.errors import UserError
from tagi_ds.launch import Stage
from tagi_ds.stages import hypernetwork, store_logits, train_teachers
from tests.distributed import ROOT, RankResults, run_ranks
from tests.launching import launch, let_go_of_folders, write_recipe
from tests.teachers.conftest import make_tasks, write_sni

STEPS, LAST_KILL = 30, 22
"""Steps of a run, and the last of them after which it is killed: it must not have ended by then."""
LAYOUTS = {
    "single": (1, []),
    "zero3": (2, []),
    "pipeline": (2, ["--engine.stages", "2", "--engine.accumulation", "2"]),
}
"""By strategy, the processes and further settings."""
TIMED = ("seconds", "tflops", "memory_gb", "data/wait_share")
"""Figures of a step that are the machine's, beside all that end in _per_s."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with data, recipe and both stores; nothing in it is changed by a test."""
    folder = tmp_path_factory.mktemp("faults")
    write_sni(folder / "sni", make_tasks())
    path = write_recipe(folder / "recipe.yaml", folder, folder / "sni", tiny_folder)
    for name, stage in (("train_teachers", train_teachers), ("store_logits", store_logits)):
        config = recipe.parse(name, ["--config", str(path)]).config
        stage.run(Stage(name, config, distributed.current(), folder / name))
    return folder


# Killed and run again.


def finetune_flags(study: Path, strategy: str, run_dir: Path) -> list[str]:
    return ["--config", str(study / "recipe.yaml"), "--engine.strategy", strategy, "--output_dir", str(run_dir)]


def finetune_ranks(study: Path, strategy: str, run_dir: Path, until: Callable[[], bool] | None = None) -> RankResults:
    """The launcher's ranks without the launching program, whose own processes would double the time of a case."""
    processes, settings = LAYOUTS[strategy]
    flags = [*finetune_flags(study, strategy, run_dir), "--engine.steps", str(STEPS), *settings]
    return run_ranks(ROOT / "launchers" / "finetune.py", processes, flags, 180, check=until is None, until=until)


def exact_lines(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of every step so far, but for time and memory."""
    # A line that was being written when the run was killed has no end.
    whole = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    lines = [json.loads(line) for line in whole]
    kept = [{k: v for k, v in line.items() if k not in TIMED and not k.endswith("_per_s")} for line in lines]
    assert [line["step"] for line in kept] == list(range(1, len(kept) + 1))
    assert all(any(name.startswith("loss/") for name in line) for line in kept)
    return kept


@pytest.fixture(scope="module")
def unbroken(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """The lines of a run that nothing interrupts, by strategy; made once."""
    base, made = tmp_path_factory.mktemp("unbroken"), {}

    def lines(strategy: str) -> list[dict[str, Any]]:
        if strategy not in made:
            finetune_ranks(study, strategy, base / strategy)
            made[strategy] = exact_lines(base / strategy)
        assert len(made[strategy]) == STEPS
        return made[strategy]

    return lines


def kill_after(study: Path, strategy: str, run_dir: Path, step: int, delay: float) -> None:
    """Starts or goes on with a run, and kills all its processes `delay` seconds after it has reported a step."""
    file = run_dir / "metrics.jsonl"

    def reached() -> bool:
        if not file.is_file() or file.read_bytes().count(b"\n") < step:
            return False
        time.sleep(delay)
        return True

    killed = finetune_ranks(study, strategy, run_dir, reached)
    assert set(killed.statuses) == {-signal.SIGKILL}, killed.text
    assert not (run_dir / "done.json").exists(), "the run ended before it was killed"


def check_killed_run(
    study: Path, strategy: str, seed: int, run_dir: Path, whole: list[dict[str, Any]], kills: int
) -> None:
    """Kills one run again and again, each time at a random moment further on; every line is the unbroken run's."""
    chance, reported = random.Random(f"{strategy} {seed}"), 0
    for number in range(kills):
        first, last = (1 + part * (LAST_KILL - 1) // kills for part in (number, number + 1))
        step = max(chance.randrange(first, last), reported + 1)
        kill_after(study, strategy, run_dir, step, chance.uniform(0.0, 0.1))
        lines = exact_lines(run_dir)
        reported = len(lines)
        assert lines == whole[:reported], f"kill {number + 1}, after step {step}"
    again = finetune_ranks(study, strategy, run_dir)
    assert exact_lines(run_dir) == whole, again.text
    assert (run_dir / "done.json").is_file()


@pytest.mark.parametrize("strategy", ["zero3", "pipeline"])
def test_a_killed_run_goes_on_to_the_last_digit(
    strategy: str, study: Path, tmp_path: Path, unbroken: Callable[[str], list[dict[str, Any]]]
) -> None:
    check_killed_run(study, strategy, 1, tmp_path / "run", unbroken(strategy), kills=1)


KILLS = 4
"""Of one run; five runs a strategy make twenty."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
@pytest.mark.parametrize("strategy", LAYOUTS)
def test_campaign_of_killed_runs(
    strategy: str, seed: int, study: Path, tmp_path: Path, unbroken: Callable[[str], list[dict[str, Any]]]
) -> None:
    check_killed_run(study, strategy, seed, tmp_path / "run", unbroken(strategy), KILLS)


# Bad input.


@pytest.fixture
def spoilt(study: Path, tmp_path: Path) -> Callable[[str, str | None], Path]:
    """spoilt(file, content): a copy of the data in which a file has another content, or is gone."""

    def spoil(file: str, content: str | None) -> Path:
        folder = tmp_path / "spoilt"
        shutil.copytree(study / "sni", folder)
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_text(content, encoding="utf-8")
        return folder

    return spoil


@pytest.fixture
def refusal(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """refusal(*flags): how finetuning in this process is refused, always in one folder, before its first step."""
    monkeypatch.setattr(launching_room, "start", lambda timeout_s: distributed.current())

    def refuse(*flags: str) -> str:
        flags = ("--output_dir", str(tmp_path / "run"), *flags)
        monkeypatch.setattr(sys, "argv", ["finetune.py", *finetune_flags(study, "single", tmp_path / "run"), *flags])
        with pytest.raises(UserError) as refused:
            launching_room._run("finetune", hypernetwork.finetune)
        let_go_of_folders()
        assert refused.value.mend
        assert not list(tmp_path.glob("run/metrics.jsonl"))
        return str(refused.value)

    return refuse


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tasks/task1.json", "{never closed", "task1.json is not JSON"),
        ("tasks/task1.json", "[]", "task1.json is no task"),
        ("tasks/task1.json", '{"Definition": ["say it"]}', "task1.json has no Instances"),
        ("tasks/task1.json", '{"Definition": ["say it"], "Instances": []}', "task1.json has no Instances"),
        ("tasks/task1.json", None, "train_tasks.txt names task1, but"),
        ("splits/default/train_tasks.txt", "", "train_tasks.txt is empty"),
        ("splits/default/train_tasks.txt", None, "train_tasks.txt is missing"),
    ],
)
def test_bad_data_is_named(
    file: str, content: str | None, problem: str, spoilt: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    folder = spoilt(file, content)
    text = refusal("--data.sni_dir", str(folder))
    assert problem in text
    assert str(folder) in text


def test_an_unknown_key_is_named_with_its_nearest(study: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text((study / "recipe.yaml").read_text() + "\noptimiser: {learning_rate: 1.0}\n")
    text = refusal("--config", str(path))
    assert f"{path}: unknown key optimiser (did you mean optimizer?)" in text
    assert "unknown flag --engine.stepz (did you mean --engine.steps?)" in refusal("--engine.stepz", "3")


def test_a_store_of_another_backbone_or_data_set_is_refused(
    study: Path, tmp_path: Path, tied_folder: Path, spoilt: Callable[..., Path], refusal: Callable[..., str]
) -> None:
    parameters, logits = study / "train_teachers" / "store", study / "store_logits" / "store"
    text = refusal("--model.backbone", str(tied_folder), "--loss.kl", "0")
    assert f"{parameters} does not fit this run; differing: backbone (store: " in text
    task = json.loads((study / "sni" / "tasks" / "task1.json").read_text())
    task["Instances"][0]["output"] = ["bell"]
    other = str(spoilt("tasks/task1.json", json.dumps(task)))
    for weights, store, bound in (("--loss.kl", parameters, "inputs"), ("--loss.alignment", logits, "dataset")):
        text = refusal("--data.sni_dir", other, weights, "0")
        assert f"{store} does not fit this run; differing: {bound} (store: " in text
    missing = tmp_path / "nowhere"
    assert f"{missing} is not a finished store" in refusal("--loss.logit_store", str(missing))
    assert "differing: rank (store: 2, run: 4)" in refusal("--model.rank", "4", "--loss.alignment_form", "mse")


def test_an_output_folder_that_is_not_the_runs_own(study: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    done = tmp_path / "other"
    flags = [*finetune_flags(study, "single", done), "--engine.steps", "1"]
    config = recipe.parse("finetune", flags).config
    launching_room.run_folder.open_run(config, "finetune", 1)
    (done / "metrics.jsonl").write_text("{}\n")
    text = refusal("--output_dir", str(done), "--engine.steps", "2", "--seed", "4")
    assert f"{done} belongs to another run" in text
    assert "engine.steps: 1 -> 2" in text
    assert "seed: 3 -> 4" in text
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    assert "holds files that belong to no run (love.txt)" in refusal("--output_dir", str(tmp_path / "letters"))


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/tagi/run")):
        text = refusal("--output_dir", str(folder))
        assert str(folder) in text
        assert "--output_dir" in text


def test_a_missing_or_damaged_backbone(
    tmp_path: Path, tiny_folder: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "google/no-such-model-at-all"):
        text = refusal("--model.backbone", name, "--loss.kl", "0", "--loss.alignment", "0")
        assert name.removeprefix("./") in text
    torn = tmp_path / "torn"
    shutil.copytree(tiny_folder, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(torn) in refusal("--model.backbone", str(torn), "--loss.kl", "0", "--loss.alignment", "0")


def test_an_initial_hypernetwork_of_another_shape_or_place(
    study: Path, tmp_path: Path, make_tagi: Callable[..., Any], refusal: Callable[..., str]
) -> None:
    make_tagi(rank=3).save_pretrained(tmp_path / "model")
    text = refusal("--model.initial", str(tmp_path / "model"))
    assert f"model.initial {tmp_path / 'model'} holds another model" in text
    assert str(tmp_path) in refusal("--model.initial", str(tmp_path / "nowhere"))


# The same through real launchers: one error, no traceback, status 2.


@pytest.mark.parametrize(
    ("processes", "flags", "problem"),
    [
        (0, ["--data.sni_dir", "SPOILT"], "task1.json is not JSON"),
        (0, ["--model.backbon", "x"], "unknown flag --model.backbon (did you mean --model.backbone?)"),
        (2, ["--engine.strategy", "zero3", "--output_dir", "FILE"], "FILE is a file, not a folder"),
        (2, ["--engine.strategy", "zero3", "--data.sni_dir", "SPOILT"], "task1.json is not JSON"),
    ],
)
def test_launchers_end_with_one_error_and_status_2(
    processes: int, flags: list[str], problem: str, study: Path, tmp_path: Path, spoilt: Callable[..., Path]
) -> None:
    places = {"SPOILT": str(spoilt("tasks/task1.json", "{never closed")), "FILE": str(study / "recipe.yaml")}
    flags = [places.get(flag, flag) for flag in flags]
    base = finetune_flags(study, "single", tmp_path / "run")
    ended = launch("finetune", *base, *flags, processes=processes, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert ended.stderr.count("mend: ") == 1
    assert problem.replace("FILE", places["FILE"]) in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
