"""Task-specific LoRA teachers, several trained at once over one frozen backbone (paper, section 3.1).

Teachers share the backbone's forward and nothing else: losses, gradients, clipping, AdamW and the end of the training
are each teacher's own, so that each ends as it would alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tagi_ds.config import TeacherConfig
from tagi_ds.data.collate import Collator
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.model.adapter import LowRank, Site
from tagi_ds.teachers.bank import TeacherBank
from tagi_ds.teachers.scoring import Score, Scorer
from tagi_ds.teachers.units import Unit, draw

LOOKS = 10
"""Looks at the validation share over a teacher's steps where `teachers.look_every` is 0."""
_CLIP = 1.0
_WARMUP = 0.02

Factors = dict[str, LowRank]
"""Site -> a (r, d_in), b (d_out, r)."""


@dataclass(frozen=True)
class TeacherResult:
    """One trained teacher, as it was at its best look at the validation share.

    Attributes:
        unit: its name.
        factors: site -> a (r, d_in), b (d_out, r).
        loss_before, loss_after: validation loss in nats a token, of the bare backbone and of the teacher.
        exact_before, exact_after: share of validation targets predicted whole.
        rouge_before, rouge_after: ROUGE-L of greedy answers to validation inputs, 0 to 1.
        warm: whether it started from a warm start's factors.
        steps: steps until its best look; 0 where nothing beat what it started from.
        taken: steps trained.
        flops: floating-point operations of these steps, from one that was counted.
    """

    unit: str
    factors: Factors
    loss_before: float
    loss_after: float
    exact_before: float
    exact_after: float
    rouge_before: float
    rouge_after: float
    warm: bool
    steps: int
    taken: int
    flops: int


def look_every(config: TeacherConfig) -> int:
    """Steps between two looks at the validation share."""
    return config.look_every or max(1, math.ceil(config.steps / LOOKS))


def train_group(
    backbone: nn.Module,
    sites: list[Site],
    units: Sequence[Unit],
    collator: Collator,
    start: dict[str, Tensor],
    scaling: float,
    config: TeacherConfig,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
    warm: Callable[[str], Factors | None] = lambda _: None,
    accumulation: int = 1,
) -> list[TeacherResult]:
    """Trains the teachers of `units` together; each ends as it would alone.

    Args:
        backbone: frozen, on its device, in evaluation mode.
        sites: the adapted linears.
        collator: of the form ``input_only``.
        start: common A by site.
        scaling: alpha / r.
        config: steps, rate, patience and the like.
        seed: of the order of the examples and the choice of their references.
        progress: called with the number of steps taken, after each.
        warm: a unit's factors to start from; None: the common A and B = 0.
        accumulation: micro-batches into which a step's examples, all teachers' together, are cut. They bound the
            memory, of the looks at the validation shares too, and change nothing but the rounding.

    Returns:
        One result a unit, in their order.
    """
    device = next(backbone.parameters()).device
    bank = TeacherBank(backbone, sites, len(units), start, scaling, config.train_a).to(device)
    scorer = Scorer(bank, units, collator, math.ceil(len(units) * config.examples / accumulation), seed)
    everyone = list(range(len(units)))
    courses = [_Course(i, score, bank) for i, score in zip(everyone, scorer.look(everyone), strict=True)]
    rouge_before = scorer.rouge_l()
    _start_warm(bank, units, courses, scorer, warm)
    step_flops = _train(bank, units, courses, scorer, config, progress)
    for course in courses:
        bank.load(course.teacher, course.factors)
    return [
        course.result(unit.name, rouges, step_flops)
        for course, unit, rouges in zip(courses, units, zip(rouge_before, scorer.rouge_l(), strict=True), strict=True)
    ]


def _start_warm(
    bank: TeacherBank,
    units: Sequence[Unit],
    courses: Sequence[_Course],
    scorer: Scorer,
    warm: Callable[[str], Factors | None],
) -> None:
    """Loads what teachers start from; it counts as their first point, against the bare backbone."""
    for course, unit in zip(courses, units, strict=True):
        factors = warm(unit.name)
        if factors is not None:
            bank.load(course.teacher, factors)
            course.warm = True
    warmed = [course for course in courses if course.warm]
    for course, score in zip(warmed, scorer.look([course.teacher for course in warmed]), strict=True):
        course.pass_look(0, score, bank)


def _train(
    bank: TeacherBank,
    units: Sequence[Unit],
    courses: Sequence[_Course],
    scorer: Scorer,
    config: TeacherConfig,
    progress: Callable[[int], None],
) -> int:
    """Takes the steps; returns what one costs a teacher, in floating-point operations."""
    trained = [parameter for parameter in bank.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    active, meter, every, seed = list(courses), FlopMeter(), look_every(config), scorer.seed
    for step in range(config.steps):
        _set_rate(optimizer, config, step)
        rows = [(i, *pair) for i in (c.teacher for c in active) for pair in draw(units[i], config.examples, step, seed)]
        with meter.counting() if step == 0 else contextlib.nullcontext():
            scorer.backward(rows)
        _clip_each(trained)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress(step + 1)
        if (step + 1) % every and step + 1 < config.steps:
            continue
        for course, score in zip(active, scorer.look([course.teacher for course in active]), strict=True):
            course.pass_look(step + 1, score, bank)
        active = [course for course in active if not 0 < config.patience <= course.stale]
        if not active:
            break
    return meter.flops // len(units)


class _Course:
    """One teacher's way: its score at the start and at its best look."""

    def __init__(self, teacher: int, score: Score, bank: TeacherBank) -> None:
        self.teacher, self.before, self.best = teacher, score, score
        self.factors, self.warm = bank.snapshot(teacher), False
        self.best_step = self.stale = self.taken = 0

    def pass_look(self, step: int, score: Score, bank: TeacherBank) -> None:
        self.taken, self.stale = step, self.stale + (step > 0)
        if score.loss < self.best.loss:
            self.best, self.best_step, self.stale = score, step, 0
            self.factors = bank.snapshot(self.teacher)

    def result(self, unit: str, rouges: tuple[float, float], step_flops: int) -> TeacherResult:
        return TeacherResult(
            unit=unit,
            factors=self.factors,
            loss_before=self.before.loss,
            loss_after=self.best.loss,
            exact_before=self.before.exact,
            exact_after=self.best.exact,
            rouge_before=rouges[0],
            rouge_after=rouges[1],
            warm=self.warm,
            steps=self.best_step,
            taken=self.taken,
            flops=step_flops * self.taken,
        )


def _set_rate(optimizer: torch.optim.Optimizer, config: TeacherConfig, step: int) -> None:
    warmup = max(1, round(_WARMUP * config.steps))
    rate = config.learning_rate * min(1.0, (step + 1) / warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate


def _clip_each(parameters: Sequence[nn.Parameter]) -> None:
    """Clips every teacher's gradient by its own norm; a common norm would couple them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([gradient.float().square().sum((1, 2)) for gradient in gradients]).sum(0)
    factors = (_CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors[:, None, None].to(gradient.dtype))
