"""A study as jobs: which stages a recipe takes, and which follows which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tagi_ds import quickstart, recipe, run_folder, study
from tagi_ds.cluster.cluster_file import SHARED, ClusterFile
from tagi_ds.config import STAGES, RunConfig
from tagi_ds.errors import UserError
from tagi_ds.evaluation.results import RESULTS_FILE
from tagi_ds.launch import DEFAULT_RECIPE
from tagi_ds.processes import check_processes

REPORT = "report"
"""The last job: the study's results.json and report.html."""


@dataclass(frozen=True)
class Job:
    """One job of a study; an array where several divide its work.

    Attributes:
        name: of the job and of its run folder in the study.
        launcher: launchers/<launcher>.py.
        arguments: of the launcher.
        after: names of the jobs that must have ended well before.
        tasks: jobs of the array; 1: no array.
        equal_compute: its number of steps is known only when the jobs before it are done.
    """

    name: str
    launcher: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()
    tasks: int = 1
    equal_compute: bool = False

    def is_done(self, study_dir: Path) -> bool:
        """Whether an earlier job came to its end."""
        if self.launcher == REPORT:
            return report_is_current(study_dir, self.after)
        return run_folder.is_done(study_dir / self.name)


def report_is_current(study_dir: Path, names: Sequence[str]) -> bool:
    """Whether the study's results were written after the last of these jobs was done."""
    results, done = study_dir / RESULTS_FILE, [study_dir / name / run_folder.DONE_FILE for name in names]
    if not results.is_file() or not all(path.is_file() for path in done):
        return False
    written = results.stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= written for path in done)


def plan_jobs(
    recipe_path: Path, flags: Mapping[str, str], cluster: ClusterFile, stages: Sequence[str] = ()
) -> list[Job]:
    """The jobs of a recipe's study, every one behind those that it needs.

    Args:
        recipe_path: the recipe.
        flags: fields of the command line, as they were typed; every launcher is given them.
        cluster: says into how many jobs a stage is divided.
        stages: the stages to run; default: those that the recipe takes, from the first to the report.

    Raises:
        UserError: the recipe does not hold for one of the stages, or names no data for it.
    """
    arguments = ["--config", str(recipe_path.resolve()), *(f"--{key}={value}" for key, value in flags.items())]
    embedded = recipe_path.resolve() == DEFAULT_RECIPE
    configs = {stage: recipe.parse(stage, arguments).config for stage in STAGES}
    chosen = _ordered(stages) if stages else _stages_of(configs, embedded)
    jobs = []
    for stage in chosen:
        if not embedded:
            study.require_data(configs[stage], stage)
        # Before the hours of the stages in front of it.
        check_processes(configs[stage], stage, cluster.resources(stage).processes)
        after = [name for name in study.PREDECESSORS[stage] if name in chosen]
        if stage == "store_logits" and "meta_train" in chosen and _teacher_is_meta_trained(configs):
            after.append("meta_train")
        equal = stage == "meta_train" and embedded
        if equal:
            after = [name for name in study.TAGI_STAGES if name in chosen]
        tasks = _tasks(stage, configs[stage], cluster, chosen)
        jobs.append(Job(stage, stage, tuple(arguments), tuple(after), tasks, equal))
    jobs = _behind_their_needs(jobs)
    if stages:
        return jobs
    if embedded:
        folder = Path(configs["convert"].study_dir)
        for name, launcher, further in quickstart.conversions(folder):
            jobs.append(Job(name, launcher, (*arguments, *further), ("convert",)))
    return [*jobs, Job(REPORT, REPORT, tuple(arguments), tuple(job.name for job in jobs))]


def _behind_their_needs(jobs: Sequence[Job]) -> list[Job]:
    """The jobs in their order, but each behind those that it needs."""
    placed: dict[str, Job] = {}
    while len(placed) < len(jobs):
        job = next(job for job in jobs if job.name not in placed and placed.keys() >= set(job.after))
        placed[job.name] = job
    return list(placed.values())


def _ordered(stages: Sequence[str]) -> list[str]:
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"--stages names {stage}, which is no stage", f"the stages are {', '.join(STAGES)}")
    return [stage for stage in ORDER if stage in stages]


ORDER = ("backbone", "train_teachers", "meta_train", "store_logits", "pretrain", "finetune", "convert", "evaluate")
"""Of the stages, such that each stands behind all that it may need."""


def _stages_of(configs: Mapping[str, RunConfig], embedded: bool) -> list[str]:
    finetune = configs["finetune"]
    loss = finetune.loss
    taken = {
        "backbone": finetune.model.backbone is None,
        "train_teachers": loss.alignment != 0 and loss.parameter_store is None,
        "store_logits": loss.kl != 0 and loss.logits == "store" and loss.logit_store is None,
        "pretrain": finetune.model.initial is None and (embedded or configs["pretrain"].data.c4_dir is not None),
        "meta_train": embedded or _teacher_is_meta_trained(configs),
    }
    return [stage for stage in ORDER if taken.get(stage, True)]


def _teacher_is_meta_trained(configs: Mapping[str, RunConfig]) -> bool:
    """Whether the logit teacher is what the study's own meta-training leaves."""
    named, study_dir = configs["store_logits"].teachers.logit_teacher, configs["store_logits"].study_dir
    if named is None:
        return False
    return (Path(study_dir) / "meta_train").resolve() in Path(named).resolve().parents


def _tasks(stage: str, config: RunConfig, cluster: ClusterFile, chosen: Sequence[str]) -> int:
    if stage not in SHARED:
        return 1
    jobs = cluster.resources(stage).jobs
    if jobs is not None or stage != "evaluate":
        return jobs or 1
    if config.evaluation.methods:
        return len(config.evaluation.methods)
    # The converted model and an untrained one, and what else the study leaves.
    return 2 + ("backbone" in chosen) + ("meta_train" in chosen)
