"""The training loop: resume, step, log, evaluate, checkpoint, stop cleanly."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tagi_ds.config import EngineConfig
from tagi_ds.engine.checkpoint import CheckpointStore, RunState
from tagi_ds.engine.distributed import all_reduce_sums, at, broadcast_object, gather_objects
from tagi_ds.engine.exhaustion import evaluation_advice, memory_told
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.engine.monitor import Monitor, peak_memory_gb
from tagi_ds.engine.objective import RUN_TOTALS, BatchSource, Objective, Stateful, Term, joined_state
from tagi_ds.engine.probe import Probe, part_norms
from tagi_ds.engine.profile import unit_done
from tagi_ds.engine.step import NonFiniteError, StepReport, train_step
from tagi_ds.engine.strategy import Strategy

__all__ = ["BatchSource", "Interrupted", "NonFiniteError", "Objective", "Stateful", "Term", "Trainer"]

INTERRUPTED_STATUS = 130
"""Exit status of a run that a signal stopped after a checkpoint."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""From a terminal, from whoever ends a job, and from SLURM before a job's time is over."""


LEFT_OUT = f"{RUN_TOTALS}steps_left_out"
"""Total of the steps whose loss or gradient was not finite."""
FLOP_STEPS = 3
"""First steps of a run whose operations are counted; later ones are taken to cost the same."""


class Interrupted(SystemExit):
    """A signal stopped the run after a checkpoint; uncaught, the process ends with status 130."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED_STATUS)


class Trainer:
    """Trains a prepared model for `config.steps` optimizer steps.

    Args:
        strategy: with the model prepared.
        objective: what is minimised.
        source: this rank's batches.
        config: steps, accumulation, and when to log, evaluate and checkpoint.
        run_dir: the run's folder; checkpoints in it are resumed from.
        monitor: where reports go.
        evaluate: figures at a step, called on all ranks together; rank 0's count. None: no evaluation.
        best_metric: figure that chooses the best checkpoint; best_is: whether low or high is good.
        extra_state: further state that checkpoints carry.
        probe: looks at the model: at the gradient's parts where a step is logged, at the rest where it is evaluated.
        evaluated_together: examples in a validation batch at the most, which an evaluation without memory names.
    """

    def __init__(
        self,
        strategy: Strategy,
        objective: Objective,
        source: BatchSource,
        config: EngineConfig,
        run_dir: Path,
        monitor: Monitor,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        best_metric: str = "validation/loss",
        best_is: Literal["min", "max"] = "min",
        extra_state: Stateful | None = None,
        probe: Probe | None = None,
        evaluated_together: int | None = None,
    ) -> None:
        self.strategy, self.objective, self.source, self.config = strategy, objective, source, config
        self.monitor, self.evaluate, self.extra_state = monitor, evaluate, extra_state
        self.best_metric, self.best_is, self.probe = best_metric, best_is, probe
        self._evaluation_advice = evaluation_advice(config, evaluated_together)
        self.checkpoints = CheckpointStore(run_dir, config.keep_checkpoints)
        self.state = RunState(total_steps=config.steps)
        self._stop_asked = False
        self._waited = 0.0
        self._left_out = 0

    def fit(self) -> dict[str, Any]:
        """Trains from the last complete checkpoint, or from the start, to the end.

        Returns:
            step, seconds of training over all starts, flops of all steps and ranks, best ({"value", "step"} or None),
            totals (the counts under RUN_TOTALS) and resumed_from (a step).

        Raises:
            NonFiniteError: a loss or gradient norm is not finite, with `nonfinite: skip` too often in a row.
            MemoryExhaustedError: an allocation failed.
            Interrupted: one of STOP_SIGNALS came; a checkpoint has been written.
            UserError: the run's folder cannot be read, written or resumed from.
        """
        resumed_from = self._resume()
        unevaluated = self.state.unevaluated
        if self.state.step >= self.config.steps and unevaluated is None:
            self.monitor.say(f"{self.monitor.title}: finished before, at step {self.state.step}; nothing to do")
            return self._summary(resumed_from)
        # The line of a step that was not evaluated is written again, if it was written.
        self.monitor.open(self.state.step - (unevaluated is not None))
        if resumed_from:
            self.monitor.say(f"{self.monitor.title}: goes on from step {resumed_from}")
        # A disk that will not hold a checkpoint is found before hours of training, too.
        self.checkpoints.require_space(self.strategy)
        try:
            with self._signals_noted():
                if unevaluated is not None:
                    self._judge(unevaluated, is_saved=True)
                self._train()
        finally:
            self.monitor.close()
            _close(self.source)
        return self._summary(resumed_from)

    def _train(self) -> None:
        began = time.monotonic() - self.state.seconds
        while self.state.step < self.config.steps:
            report = self._take_step()
            self.state.seconds = time.monotonic() - began
            self.monitor.set_apart(unit_done())
            last = self.state.step == self.config.steps
            stop = report.stop and not last
            is_due = last or stop or self._is_due(self.config.checkpoint_every)
            if self._is_evaluated():
                if is_due:
                    self._checkpoint(unevaluated=report.metrics)
                self._judge(report.metrics, is_due)
            else:
                if self._is_logged():
                    self._log(report.metrics)
                if is_due:
                    self._checkpoint()
            if stop:
                self.monitor.say(f"stopped at step {self.state.step}; the same command goes on from there")
                raise Interrupted

    def _judge(self, metrics: dict[str, float], is_saved: bool) -> None:
        """Evaluates the step just taken, looks at the model, logs, and sees to it that the best checkpoint is there.

        Args:
            metrics: of the step.
            is_saved: whether its checkpoint has been written; if not, it is where the step is the best so far.
        """
        evaluated, looked = self._evaluate(), self._look()
        self._log({**metrics, **evaluated, **looked})
        improved = bool(evaluated) and self._note_best(evaluated)
        self.state.unevaluated = None
        if is_saved:
            self.checkpoints.note_evaluated(self.state)
        elif improved:
            self._checkpoint()

    def _log(self, metrics: dict[str, float]) -> None:
        # The slowest rank's wait, since the others then wait for it in the step, and the fullest one's memory.
        waits, peaks = zip(*gather_objects([self._waited, peak_memory_gb()]), strict=True)
        self._waited = 0.0
        self.monitor.log(
            self.state.step, {**metrics, **self.state.totals}, self.state.seconds, max(waits), memory_gb=max(peaks)
        )

    def _take_step(self) -> StepReport:
        asked = time.monotonic()
        batches = self.source.next_step()
        self._waited += time.monotonic() - asked
        if len(batches) != self.config.accumulation:
            raise ValueError(f"the source gave {len(batches)} micro-batches, not {self.config.accumulation}")
        counted = self.state.step < FLOP_STEPS
        report = (self._counted_step if counted else self._step)(batches)
        self.state.step += 1
        for name, count in report.counts.items():
            if name.startswith(RUN_TOTALS):
                self.state.totals[name] = self.state.totals.get(name, 0.0) + count
        self.monitor.count(self.state.step, report.counts, report.metrics["loss/total"])
        self._note_fault(report.fault)
        return report

    def _step(self, batches: list[Any]) -> StepReport:
        place = f"step {self.state.step + 1}"
        at(place)
        skip = self.config.nonfinite == "skip"
        probe = self.probe
        # Where this step will be logged; other steps do not pay for it.
        inspect = partial(part_norms, self.strategy, probe.part_of) if probe and self._is_logged(1) else None
        with memory_told(place, self.config):
            return train_step(
                self.strategy, self.objective, batches, self.state.step, lambda: self._stop_asked, skip, inspect
            )

    def _note_fault(self, fault: NonFiniteError | None) -> None:
        """Says which step was left out; too many one after the other stop the run."""
        self._left_out = 0 if fault is None else self._left_out + 1
        if fault is None:
            return
        limit = self.config.nonfinite_limit
        self.state.totals[LEFT_OUT] = self.state.totals.get(LEFT_OUT, 0.0) + 1
        text = f"{fault.problem} ({self._left_out} in a row; {limit} stop the run)"
        self.monitor.say(text)
        self.monitor.log_text("left_out", text, self.state.step)
        if self._left_out >= limit:
            raise NonFiniteError(f"{fault.problem}, nor were the {limit - 1} before it", fault.mend)

    def _counted_step(self, batches: list[Any]) -> StepReport:
        meter, before = FlopMeter(), self.state.step
        with meter.counting():
            report = self._step(batches)
        flops = all_reduce_sums({"flops": float(meter.flops)})["flops"]
        self.state.flops_per_step = (self.state.flops_per_step * before + flops) / (before + 1)
        self.monitor.flops_per_step = self.state.flops_per_step
        return report

    def _is_due(self, every: int, ahead: int = 0) -> bool:
        return every > 0 and (self.state.step + ahead) % every == 0

    def _is_evaluated(self, ahead: int = 0) -> bool:
        """Whether the step `ahead` of the one just taken is evaluated and looked at."""
        last = self.state.step + ahead == self.config.steps
        return bool(self.evaluate or self.probe) and (last or self._is_due(self.config.evaluate_every, ahead))

    def _is_logged(self, ahead: int = 0) -> bool:
        last = self.state.step + ahead == self.config.steps
        return last or self._is_evaluated(ahead) or self._is_due(self.config.log_every, ahead)

    def _evaluate(self) -> dict[str, float]:
        evaluate = self.evaluate
        if evaluate is None:
            return {}
        with self._evaluating("the evaluation"):
            figures: dict[str, float] = broadcast_object(evaluate(self.state.step))
        return figures

    def _look(self) -> dict[str, float]:
        if self.probe is None:
            return {}
        with self._evaluating("the look at the model"), torch.no_grad():
            sight = self.probe.look(self.state.step)
        for name, text in sight.texts.items():
            self.monitor.log_text(name, text, self.state.step)
        return sight.figures

    @contextmanager
    def _evaluating(self, what: str) -> Iterator[None]:
        place, began = f"{what} after step {self.state.step}", time.monotonic()
        at(place)
        self.strategy.module.eval()
        with memory_told(place, self.config, self._evaluation_advice):
            yield
        self.strategy.module.train()
        self.monitor.set_apart(time.monotonic() - began)

    def _note_best(self, figures: dict[str, float]) -> bool:
        value, best = figures[self.best_metric], self.state.best
        if best is not None:
            better = value < best["value"] if self.best_is == "min" else value > best["value"]
            if not better:
                return False
        self.state.best = {"value": value, "step": self.state.step}
        return True

    def _checkpoint(self, unevaluated: dict[str, float] | None = None) -> None:
        """Args: `unevaluated`, metrics of the step where its evaluation is still to come."""
        began = time.monotonic()
        self.state.unevaluated = unevaluated
        at(f"the checkpoint of step {self.state.step}")
        # Ranks beyond the replicas repeat their shares: the further stages of a pipeline.
        shares = gather_objects(self.source.state_dict())[: self.strategy.replica.count]
        self.state.data = joined_state(self.source, shares)
        self.state.extra = self.extra_state.state_dict() if self.extra_state else {}
        self.checkpoints.save(self.strategy, self.state)
        self.monitor.set_apart(time.monotonic() - began)

    def _resume(self) -> int | None:
        saved = self.checkpoints.resume(self.strategy, self.monitor.say)
        if saved is None:
            return None
        if saved.total_steps != self.config.steps and saved.step < self.config.steps:
            self.monitor.say(
                f"note: this run was planned for {saved.total_steps} steps and now has {self.config.steps}; "
                "the learning rate follows the new number"
            )
        saved.total_steps = self.config.steps
        self.state = saved
        self.monitor.flops_per_step = saved.flops_per_step
        self.source.load_state_dict(saved.data)
        if self.extra_state:
            self.extra_state.load_state_dict(saved.extra)
        return saved.step

    def _summary(self, resumed_from: int | None) -> dict[str, Any]:
        state = self.state
        return {
            "step": state.step,
            "seconds": state.seconds,
            "flops": state.flops_per_step * state.step,
            "best": state.best,
            "totals": state.totals,
            "resumed_from": resumed_from,
        }

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """A signal only leaves a note, which all ranks read together at the next step's boundary."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._stop_asked = True

        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _close(source: BatchSource) -> None:
    """Ends what prepares batches ahead, where a source has that."""
    close = getattr(source, "close", None)
    if close is not None:
        close()
