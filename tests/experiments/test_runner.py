"""The list of work: order, jobs at once, failures, going on, others at the same work, and interruption."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tagi_ds import run_folder
from tagi_ds.experiments import runner
from tagi_ds.experiments.definition import Speed, Study
from tagi_ds.experiments.estimates import Estimates, duration
from tagi_ds.experiments.nodes import Node, Plan
from tagi_ds.experiments.planning import plan_study
from tagi_ds.experiments.processes import LocalProcess
from tagi_ds.experiments.runner import Runner, tail
from tagi_ds.experiments.tuning import first_trials, read_chosen, read_tuned, tuning_outcome, write_tuning
from tagi_ds.files import write_json
from tests.experiments.studies import FakeProcess, Launches, leave, study_of


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_POLL_S", 0.01)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return study_of(tmp_path)


@pytest.fixture
def plan(study: Study) -> Plan:
    return plan_study(study, ["main"])


def estimates_of(plan: Plan) -> Estimates:
    return Estimates(plan, (12, 5, 5), Speed())


def runner_of(study: Study, plan: Plan, start: object, jobs: int = 2, said: list[str] | None = None) -> Runner:
    say = said.append if said is not None else (lambda text: None)
    return Runner(plan, study.folder, estimates_of(plan), jobs, start, say)  # type: ignore[arg-type]


def test_each_starts_when_what_it_needs_is_done_and_no_more_than_jobs_at_once(study: Study, plan: Plan) -> None:
    started: list[str] = []
    launches = Launches()

    def start(node: Node, arguments: Sequence[str], log: Path) -> FakeProcess:
        assert all(plan.nodes[need].done for need in node.needs)
        started.append(node.name)
        return launches(node, arguments, log)

    outcome = runner_of(study, plan, start, jobs=3).run(list(plan.nodes))
    assert outcome.complete
    assert sorted(started) == sorted(plan.nodes)
    assert launches.most_at_once == 3


def test_a_failed_launch_is_named_and_what_does_not_need_it_goes_on(study: Study, plan: Plan) -> None:
    said: list[str] = []
    launches = Launches(failing=["pretrain-tagi-s0"])
    outcome = runner_of(study, plan, launches, said=said).run(list(plan.nodes))
    (failed,) = outcome.failed
    assert failed.startswith("pretrain-tagi-s0")
    assert "the disk is full" in outcome.failed[failed]
    told = next(text for text in said if text.startswith(failed))
    assert "status 2" in told
    assert "error: the disk is full" in told
    assert {name.rsplit("-", 1)[0] for name in outcome.blocked} == {
        *("finetune-tagi-s0", "convert-tagi-s0", "evaluate-finetune-tagi-s0")
    }
    assert set(outcome.blocked.values()) == {failed}
    left = {failed, *outcome.blocked}
    assert all(node.done == (name not in left) for name, node in plan.nodes.items())
    again = Launches()
    assert runner_of(study, plan, again).run(list(plan.nodes)).complete
    assert set(again.started) == left, "what is done stays done"


def test_a_launch_that_ends_without_a_result_has_failed(study: Study, plan: Plan) -> None:
    class Nothing(FakeProcess):
        def poll(self) -> int | None:
            return 0

    outcome = runner_of(study, plan, lambda node, *_: Nothing(Launches(), node)).run(list(plan.nodes))
    (name,) = outcome.failed
    assert plan.nodes[name].stage == "benchmark"
    assert "without a result" in outcome.failed[name]


def test_two_runners_share_the_work_and_no_launch_is_started_twice(study: Study, plan: Plan) -> None:
    """The second works off the rest while the first one's launch is under way."""
    first, second = Launches(), Launches()
    ours = runner_of(study, plan, first, jobs=1)
    with ours.work.hold("backbone-of-nobody"):
        pass
    inner: list[bool] = []

    def start(node: Node, arguments: Sequence[str], log: Path) -> FakeProcess:
        if node.stage == "backbone" and not inner:
            inner.append(True)
            other = plan_study(study, ["main"])
            names = [name for name in other.nodes if node.name not in other.closure([name])]
            assert runner_of(study, other, second, jobs=2).run(names).complete
        return first(node, arguments, log)

    assert runner_of(study, plan, start, jobs=1).run(list(plan.nodes)).complete
    assert set(first.started) | set(second.started) == set(plan.nodes)
    assert not set(first.started) & set(second.started)


def test_what_another_has_claimed_is_waited_for(study: Study, plan: Plan) -> None:
    name = next(iter(plan.nodes))
    launches = Launches()
    ours = runner_of(study, plan, launches)
    asked: list[int] = []
    with ours.work.hold(name) as held:
        assert held
        other = runner_of(study, plan, launches)
        other._refresh([name])
        assert other._step([name]), "there is something to wait for"
        assert not launches.started
        asked.append(1)
    assert other.run([name]).complete
    assert launches.started == [name]


def test_a_launch_that_outlived_its_runner_is_waited_for(study: Study, plan: Plan) -> None:
    node = next(iter(plan.nodes.values()))
    node.run_dir.mkdir(parents=True)
    launches = Launches()
    ours = runner_of(study, plan, launches)
    with (node.run_dir / run_folder.LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ours._step([node.name])
        assert not launches.started
    (node.run_dir / run_folder.LOCK_FILE).unlink()
    ours._step([node.name])
    assert launches.started == [node.name]
    ours._stop_all()


def test_interrupted_it_stops_its_launches_and_gives_its_claims_back(
    study: Study, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[FakeProcess] = []

    class Lasting(FakeProcess):
        def poll(self) -> int | None:
            return 130 if self.stopped else None

    def start(node: Node, arguments: Sequence[str], log: Path) -> FakeProcess:
        running.append(Lasting(Launches(), node))
        return running[-1]

    def interrupted(seconds: float) -> None:
        if running and not running[0].stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    ours = runner_of(study, plan, start)
    with pytest.raises(KeyboardInterrupt):
        ours.run(list(plan.nodes))
    assert [process.stopped for process in running] == [True]
    assert not list(ours.work.folder.glob("*.claim"))


def test_equal_compute_is_the_number_of_steps_that_costs_the_same(tmp_path: Path) -> None:
    equal = {"method": "meta_training", "compute_of": "tagi", "set": {"model": {"initial": "scratch"}}}
    more = {"method": "meta_training", "compute_of": "tagi"}
    variants = {"tagi": {"method": "tagi"}, "equal": equal, "more": more}
    study = study_of(tmp_path, parts={"main": {"seeds": [0], "reference": "tagi", "variants": variants}})
    plan = plan_study(study, ["main"])
    launches = Launches()
    assert runner_of(study, plan, launches).run(list(plan.nodes)).complete
    cells = {cell.variant: cell for cell in plan.cells}
    steps = {
        plan.nodes[name].stage: plan.nodes[name].summary()["steps"]
        for name in cells["tagi"].training
        if "steps" in plan.nodes[name].summary()
    }
    # In the made-up launches every step costs alike, and teachers and stores nothing.
    total = steps["backbone"] + steps["pretrain"] + steps["finetune"]

    def told(variant: str) -> list[str]:
        name = cells[variant].trained
        assert name is not None
        return launches.arguments[name]

    assert f"--engine.steps={total}" in told("equal")
    assert f"--engine.steps={total - steps['backbone']}" in told("more"), "it begins with the backbone's steps"
    assert cells["equal"].training == (cells["equal"].trained,)


def test_tuning_chooses_by_the_mean_over_seeds_and_is_kept(tmp_path: Path) -> None:
    tuning = {"seeds": [0, 1], "methods": ["hint"], "grid": {"optimizer.learning_rate": [1e-3, 2e-3, 4e-3]}}
    study = study_of(tmp_path, tuning=tuning)
    assert read_tuned(study) is None
    assert study.tuning is not None
    plan = plan_study(study, [], first_trials(study.tuning, ["hint"]))
    # 1e-3 has the best single seed, 2e-3 the best mean.
    scores = {(1e-3, 0): 0.9, (1e-3, 1): 0.1, (2e-3, 0): 0.6, (2e-3, 1): 0.7, (4e-3, 0): 0.5, (4e-3, 1): 0.5}
    best = {trial.trained: scores[trial.point[0][1], trial.seed] for trial in plan.trials}
    assert runner_of(study, plan, Launches(best=best)).run(list(plan.nodes)).complete
    outcome = tuning_outcome(study, plan)
    found = outcome["methods"]["hint"]
    assert found["chosen"] == {"optimizer.learning_rate": 2e-3}
    assert found["at_edge"] == []
    assert [point["mean"] for point in found["points"]] == pytest.approx([0.5, 0.65, 0.5])
    assert found["points"][0]["seeds"] == {"0": 0.9, "1": 0.1}
    assert outcome["metric"] == "validation/exact"
    write_tuning(study, outcome)
    assert read_tuned(study) == {"hint": {"optimizer.learning_rate": 2e-3}}
    (tmp_path / "other").mkdir()
    more = study_of(tmp_path / "other", tuning={**tuning, "methods": ["hint", "tagi"]}, study_dir=str(study.folder))
    assert read_tuned(more) is None, "one more is still to be tuned"
    assert read_chosen(more) == read_tuned(study), "a report of what is there has those that were"
    other = study_of(tmp_path / "other", tuning={**tuning, "seeds": [0]}, study_dir=str(study.folder))
    with pytest.raises(ValueError, match="is the outcome of another grid"):
        read_tuned(other)


def test_estimates_learn_from_what_launches_took(study: Study, plan: Plan) -> None:
    finetuned = [node for node in plan.nodes.values() if node.stage == "finetune"]
    estimates = estimates_of(plan)
    before = estimates.seconds(finetuned[0])
    assert before == pytest.approx(Speed().start_s + estimates.flops(finetuned[0]) / Speed().flops_per_s)
    estimates.note(finetuned[0], 200.0)
    assert estimates.seconds(finetuned[0]) == pytest.approx(200.0)
    # Another method's step costs more or less, and its time with it, but for its start.
    ratio, start = estimates.flops(finetuned[1]) / estimates.flops(finetuned[0]), Speed().start_s
    assert estimates.seconds(finetuned[1]) == pytest.approx(start + (200.0 - start) * ratio)
    assert ratio != 1
    write_json(study.folder / "work" / f"{finetuned[0].name}.json", {"seconds": 300.0})
    learned = estimates_of(plan)
    learned.learn(study.folder)
    assert learned.seconds(finetuned[0]) == pytest.approx(300.0)
    assert [duration(s) for s in (45, 600, 7200)] == ["45 s", "10 min", "2.0 h"]


def test_the_tail_of_a_log_is_its_last_lines_and_a_bars_last_state(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\n\nbar 1\rbar 2\rbar 3\n" + b"".join(b"line %d\n" % n for n in range(11)))
    assert tail(log) == ["bar 3", *(f"line {n}" for n in range(11))]
    assert tail(tmp_path / "none") == []


def test_a_local_process_hears_stop_with_its_children(study: Study, plan: Plan, tmp_path: Path) -> None:
    """Of a real process: its log, its end, and that a signal reaches the whole group."""
    node = next(iter(plan.nodes.values()))
    log = tmp_path / "logs" / "a.log"
    ended = LocalProcess(node, ["--help"], log)
    while ended.poll() is None:
        time.sleep(0.05)
    assert ended.poll() == 0
    assert "embedded benchmark" in log.read_text()
    grandchild = "import time; print(1, flush=True); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{grandchild}'])"
    lasting = LocalProcess.__new__(LocalProcess)
    lasting._process = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE)
    assert lasting._process.stdout is not None
    lasting._process.stdout.readline()
    lasting.kill()
    assert lasting._process.wait(20) == -signal.SIGKILL
    assert lasting._process.stdout.read() == b"", "the pipe is closed once the child is gone too"


def test_made_up_launches_leave_what_real_ones_do(study: Study, plan: Plan) -> None:
    """The other tests rest on it: a training's summary has what the study reads."""
    node = next(node for node in plan.nodes.values() if node.stage == "finetune")
    leave(node, {})
    assert node.done
    assert node.summary().keys() >= {"seconds", "steps", "flops", "best"}
    assert json.loads((node.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["validation/exact"] == 0.5
