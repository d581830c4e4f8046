"""The script of a job: what it asks for, how its shell is prepared, and launchers/slurm/stage.sh."""

from __future__ import annotations

import shlex
from pathlib import Path

from tagi_ds.cluster.cluster_file import ClusterFile, Resources
from tagi_ds.cluster.study_jobs import REPORT, Job
from tagi_ds.recipe import PROJECT

FOLDER = "slurm"
"""In the study's folder: scripts, logs, and what was submitted."""


def job_name(study_dir: Path, name: str) -> str:
    """As squeue shows it."""
    return f"{study_dir.resolve().name}:{name}"


def log_pattern(study_dir: Path, job: Job) -> str:
    """The job's log; `%a` stands for the number in the array."""
    return str(study_dir.resolve() / FOLDER / (f"{job.name}-%a.log" if job.tasks > 1 else f"{job.name}.log"))


def script_of(job: Job, cluster: ClusterFile, study_dir: Path, cwd: Path) -> str:
    """The whole script.

    Args:
        job: what it runs.
        cluster: what it asks for.
        study_dir: where its log goes.
        cwd: the folder that relative paths on the command line start from.
    """
    # The report is a matter of seconds; it is made where a conversion would be.
    stage = "convert" if job.launcher == REPORT else job.launcher
    asked = cluster.resources(stage)
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in _options(job, asked, study_dir, cwd))]
    if cluster.modules:
        lines.append(f"module load {shlex.join(cluster.modules)}")
    if cluster.setup.strip():
        lines += ["# from the cluster file", cluster.setup.rstrip()]
    home = shlex.quote(str(PROJECT))
    exported = {
        "TAGI_DS_HOME": home,
        "TAGI_DS_DEATHS": asked.deaths,
        "TAGI_DS_HEALTH": int(asked.health and job.launcher != REPORT),
        "PYTHON": shlex.quote(cluster.python),
    }
    lines.append("export " + " ".join(f"{name}={value}" for name, value in exported.items()))
    lines += _container(cluster, study_dir, cwd, asked.gpus_per_node > 0)
    words = shlex.join([job.launcher, *job.arguments])
    if job.equal_compute:
        lines += [
            "# As many steps as cost what the jobs before this one cost together.",
            f"export PYTHONPATH={home}${{PYTHONPATH:+:$PYTHONPATH}}",
            'steps=$(srun --nodes=1 --ntasks=1 "${srun_options[@]}" "${wrap[@]}" '
            f'"$PYTHON" -m tagi_ds.quickstart {shlex.quote(str(study_dir))}) || exit 1',
        ]
        words += ' --engine.steps "$steps" --scale 1'
    lines += ["# shellcheck source=launchers/slurm/stage.sh", f"source {home}/launchers/slurm/stage.sh {words}"]
    return "\n".join(lines) + "\n"


def _options(job: Job, asked: Resources, study_dir: Path, cwd: Path) -> list[str]:
    named = {
        "account": asked.account,
        "partition": asked.partition,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "time": asked.time,
        "cpus-per-task": asked.cpus_per_task,
        "mem": asked.memory,
        "exclude": asked.exclude,
        "array": f"0-{job.tasks - 1}" if job.tasks > 1 else None,
    }
    options = [f"--job-name={_quoted(job_name(study_dir, job.name))}"]
    options += [f"--{name}={_quoted(str(value))}" for name, value in named.items() if value is not None]
    options += [f"--nodes={asked.nodes}", f"--ntasks-per-node={asked.processes_of_node}"]
    if asked.gpus_per_node:
        kind = f"{asked.gpu_type}:" if asked.gpu_type else ""
        options.append(f"--gpus-per-node={kind}{asked.gpus_per_node}")
    options += [f"--output={_quoted(log_pattern(study_dir, job))}", f"--chdir={_quoted(str(cwd))}"]
    # A dependency that can no longer be met takes the job out of the queue: the next submit then brings it back.
    options += [f"--signal=USR1@{asked.signal_s}", "--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes"]
    return [*options, *asked.options]


def _quoted(value: str) -> str:
    """sbatch splits its lines as a shell would."""
    return shlex.quote(value)


def _container(cluster: ClusterFile, study_dir: Path, cwd: Path, gpus: bool) -> list[str]:
    if cluster.container is None:
        return ["srun_options=() wrap=()"]
    folders = [str(PROJECT), str(study_dir.resolve()), str(cwd)]
    mounts = list(dict.fromkeys([*(f"{each}:{each}" for each in folders), *map(_both_sides, cluster.container_mounts)]))
    if cluster.container_runtime == "pyxis":
        words = [f"--container-image={cluster.container}", f"--container-mounts={','.join(mounts)}"]
        return [f"srun_options=({shlex.join([*words, f'--container-workdir={cwd}'])}) wrap=()"]
    words = ["apptainer", "exec", *(["--nv"] if gpus else []), "--bind", ",".join(mounts), "--pwd", str(cwd)]
    return [f"srun_options=() wrap=({shlex.join([*words, cluster.container])})"]


def _both_sides(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"
