"""A study as jobs, without SLURM: which there are, what their scripts say, what is submitted again."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers import submit
from tagi_ds import run_folder
from tagi_ds.cluster import slurm, submission
from tagi_ds.cluster.cluster_file import ClusterFile, read_cluster_file
from tagi_ds.cluster.scripts import script_of
from tagi_ds.cluster.slurm import Queued
from tagi_ds.cluster.study_jobs import Job, plan_jobs
from tagi_ds.config import STAGES
from tagi_ds.errors import UserError
from tagi_ds.launch import DEFAULT_RECIPE, RECIPES
from tests.distributed import ROOT
from tests.launching import let_go_of_folders

SCRIPTS = ROOT / "launchers" / "slurm"
GPUS = ClusterFile(
    account="project 42",
    partition="gpu",
    time="24:00:00",
    nodes=2,
    gpus_per_node=8,
    gpu_type="h100",
    cpus_per_task=12,
    memory="0",
    exclude="n[13,17]",
    options=["--reservation=course"],
    modules=["cuda/12.8", "gcc"],
    setup="source .venv/bin/activate\n",
    stages={"train_teachers": {"jobs": 4, "nodes": 1, "gpus_per_node": 1}},
)


def planned(recipe: Path, *stages: str, cluster: ClusterFile | None = None, **flags: str) -> dict[str, Job]:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return {job.name: job for job in plan_jobs(recipe, named, cluster or ClusterFile(), stages)}


def assert_ordered(jobs: dict[str, Job]) -> None:
    names = list(jobs)
    for job in jobs.values():
        assert all(names.index(before) < names.index(job.name) for before in job.after), job


def test_the_embedded_study_is_the_quickstarts() -> None:
    jobs = planned(DEFAULT_RECIPE)
    assert_ordered(jobs)
    quickstarts = {*STAGES, "adapters", "compiled"}
    assert jobs.keys() == {*quickstarts, "report"}
    assert set(jobs["finetune"].after) == {"backbone", "train_teachers", "store_logits", "pretrain"}
    assert set(jobs["meta_train"].after) == {"backbone", "train_teachers", "store_logits", "pretrain", "finetune"}
    assert [name for name, job in jobs.items() if job.equal_compute] == ["meta_train"]
    assert jobs["evaluate"].tasks == 4, "untrained, backbone, meta-trained, TAGI"
    assert set(jobs["report"].after) == quickstarts


def test_a_published_backbone_and_named_stores_need_no_jobs() -> None:
    data = {"data__sni_dir": "sni", "data__c4_dir": "c4"}
    whole = planned(RECIPES / "sni_base.yaml", **data)
    assert_ordered(whole)
    assert list(whole) == ["train_teachers", "store_logits", "pretrain", "finetune", "convert", "evaluate", "report"]
    assert whole["evaluate"].tasks == 2
    assert "pretrain" not in planned(RECIPES / "sni_base.yaml", data__sni_dir="sni", data__c4_dir="null")
    assert "train_teachers" not in planned(RECIPES / "sni_base.yaml", **data, loss__parameter_store="there")
    assert "store_logits" not in planned(RECIPES / "sni_base.yaml", **data, loss__logits="online")
    assert "store_logits" not in planned(RECIPES / "sni_base.yaml", **data, loss__kl="0")


def test_a_meta_trained_teacher_comes_before_its_distributions() -> None:
    teacher = {"study_dir": "runs/x", "teachers__logit_teacher": "runs/x/meta_train/model"}
    jobs = planned(RECIPES / "sni_base.yaml", data__sni_dir="sni", data__c4_dir="c4", **teacher)
    assert_ordered(jobs)
    assert "meta_train" in jobs["store_logits"].after
    assert jobs["evaluate"].tasks == 3


def test_stages_may_be_chosen_and_data_are_asked_for() -> None:
    assert list(planned(DEFAULT_RECIPE, "finetune", "pretrain")) == ["pretrain", "finetune"]
    with pytest.raises(UserError, match="--stages names finetuning"):
        planned(DEFAULT_RECIPE, "finetuning")
    with pytest.raises(UserError, match=r"reads data\.sni_dir"):
        planned(RECIPES / "sni_base.yaml", "finetune", data__sni_dir="null")


def test_a_batch_that_no_job_could_deal_is_refused_before_the_first() -> None:
    data = {"data__sni_dir": "sni", "data__c4_dir": "c4"}
    shipped = read_cluster_file(ROOT / "launchers" / "slurm" / "cluster.yaml")
    assert planned(RECIPES / "sni_base.yaml", cluster=shipped, **data)
    with pytest.raises(UserError, match=r"pretrain: data\.tasks_per_batch = 8 does not divide by 32 ranks"):
        planned(RECIPES / "sni_base.yaml", cluster=ClusterFile(nodes=4, gpus_per_node=8), **data)


def test_a_script_says_what_the_cluster_file_says(tmp_path: Path) -> None:
    jobs = planned(DEFAULT_RECIPE, cluster=GPUS, seed="7")
    text = script_of(jobs["train_teachers"], GPUS, tmp_path / "study", tmp_path)
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "--account='project 42'",
        "--partition=gpu",
        "--time=24:00:00",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=h100:1",
        "--cpus-per-task=12",
        "--mem=0",
        "--exclude='n[13,17]'",
        "--array=0-3",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        "--reservation=course",
        f"--output={tmp_path}/study/slurm/train_teachers-%a.log",
    }
    lines = text.splitlines()
    assert lines.index("module load cuda/12.8 gcc") < lines.index("source .venv/bin/activate")
    assert shlex.split(lines[-1])[1:] == [
        str(SCRIPTS / "stage.sh"),
        "train_teachers",
        "--config",
        str(DEFAULT_RECIPE),
        "--seed=7",
    ]
    finetune = script_of(jobs["finetune"], GPUS, tmp_path, tmp_path)
    assert "--nodes=2" in finetune
    assert "--ntasks-per-node=8" in finetune
    assert "--array" not in finetune


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_sees_checkout_study_and_mounts(runtime: str, tmp_path: Path) -> None:
    cluster = ClusterFile(
        container="/images/tagi.img",
        container_runtime=runtime,  # type: ignore[arg-type]
        container_mounts=["/data", "/scratch:/tmp"],
        gpus_per_node=4,
    )
    text = script_of(planned(DEFAULT_RECIPE)["finetune"], cluster, tmp_path / "study", tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("srun_options=")]
    shown = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\n" "${{srun_options[@]}}" -- "${{wrap[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    mounts = f"{ROOT}:{ROOT},{tmp_path / 'study'}:{tmp_path / 'study'},{tmp_path}:{tmp_path},/data:/data,/scratch:/tmp"
    if runtime == "pyxis":
        expected = ["--container-image=/images/tagi.img", f"--container-mounts={mounts}"]
        assert shown[: shown.index("--")] == [*expected, f"--container-workdir={tmp_path}"]
    else:
        words = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(tmp_path), "/images/tagi.img"]
        assert shown[shown.index("--") + 1 :] == words


def test_the_scripts_pass_shellcheck(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    for job in planned(DEFAULT_RECIPE, cluster=GPUS).values():
        # What `setup` sources is the user's.
        text = script_of(job, GPUS, tmp_path, tmp_path).replace("source .venv/bin/activate\n", "")
        (tmp_path / f"{job.name}.sbatch").write_text(text)
    files = [*SCRIPTS.glob("*.sbatch"), SCRIPTS / "stage.sh", *tmp_path.glob("*.sbatch")]
    checked = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_plain_script(stage: str) -> None:
    text = (SCRIPTS / f"{stage}.sbatch").read_text()
    for option in ("--signal=USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in text
    assert f'launchers/slurm/stage.sh" {stage} "$@"' in text


# Submitting, with a SLURM that is made up.


class MadeUp:
    """Takes the place of SLURM's commands."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, tuple[str, ...]]] = []
        self.cancelled: list[str] = []
        self.waiting: list[Queued] = []

    def submit(self, script: Path, after: list[str]) -> str:
        number = str(100 + len(self.submitted))
        self.submitted.append((script.stem, tuple(after)))
        name = f"{script.parents[1].name}:{script.stem}"
        self.waiting.append(Queued(number, None, "PENDING", "Dependency", "", name))
        return number

    def cancel(self, jobs: list[str]) -> None:
        self.cancelled += jobs
        self.waiting = [each for each in self.waiting if each.job not in jobs]

    def end(self, name: str) -> None:
        self.waiting = [each for each in self.waiting if not each.name.endswith(f":{name}")]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    made = MadeUp()
    monkeypatch.setattr(slurm, "submit", made.submit)
    monkeypatch.setattr(slurm, "cancel", made.cancel)
    monkeypatch.setattr(slurm, "queue", lambda: made.waiting)
    return made


@pytest.fixture
def submitting(tmp_path: Path) -> Callable[[], list[str]]:
    """submitting(): submits four jobs, each behind those before it; what was said."""
    names = ["pretrain", "finetune", "convert", "evaluate"]
    jobs = [Job(name, name, (), tuple(names[:at]), 2 if name == "evaluate" else 1) for at, name in enumerate(names)]

    def run() -> list[str]:
        said: list[str] = []
        submission.submit_study(jobs, ClusterFile(), tmp_path / "study", said.append)
        let_go_of_folders()
        return said

    return run


def test_a_study_is_queued_once(made_up: MadeUp, submitting: Callable[[], list[str]]) -> None:
    submitting()
    chain = [("pretrain", ()), ("finetune", ("100",)), ("convert", ("100", "101"))]
    assert made_up.submitted == [*chain, ("evaluate", ("100", "101", "102"))]
    said = submitting()
    assert len(made_up.submitted) == 4
    assert said == [
        f"{name}: queued before, as job {100 + at}"
        for at, name in enumerate(["pretrain", "finetune", "convert", "evaluate"])
    ]


def test_what_is_done_is_skipped_and_what_failed_comes_again_with_its_followers(
    made_up: MadeUp, submitting: Callable[[], list[str]], tmp_path: Path
) -> None:
    submitting()
    (tmp_path / "study" / "pretrain").mkdir()
    run_folder.mark_done(tmp_path / "study" / "pretrain", {})
    made_up.end("pretrain")
    made_up.end("finetune")
    said = submitting()
    assert said[0] == "pretrain: done before"
    # SLURM may have forgotten a job that is done: nothing depends on its number.
    assert made_up.submitted[4:] == [("finetune", ()), ("convert", ("104",)), ("evaluate", ("104", "105"))]
    assert made_up.cancelled == ["102", "103"], "they waited for the job that failed"
    jobs = {job.name: job for job in submission.read_jobs(tmp_path / "study")}
    assert [job.job for job in jobs.values()] == ["100", "104", "105", "106"]
    assert [log.name for log in jobs["evaluate"].logs()] == ["evaluate-0.log", "evaluate-1.log"]


def test_a_job_that_was_queued_before_is_waited_for(made_up: MadeUp, tmp_path: Path) -> None:
    for name in ("train_teachers", "finetune"):
        submission.submit_study([Job(name, name, ())], ClusterFile(), tmp_path / "study", lambda text: None)
        let_go_of_folders()
    assert made_up.submitted == [("train_teachers", ()), ("finetune", ("100",))]
    assert [job.name for job in submission.read_jobs(tmp_path / "study")] == ["train_teachers", "finetune"]


def test_another_studys_job_of_the_same_number_is_none_of_this_one(
    made_up: MadeUp, submitting: Callable[[], list[str]]
) -> None:
    submitting()
    made_up.waiting = [Queued("100", None, "RUNNING", "None", "n1", "other:pretrain")]
    submitting()
    assert [name for name, _ in made_up.submitted[4:]] == ["pretrain", "finetune", "convert", "evaluate"]
    assert made_up.cancelled == []


def test_dry_run_prints_every_script_and_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(["--study_dir", str(tmp_path / "study"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("#!/usr/bin/env bash") == len(STAGES) + 3
    assert not (tmp_path / "study").exists()
    assert submit.main(["--study_dir", str(tmp_path / "study")]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err


def test_one_error_for_what_cannot_be_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["--output_dir", "x"], "--output_dir names one stage's folder"),
        (["--cluster", str(tmp_path / "none.yaml")], "none.yaml is missing"),
        (["--engine.stepz", "3"], "did you mean --engine.steps?"),
        (["status", "--study_dir", str(tmp_path)], f"no jobs were submitted for {tmp_path}"),
        (["logs", "finetune", "--study_dir", str(tmp_path)], f"no jobs were submitted for {tmp_path}"),
        (["logs", "--study_dir", str(tmp_path), "finetune"], f"no jobs were submitted for {tmp_path}"),
        (["cancel", "--study_dir", str(tmp_path)], f"no jobs were submitted for {tmp_path}"),
    ):
        assert submit.main(words) == 2
        assert told in capsys.readouterr().err
