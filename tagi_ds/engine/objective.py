"""What the engine trains on: the objective's terms, the source of batches, and the loss of a global batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tagi_ds.model.head import Figures, Reader

MICRO_BATCHES = "micro_batches"
"""Total by which a term with `per=None` is divided."""

RUN_TOTALS = "data/"
"""Counts whose names begin so divide nothing: they are summed over the run, logged and kept with its state."""

PER_EXAMPLE = "per_example/"
"""Counts whose names begin so divide nothing: over `examples` they are logged, under RUN_TOTALS."""

TOTAL = "total_"
"""Under RUN_TOTALS the tokens and padding of a whole run begin so."""


@dataclass(frozen=True)
class Term:
    """One term of the loss, of one micro-batch.

    Attributes:
        value: scalar, the *sum* over what `per` counts.
        per: name of the count that divides it; None for the plain mean over micro-batches.
        weight: its factor in the loss; at 0 the term is logged only.
    """

    value: Tensor
    per: str | None
    weight: float = 1.0


class Objective(Protocol):
    """What is minimised: sum over terms of weight * value / total[per], totals over the global batch."""

    def counts(self, batch: Any) -> dict[str, float]:
        """Counts of one micro-batch on the CPU, the same names every time.

        `tokens` and `examples` give throughput; names that begin with RUN_TOTALS are summed over the run, those with
        PER_EXAMPLE logged as means.
        """

    def __call__(self, model: Callable[..., Any], batch: Any) -> dict[str, Term]:
        """Terms of one micro-batch on the model's device, the same names every time and on every rank."""


class StagedObjective(Objective, Protocol):
    """An objective for a model whose layers lie in different processes."""

    def inputs(self, batch: Any) -> dict[str, Tensor | None]:
        """What the model takes of a batch."""

    def alignment_errors(self, adapters: Mapping[str, Any], batch: Any, sites: Any = None) -> Tensor | None:
        """(U,) float32, what the adapters of `sites` add to each task's alignment error; None where nothing does."""

    def reader(self, batch: Any) -> Reader:
        """What takes the figures of a batch from its logits."""

    def terms(self, figures: Figures, batch: Any, errors: Tensor | None) -> dict[str, Term]:
        """The terms, from the figures and the errors of all sites together."""


class BatchSource(Protocol):
    """Batches of this rank; its state says where the run as a whole stands and is the same on every rank.

    A source whose ranks each know a share of the position alone has a further method ``join(shares)``: from the
    `state_dict` of every rank, in their order, it makes the run's position, as JSON-able and the same on every rank.
    That is what checkpoints keep, and what `load_state_dict` is given on every rank.
    """

    def next_step(self) -> list[Any]:
        """This rank's micro-batches of the next step, `engine.accumulation` many."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position."""


class Stateful(Protocol):
    """Further state of a run that its checkpoints carry."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state, the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state over."""


def joined_state(source: Any, shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's data position, from the `state_dict` of the source on every rank.

    Raises:
        RuntimeError: they differ, and the source has no `join`; or they do not belong together.
    """
    join = getattr(source, "join", None)
    if join is not None:
        state: dict[str, Any] = join(shares)
        return state
    if any(share != shares[0] for share in shares):
        raise RuntimeError("the batch source's state differs between ranks; it must describe the whole run")
    return shares[0]


def add_counts(objective: Objective, batches: Sequence[Any]) -> dict[str, float]:
    """Counts of this rank's step: the objective's, summed, and the micro-batches'."""
    sums: dict[str, float] = {MICRO_BATCHES: float(len(batches))}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            sums[name] = sums.get(name, 0.0) + float(count)
    return sums


def padding_shares(lengths: Mapping[str, float]) -> dict[str, float]:
    """Which share of the positions is padding.

    Args:
        lengths: `<kind>_tokens` and `<kind>_padding` of each kind of text; further names are passed over.

    Returns:
        `<kind>_padding_share` of each kind that there is, and `padding_share` of all together.
    """
    pairs = {
        name.removesuffix("padding"): (padding, lengths[f"{name.removesuffix('padding')}tokens"])
        for name, padding in lengths.items()
        if name.endswith("_padding")
    }
    pairs[""] = sum(padding for padding, _ in pairs.values()), sum(tokens for _, tokens in pairs.values())
    return {
        f"{kind}padding_share": padding / (padding + tokens)
        for kind, (padding, tokens) in pairs.items()
        if padding + tokens
    }


def divisor(term: Term, totals: Mapping[str, float]) -> float:
    """What a term's value is divided by; 1 where nothing was counted, since the value is then an empty sum.

    Raises:
        KeyError: the objective does not count what the term is per.
    """
    name = term.per or MICRO_BATCHES
    if name not in totals:
        raise KeyError(f"a term is per {name!r}, but the objective counts only {sorted(totals)}")
    return totals[name] or 1.0


def loss_share(terms: Mapping[str, Term], totals: Mapping[str, float]) -> Tensor:
    """This micro-batch's share of the global loss; the shares of all micro-batches and ranks add up to it.

    One that is not finite has a gradient of nan alone.
    """
    weighed = [term.value * (term.weight / divisor(term, totals)) for term in terms.values() if term.weight != 0]
    if not weighed:
        raise ValueError("every term of the objective has weight 0")
    share = torch.stack(weighed).sum() if len(weighed) > 1 else weighed[0]
    # What is not finite need not show in the gradient (an infinite constant): made to, so that no strategy steps on it.
    return share * torch.where(share.detach().isfinite(), 1.0, float("nan"))
