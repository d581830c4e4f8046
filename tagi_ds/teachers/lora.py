"""Task-specific LoRA teachers, several trained at once over one frozen backbone (paper, section 3.1).

A bank holds the factors of T teachers as stacked parameters; a batch mixes examples of all of them, and each example
meets its own teacher's factors through the same adapter hooks as the generated ones. The backbone's forward is
shared, while losses, gradients, clipping and AdamW stay elementwise each teacher's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ds.config import TeacherConfig
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Example, Task
from tagi_ds.data.mixture import reference_of
from tagi_ds.data.order import permutation
from tagi_ds.losses import IGNORE
from tagi_ds.model.adapter import STATE_KEYWORD, LowRank, Site, TaskState, install

EVALUATIONS = 5
"""Validation points over a teacher's steps; its best one is kept."""
PATIENCE = 2
"""A group ends when none of its teachers improved at so many validation points in a row."""
_CLIP = 1.0


@dataclass(frozen=True)
class Unit:
    """What one teacher learns.

    Attributes:
        name: category or task name.
        train, validation: (task, example) pairs, disjoint.
    """

    name: str
    train: list[tuple[Task, Example]]
    validation: list[tuple[Task, Example]]


@dataclass(frozen=True)
class TeacherResult:
    """One trained teacher.

    Attributes:
        factors: site -> a (r, d_in), b (d_out, r) of its best validation point.
        loss_before, loss_after: validation loss in nats a token, of the bare backbone and of the teacher.
        exact_before, exact_after: share of validation targets predicted whole under teacher forcing.
        steps: steps until its best point.
    """

    unit: str
    factors: dict[str, LowRank]
    loss_before: float
    loss_after: float
    exact_before: float
    exact_after: float
    steps: int


def make_units(tasks: Sequence[Task], config: TeacherConfig, seed: int) -> list[Unit]:
    """Units of the training tasks, in a seeded order, at most `config.max_units`; each with its validation share."""
    members: dict[str, list[tuple[Task, Example]]] = {}
    for task in sorted(tasks, key=lambda task: task.name):
        name = task.category if config.unit == "category" else task.name
        members.setdefault(name, []).extend((task, example) for example in task.examples)
    names = sorted(members)
    chosen = [names[i] for i in permutation(len(names), seed, "teacher units", 0)][: config.max_units]
    units = []
    for name in chosen:
        pairs = members[name]
        order = permutation(len(pairs), seed, "teacher validation", name)
        held = min(max(1, round(config.validation_share * len(pairs))), len(pairs) - 1)
        validation = [pairs[i] for i in order[:held]]
        units.append(Unit(name, [pairs[i] for i in order[held:]], validation or pairs))
    return units


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
    """

    def __init__(
        self, backbone: nn.Module, sites: list[Site], teachers: int, start: dict[str, Tensor], scaling: float, train_a: bool
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
        if not getattr(backbone, "_tagi_installed", False):
            install(backbone, sites, scaling)
            backbone._tagi_installed = True  # type: ignore[assignment]

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
        progress: called with the examples of every step.

    Returns:
        One result a unit, in their order.
    """
    bank = TeacherBank(backbone, sites, len(units), start, scaling, config.train_a).to(next(backbone.parameters()).device)
    trained = [parameter for parameter in bank.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    before = _evaluate(bank, units, collator, seed)
    best = [(loss, exact, 0, bank.snapshot(i)) for i, (loss, exact) in enumerate(before)]
    every, stale = max(1, math.ceil(config.steps / EVALUATIONS)), 0
    for step in range(config.steps):
        _set_rate(optimizer, config, step)
        losses, _ = _losses(bank, _draw(units, config.examples, step, seed), collator, seed)
        losses.sum().backward()
        _clip_each(trained)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress(len(units) * config.examples)
        if (step + 1) % every and step + 1 < config.steps:
            continue
        improved = False
        for i, (loss, exact) in enumerate(_evaluate(bank, units, collator, seed)):
            if loss < best[i][0]:
                best[i], improved = (loss, exact, step + 1, bank.snapshot(i)), True
        stale = 0 if improved else stale + 1
        if stale == PATIENCE:
            break
    return [
        TeacherResult(unit.name, factors, before[i][0], loss, before[i][1], exact, steps)
        for i, (unit, (loss, exact, steps, factors)) in enumerate(zip(units, best, strict=True))
    ]


def _set_rate(optimizer: torch.optim.Optimizer, config: TeacherConfig, step: int) -> None:
    warmup = max(1, round(0.02 * config.steps))
    rate = config.learning_rate * min(1.0, (step + 1) / warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate


def _draw(units: Sequence[Unit], examples: int, step: int, seed: int) -> list[list[tuple[Task, Example]]]:
    """The examples of a step for each unit: a permutation an epoch, a function of the unit alone."""
    drawn = []
    for unit in units:
        positions = np.arange(step * examples, (step + 1) * examples)
        epochs, places = positions // len(unit.train), positions % len(unit.train)
        orders = {e: permutation(len(unit.train), seed, f"teacher {unit.name}", int(e)) for e in set(epochs.tolist())}
        drawn.append([unit.train[orders[e][p]] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)])
    return drawn


def _losses(
    bank: TeacherBank, examples: Sequence[Sequence[tuple[Task, Example]]], collator: Collator, seed: int
) -> tuple[Tensor, Tensor]:
    """(T,) mean loss in nats a token and (T,) share of exact targets, each teacher over its own examples."""
    chunks = [
        TaskChunk(task, 0, (example,), (reference_of(example, seed),)) for part in examples for task, example in part
    ]
    batch = collator(chunks).to(bank.b[0].device)
    counts = torch.tensor([len(part) for part in examples])
    index = torch.repeat_interleave(torch.arange(len(examples)), counts).to(bank.b[0].device)
    logits = bank(batch.input_ids, batch.attention_mask, batch.labels, index)
    nll = functional.cross_entropy(logits.float().mT, batch.labels, ignore_index=IGNORE, reduction="none").sum(1)
    real = batch.labels != IGNORE
    exact = ((logits.argmax(-1) == batch.labels) | ~real).all(1).float()

    def per_teacher(values: Tensor) -> Tensor:
        return values.new_zeros(len(examples)).index_add(0, index, values)

    return per_teacher(nll) / per_teacher(real.sum(1).to(nll.dtype)), per_teacher(exact) / counts.to(nll.device)


@torch.no_grad()
def _evaluate(bank: TeacherBank, units: Sequence[Unit], collator: Collator, seed: int) -> list[tuple[float, float]]:
    losses, exact = _losses(bank, [unit.validation for unit in units], collator, seed)
    return list(zip(losses.tolist(), exact.tolist(), strict=True))


def _clip_each(parameters: Sequence[nn.Parameter]) -> None:
    """Clips every teacher's gradient by its own norm; a common norm would couple them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([gradient.float().square().sum((1, 2)) for gradient in gradients]).sum(0)
    factors = (_CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors[:, None, None].to(gradient.dtype))
