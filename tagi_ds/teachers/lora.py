"""Task-specific LoRA teachers, several trained at once over one frozen backbone (paper, section 3.1).

A bank holds the factors of T teachers as stacked parameters; a batch mixes examples of all of them, and each example
meets its own teacher's factors through the same adapter hooks as the generated ones. The backbone's forward is
shared, while losses, gradients, clipping and AdamW stay elementwise each teacher's own.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ds.config import TeacherConfig
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Example, Task
from tagi_ds.data.mixture import reference_of
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.losses import IGNORE
from tagi_ds.model.adapter import STATE_KEYWORD, LowRank, Site, TaskState, install
from tagi_ds.teachers.units import Unit, draw

EVALUATIONS = 5
"""Validation points over a teacher's steps; its best one is kept."""
PATIENCE = 2
"""A teacher that did not improve at so many validation points in a row is done."""
_CLIP = 1.0


@dataclass(frozen=True)
class TeacherResult:
    """One trained teacher.

    Attributes:
        factors: site -> a (r, d_in), b (d_out, r) of its best validation point.
        loss_before, loss_after: validation loss in nats a token, of the bare backbone and of the teacher.
        exact_before, exact_after: share of validation targets predicted whole under teacher forcing.
        steps: steps until its best point; 0 where nothing beat the bare backbone.
        taken: steps trained.
        flops: floating-point operations of these steps, from one that was counted.
    """

    unit: str
    factors: dict[str, LowRank]
    loss_before: float
    loss_after: float
    exact_before: float
    exact_after: float
    steps: int
    taken: int
    flops: int


def common_a(sites: Sequence[Site], rank: int, seed: int) -> dict[str, Tensor]:
    """The A ~ N(0, 1 / d_in) from which all teachers of a store start: site -> (r, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.randn(rank, site.d_in, generator=generator) * site.d_in**-0.5 for site in sites}


class TeacherBank(nn.Module):
    """T teachers' factors over one frozen backbone.

    Args:
        backbone: an encoder-decoder; its hooks are installed here and its parameters frozen.
        sites: the adapted linears.
        teachers: T.
        start: common A by site.
        scaling: alpha / r.
        train_a: False keeps A at the common one.

    Raises:
        ValueError: the backbone already answers to teachers of other sites or another scaling.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sites: list[Site],
        teachers: int,
        start: dict[str, Tensor],
        scaling: float,
        train_a: bool,
    ) -> None:
        super().__init__()
        self.names = [site.name for site in sites]
        self.a = nn.ParameterList(
            nn.Parameter(start[site.name].expand(teachers, -1, -1).clone(), requires_grad=train_a) for site in sites
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.zeros(teachers, site.d_out, start[site.name].shape[0])) for site in sites
        )
        self._backbone = (backbone,)  # a tuple: the bank's parameters are the teachers' alone
        backbone.requires_grad_(False)
        installed = getattr(backbone, "_teacher_hooks", None)
        if installed is None:
            install(backbone, sites, scaling)
            backbone._teacher_hooks = (self.names, scaling)  # type: ignore[assignment]
        elif installed != (self.names, scaling):
            raise ValueError("the backbone answers to teachers of other sites or another scaling; load it anew")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Logits (N, T, V) of inputs (N, L) whose teachers are `index` (N,)."""
        (backbone,) = self._backbone
        adapters = {name: LowRank(a, b) for name, a, b in zip(self.names, self.a, self.b, strict=True)}
        output = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=backbone._shift_right(labels),  # type: ignore[operator]
            use_cache=False,
            **{STATE_KEYWORD: TaskState(adapters, index=index)},
        )
        return output.logits

    def snapshot(self, teacher: int) -> dict[str, LowRank]:
        """One teacher's factors, copied to the CPU."""
        return {
            name: LowRank(a[teacher].detach().cpu().clone(), b[teacher].detach().cpu().clone())
            for name, a, b in zip(self.names, self.a, self.b, strict=True)
        }


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
) -> list[TeacherResult]:
    """Trains the teachers of `units` together; each ends as it would alone.

    Args:
        backbone: frozen, on its device, in evaluation mode.
        collator: of the form ``input_only``.
        start: common A by site.
        scaling: alpha / r.
        progress: called with the number of steps taken, after each.

    Returns:
        One result a unit, in their order.
    """
    device = next(backbone.parameters()).device
    bank = TeacherBank(backbone, sites, len(units), start, scaling, config.train_a).to(device)
    measure = functools.partial(_evaluate, bank, units, collator, len(units) * config.examples, seed)
    trained = [parameter for parameter in bank.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    active = list(range(len(units)))
    courses = [_Course(i, *figures, bank.snapshot(i)) for i, figures in zip(active, measure(active), strict=True)]
    meter = FlopMeter()
    every = max(1, math.ceil(config.steps / EVALUATIONS))
    for step in range(config.steps):
        _set_rate(optimizer, config, step)
        rows = [(i, *pair) for i in active for pair in draw(units[i], config.examples, step, seed)]
        with meter.counting() if step == 0 else contextlib.nullcontext():
            sums = _sums(bank, rows, collator, seed)
            (sums.nll / sums.tokens.clamp(min=1)).sum().backward()
        _clip_each(trained)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress(step + 1)
        if (step + 1) % every and step + 1 < config.steps:
            continue
        for i, (loss, exact) in zip(active, measure(active), strict=True):
            courses[i].pass_point(step + 1, loss, exact, bank)
        active = [i for i in active if courses[i].stale < PATIENCE]
        if not active:
            break
    return [course.result(unit.name, meter.flops // len(units)) for course, unit in zip(courses, units, strict=True)]


class _Course:
    """One teacher's way: its figures at the start and at its best validation point."""

    def __init__(self, teacher: int, loss: float, exact: float, factors: dict[str, LowRank]) -> None:
        self.teacher, self.before, self.stale, self.taken = teacher, (loss, exact), 0, 0
        self.best, self.best_step, self.factors = (loss, exact), 0, factors

    def pass_point(self, step: int, loss: float, exact: float, bank: TeacherBank) -> None:
        self.taken, self.stale = step, self.stale + 1
        if loss < self.best[0]:
            self.best, self.best_step, self.factors, self.stale = (loss, exact), step, bank.snapshot(self.teacher), 0

    def result(self, unit: str, step_flops: int) -> TeacherResult:
        (loss_before, exact_before), (loss_after, exact_after) = self.before, self.best
        return TeacherResult(
            unit=unit,
            factors=self.factors,
            loss_before=loss_before,
            loss_after=loss_after,
            exact_before=exact_before,
            exact_after=exact_after,
            steps=self.best_step,
            taken=self.taken,
            flops=step_flops * self.taken,
        )


def _set_rate(optimizer: torch.optim.Optimizer, config: TeacherConfig, step: int) -> None:
    warmup = max(1, round(0.02 * config.steps))
    rate = config.learning_rate * min(1.0, (step + 1) / warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate


class _Sums(NamedTuple):
    """(T,) each: negative log-likelihood in nats, target tokens, exact targets, targets; 0 for absent teachers."""

    nll: Tensor
    tokens: Tensor
    exact: Tensor
    targets: Tensor


def _sums(bank: TeacherBank, rows: Sequence[tuple[int, Task, Example]], collator: Collator, seed: int) -> _Sums:
    """Each teacher's sums over its own rows (teacher, task, example)."""
    device = bank.b[0].device
    chunks = [TaskChunk(task, 0, (example,), (reference_of(example, seed),)) for _, task, example in rows]
    batch = collator(chunks).to(device)
    index = torch.tensor([teacher for teacher, _, _ in rows], device=device)
    logits = bank(batch.input_ids, batch.attention_mask, batch.labels, index)
    nll = functional.cross_entropy(logits.float().mT, batch.labels, ignore_index=IGNORE, reduction="none").sum(1)
    real = batch.labels != IGNORE
    exact = ((logits.argmax(-1) == batch.labels) | ~real).all(1)
    columns = (nll, real.sum(1), exact, torch.ones_like(exact))
    return _Sums(*(nll.new_zeros(len(bank.b[0])).index_add(0, index, column.to(nll.dtype)) for column in columns))


@torch.no_grad()
def _evaluate(
    bank: TeacherBank, units: Sequence[Unit], collator: Collator, batch: int, seed: int, active: Sequence[int]
) -> list[tuple[float, float]]:
    """Validation loss in nats a token and share of exact targets of the active teachers, `batch` examples at once."""
    rows = [(i, *pair) for i in active for pair in units[i].validation]
    parts = [_sums(bank, rows[at : at + batch], collator, seed) for at in range(0, len(rows), batch)]
    nll, tokens, exact, targets = (torch.stack(column).sum(0).tolist() for column in zip(*parts, strict=True))
    return [(nll[i] / tokens[i], exact[i] / targets[i]) for i in active]


def _clip_each(parameters: Sequence[nn.Parameter]) -> None:
    """Clips every teacher's gradient by its own norm; a common norm would couple them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([gradient.float().square().sum((1, 2)) for gradient in gradients]).sum(0)
    factors = (_CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors[:, None, None].to(gradient.dtype))
