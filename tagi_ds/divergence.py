"""KL(teacher || student) over target tokens, whatever form the teacher's distributions come in.

Three forms: the likeliest tokens with the tail as one bucket (a lower bound of the divergence, exact where the whole
vocabulary is listed), draws with their counts (unbiased: random-sampling distillation, Anshumann et al., ACL 2025), and
whole logits of a teacher that runs in the step.

Training reads logits a few rows at a time (:mod:`tagi_ds.reading`); :func:`kl` takes all of them at once by the same
formulas, and is what the tests compare with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tagi_ds.losses import IGNORE


class Split(NamedTuple):
    """Distributions over V tokens, apart into some listed tokens and the rest.

    Attributes:
        others: (..., V) float32, each token's share of the rest's mass; 0 for the listed.
        log_listed: (..., K) float32, log-probabilities of the listed; -inf where an entry stands for none.
        log_rest: (...) float32, of all others together; -inf where all are listed.
    """

    others: Tensor
    log_listed: Tensor
    log_rest: Tensor


class Listed(NamedTuple):
    """F distributions at every position, each by its weights on K tokens and the mass of all others as one bucket.

    A label is one of them: weight 1 on a single token, whose divergence is its negative log-likelihood.

    Attributes:
        places: (..., K) int64 token ids.
        known: (..., K) bool; False where an entry stands for nothing and repeats the place of one that is known.
        weights: (F, ..., K) float32, an entry's share in the divergence: its probability, or its share of the draws.
        log_probs: (F, ..., K) float32.
        tail: (F, ...) float32, the mass of the bucket; 0 where draws stand for the whole distribution.
        loose: (...) bool, whether the last entry belongs to the bucket all the same, and has no weight of its own.
    """

    places: Tensor
    known: Tensor
    weights: Tensor
    log_probs: Tensor
    tail: Tensor
    loose: Tensor

    @classmethod
    def of_labels(cls, labels: Tensor) -> Listed:
        """Token ids (...), none of them -100, as distributions (F = 1)."""
        places, none = labels[..., None], torch.zeros_like(labels, dtype=torch.float32)
        one = torch.ones_like(places, dtype=torch.float32)
        return cls(places, one.bool(), one[None], torch.zeros_like(one)[None], none[None], none.bool())

    def joined(self, labels: Tensor) -> Listed:
        """The same with the tokens `labels` (...) named as well, in an entry more where they are not yet."""
        new = ((self.places != labels[..., None]) | ~self.known).all(-1, keepdim=True)
        known = torch.cat([self.known, new], -1)
        # What stands for nothing repeats the label, which is always listed.
        places = torch.where(known, torch.cat([self.places, labels[..., None]], -1), labels[..., None])
        one_more = self.weights.new_zeros((*self.weights.shape[:-1], 1))
        weights, log_probs = (torch.cat([part, one_more], -1) for part in (self.weights, self.log_probs))
        return Listed(places, known, weights, log_probs, self.tail, new[..., 0])

    def with_labels(self, labels: Tensor) -> Listed:
        """The labels (...), and behind them these distributions, on one list of tokens."""
        both = self.joined(labels)
        weight = (both.known & (both.places == labels[..., None])).float()[None]
        log_probs = torch.cat([torch.zeros_like(weight), both.log_probs])
        tail = torch.cat([torch.zeros_like(both.tail[:1]), both.tail])
        return both._replace(weights=torch.cat([weight, both.weights]), log_probs=log_probs, tail=tail)

    def rows(self, part: slice) -> Listed:
        """Some positions of a list whose positions are one dimension."""
        each = (self.weights[:, part], self.log_probs[:, part], self.tail[:, part])
        return Listed(self.places[part], self.known[part], *each, self.loose[part])

    def split(self, logits: Tensor) -> Split:
        """The student's distributions of logits (..., V) float32, in whose memory `others` then lies."""
        listed = logits.gather(-1, self.places).masked_fill(~self.known, -torch.inf)
        others = logits.scatter_(-1, self.places, -torch.inf)
        # The rest is summed over the tokens themselves: 1 - Σq would cancel where it is small.
        top = others.amax(-1, keepdim=True).clamp(min=torch.finfo(others.dtype).min)
        mass = others.sub_(top).exp_().sum(-1, keepdim=True)
        others.div_(mass.clamp(min=torch.finfo(others.dtype).tiny))
        rest = (top + mass.log())[..., 0]
        whole = torch.logaddexp(rest, listed.logsumexp(-1))
        return Split(others, listed - whole[..., None], rest - whole)

    def divergence(self, log_listed: Tensor, log_rest: Tensor) -> Tensor:
        """(F, ...): Σ w·(log p - log q) over the entries + t·(log t - log q_bucket), in nats."""
        terms = torch.where(self.weights > 0, self.weights * (self.log_probs - log_listed), 0.0).sum(-1)
        bucket = self._log_bucket(log_listed, log_rest)
        return terms + torch.where(self.tail > 0, self.tail * (self.tail.log() - bucket), 0.0)

    def pull(self, log_listed: Tensor, log_rest: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of Σ_f grads_f · divergence_f with respect to the logits, of which V - K numbers are one.

        Args:
            log_listed, log_rest: of :meth:`split`.
            grads: (F, ...).

        Returns:
            (...), the factor of `others`, and (..., K), the gradient at `places`, 0 where an entry stands for none.
        """
        # A token's q_j counts in the whole, and of the bucket in the bucket: mass·q_j - t·q_j / q_bucket, where the
        # quotient is exact however small q_bucket is.
        mass, tail = (grads * (self.weights.sum(-1) + self.tail)).sum(0), (grads * self.tail).sum(0)
        bucket = self._log_bucket(log_listed, log_rest).clamp(min=torch.finfo(log_rest.dtype).min)
        at_rest = mass * log_rest.exp() - tail * (log_rest - bucket).exp()
        at_listed = mass[..., None] * log_listed.exp() - (grads[..., None] * self.weights).sum(0)
        at_listed[..., -1] -= torch.where(self.loose, tail * (log_listed[..., -1] - bucket).exp(), 0.0)
        return at_rest, at_listed

    def _log_bucket(self, log_listed: Tensor, log_rest: Tensor) -> Tensor:
        return torch.logaddexp(log_rest, log_listed[..., -1].masked_fill(~self.loose, -torch.inf))


class StoredDistributions(NamedTuple):
    """Some tokens of a teacher's distribution at every target position; all others are one bucket.

    Attributes:
        ids: (N, T, K) int64; -1 behind a position's last entry.
        weights: (N, T, K) float32, an entry's share in the divergence: its probability, or its share of the draws.
        log_probs: (N, T, K) float32, the teacher's at the store's temperature.
        tail: (N, T) float32, the mass of the bucket; 0 where draws stand for the whole distribution.
        present: (N,) bool, which examples the teacher has.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    tail: Tensor
    present: Tensor

    def listed(self, rows: Tensor) -> Listed:
        """The distributions (F = 1) at some positions, (M,) numbers among N·T; all zero where the teacher has none."""
        ids, weights, log_probs = (part.flatten(0, 1)[rows] for part in self[:3])
        absent = ~self.present[rows // self.ids.shape[1]]
        weights = weights.float().masked_fill((ids < 0) | absent[:, None], 0.0)
        tail = self.tail.flatten()[rows].float().masked_fill(absent, 0.0)
        return Listed(ids, ids >= 0, weights[None], log_probs.float()[None], tail[None], torch.zeros_like(absent))

    def divergence(self, student: Tensor, temperature: float) -> Tensor:
        """KL at every position (N, T), in nats, for the student's logits (N, T, V)."""
        everywhere = torch.arange(student.shape[0] * student.shape[1], device=student.device)
        # Some token must be listed at every position; that it is this one changes nothing.
        listed = self._replace(present=torch.ones_like(self.present)).listed(everywhere)
        listed = listed.joined(torch.zeros_like(everywhere))
        divergence: Tensor = _ListedDivergence.apply(student.flatten(0, 1), listed, temperature)
        return divergence.view(student.shape[:2])


class FullDistributions(NamedTuple):
    """A teacher's logits at every target position.

    Attributes:
        logits: (N, T, V'), V' at most the student's V; tokens beyond have no mass.
        present: (N,) bool, which examples the teacher has.
    """

    logits: Tensor
    present: Tensor

    def divergence(self, student: Tensor, temperature: float) -> Tensor:
        """KL at every position (...), in nats, for the student's logits (..., V)."""
        log_q = (student.to(_wide(student)) / temperature).log_softmax(-1)[..., : self.logits.shape[-1]]
        log_p = (self.logits.to(_wide(student)) / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def gradient(self, student: Tensor, temperature: float) -> Tensor:
        """(..., V) float32, of the divergence at every position with respect to the student's logits (..., V)."""
        gradient = softened(student, temperature).softmax(-1)
        gradient[..., : self.logits.shape[-1]] -= softened(self.logits, temperature).softmax(-1)
        return gradient.div_(temperature)

    def rows(self, rows: Tensor) -> FullDistributions:
        """Those at some positions, (M,) numbers among N·T: `logits` and `present` of one dimension for both."""
        return FullDistributions(self.logits.flatten(0, 1)[rows], self.present[rows // self.logits.shape[1]])


Distributions = StoredDistributions | FullDistributions


def kl(student: Tensor, teacher: Distributions, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Σ over target tokens of T²·KL(teacher || student), in nats.

    Args:
        student: (N, T, V) logits.
        teacher: its distributions at the same positions.
        labels: (N, T); positions with -100 (padding) and examples that the teacher lacks do not count.
        temperature: T, of the teacher and of the student. The factor T² keeps the gradient's size independent of it.
    """
    counted = (labels != IGNORE) & teacher.present[:, None]
    return temperature**2 * teacher.divergence(student, temperature).masked_fill(~counted, 0.0).sum()


class _ListedDivergence(torch.autograd.Function):
    """The divergence of (M, V) logits from listed distributions (F = 1), keeping nothing of that size but them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, listed: Listed, temperature: float) -> Tensor:
        ctx.save_for_backward(student)
        ctx.listed, ctx.temperature = listed, temperature
        _, log_listed, log_rest = listed.split(softened(student, temperature))
        return listed.divergence(log_listed, log_rest)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (student,) = ctx.saved_tensors
        others, *logs = ctx.listed.split(softened(student, ctx.temperature))
        at_rest, at_listed = ctx.listed.pull(*logs, grads[0][None])
        gradient = others.mul_(at_rest[:, None]).scatter_add_(-1, ctx.listed.places, at_listed)
        return gradient.div_(ctx.temperature).to(student.dtype), None, None


def softened(logits: Tensor, temperature: float) -> Tensor:
    """A copy of logits in float32 at least, divided by the temperature."""
    copied = logits.to(_wide(logits), copy=True)
    return copied if temperature == 1.0 else copied.div_(temperature)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
