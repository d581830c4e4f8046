"""What each stage minimises: the bridge between the losses (sums) and the engine (global counts)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tagi_ds.config import LossConfig
from tagi_ds.data.examples import COUNTS, Batch
from tagi_ds.divergence import Distributions
from tagi_ds.engine.objective import PER_EXAMPLE, RUN_TOTALS, TOTAL, Term
from tagi_ds.losses import ALIGNMENTS, IGNORE, alignment_share, alignment_weight
from tagi_ds.model.adapter import LowRank
from tagi_ds.model.head import Figures
from tagi_ds.reading import TargetReader


class SequenceObjective:
    """Cross-entropy of an ordinary seq2seq model: the backbone's training and meta-training."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """Target tokens and examples of a micro-batch, and what happened in its making."""
        return batch_counts(batch)

    def __call__(self, model: Callable[..., Any], batch: Batch) -> dict[str, Term]:
        """L_pred and the share of target tokens predicted right."""
        figures = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=shift_right(batch),
            use_cache=False,
            read=TargetReader(batch.labels),
        )
        return label_terms(figures, batch, 1.0)


class TagiObjective:
    """L = label·L_pred + λ1·KL + λ2·alignment (paper, section 3.4), each term also logged by itself.

    KL is averaged over all target tokens and the alignment over all examples, those without a teacher counting zero:
    a store that covers few tasks then weighs little, rather than a few tasks much. ``loss/mse`` is the mean error of
    the aligned examples alone.

    Args:
        config: weights and forms.
        scaling: the generated adapters' alpha / r.
        temperature: of the teacher's distributions.
        teacher_scaling: the parameter store's alpha / r.
        mean_square: the parameter store's mean ‖ΔW‖² a site.
        online: the logit teacher that runs in the step, from a batch's ``reading`` and labels; None where batches
            bring the distributions of a store.
    """

    def __init__(
        self,
        config: LossConfig,
        scaling: float,
        temperature: float = 1.0,
        teacher_scaling: float = 1.0,
        mean_square: Mapping[str, float] | None = None,
        online: Callable[..., Distributions] | None = None,
    ) -> None:
        self.online = online
        self.config, self.scaling, self.temperature = config, scaling, temperature
        self.teacher_scaling, self.mean_square = teacher_scaling, mean_square

    def counts(self, batch: Batch) -> dict[str, float]:
        """As of every batch, and the examples whose task has a LoRA teacher."""
        counts = batch_counts(batch)
        if self.config.alignment:
            counts["aligned_examples"] = float(self._aligned_examples(batch).sum())
        return counts

    def __call__(self, model: Callable[..., Any], batch: Batch) -> dict[str, Term]:
        """The terms of one micro-batch."""
        output = model(**self.inputs(batch), read=self.reader(batch))
        return self.terms(output.figures, batch, self.alignment_errors(output.state.adapters, batch))

    def inputs(self, batch: Batch) -> dict[str, Tensor | None]:
        """What the model takes of a batch."""
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "instruction_ids": batch.instruction_ids,
            "instruction_attention_mask": batch.instruction_attention_mask,
            "task_index": batch.runs,
            "instruction_encoding": batch.instruction_encoding,
            "labels": batch.labels,
        }

    def alignment_errors(
        self, adapters: Mapping[str, LowRank], batch: Batch, sites: Collection[str] | None = None
    ) -> Tensor | None:
        """The squared error of each task's generated adapter; None where nothing is aligned.

        Args:
            adapters: site -> factors of the U tasks.
            batch: with its teachers' adapters.
            sites: those that `adapters` has where it is a part of the model's: what is returned is then their share
                in the whole error, and the shares of all parts add up to it. None: `adapters` has every site.

        Returns:
            (U,) float32.
        """
        if not self.config.alignment:
            return None
        teacher, _ = batch.teacher["adapters"]
        chosen = teacher if sites is None else {site: teacher[site] for site in sites if teacher}
        if not chosen:
            return None
        name = self.config.alignment_form
        error = ALIGNMENTS[name](adapters, chosen, self.scaling, self.teacher_scaling, self.mean_square)
        return error if sites is None else error * alignment_share(name, chosen, teacher)

    def reader(self, batch: Batch) -> TargetReader:
        """What takes the figures of a micro-batch from its logits; an online teacher speaks here."""
        teacher = self._distributions(batch) if self.config.kl > 0 else None
        return TargetReader(batch.labels, teacher, self.temperature)

    def terms(self, figures: Figures, batch: Batch, errors: Tensor | None) -> dict[str, Term]:
        """The terms of one micro-batch, from its figures and the errors (U,) of all sites together."""
        terms = label_terms(figures, batch, self.config.label)
        if self.config.kl > 0:
            assert figures.divergence is not None
            terms["kl"] = Term(figures.divergence.sum(), "tokens", self.config.kl)
        if self.config.alignment:
            terms.update(self._alignment(errors, batch, figures))
        return terms

    def _distributions(self, batch: Batch) -> Distributions:
        if self.online is not None:
            return self.online(batch.teacher["reading"], batch.labels)
        stored: Distributions = batch.teacher["distributions"]
        return stored

    def _alignment(self, error: Tensor | None, batch: Batch, figures: Figures) -> dict[str, Term]:
        """Per distinct task, averaged by example count: neither grouping nor world size changes it."""
        if error is None:
            # No unit of this micro-batch has a teacher; the terms keep their names, and the graph its adapters.
            zero = 0.0 * figures.label.sum()
            return {"alignment": Term(zero, "examples", 1.0), "mse": Term(zero, "aligned_examples", 0.0)}
        examples = self._aligned_examples(batch).to(error.dtype)
        weighted = (examples * alignment_weight(error, self.config.alignment) * error).sum()
        return {
            "alignment": Term(weighted, "examples", 1.0),
            "mse": Term((examples * error).sum().detach(), "aligned_examples", 0.0),
        }

    def _aligned_examples(self, batch: Batch) -> Tensor:
        """(U,) examples of each task that has a teacher."""
        _, present = batch.teacher["adapters"]
        assert batch.task_index is not None
        return torch.bincount(batch.task_index, minlength=len(present)) * present


def batch_counts(batch: Batch) -> dict[str, float]:
    """Target tokens and examples of a micro-batch, and lengths; for the run's totals, these and what happened in its
    making."""
    made = {f"{RUN_TOTALS}{name}": float(batch.counts.get(name, 0)) for name in COUNTS}
    real = {
        "instruction": batch.instruction_attention_mask,
        "input": batch.attention_mask,
        "target": batch.labels != IGNORE,
    }
    lengths: dict[str, float] = {}
    for kind, mask in real.items():
        tokens, positions = (0.0, 0) if mask is None else (float(mask.sum()), mask.numel())
        lengths |= {f"{kind}_tokens": tokens, f"{kind}_padding": positions - tokens}
    means = {f"{PER_EXAMPLE}{name}": value for name, value in lengths.items()}
    totals = {f"{RUN_TOTALS}{TOTAL}{name}": value for name, value in lengths.items()}
    return {"tokens": lengths["target_tokens"], "examples": float(len(batch.labels)), **means, **totals, **made}


def shift_right(batch: Batch) -> Tensor:
    """(N, T) decoder inputs: T5's start token 0, then the labels without their last; padding is 0 as well."""
    shifted = batch.labels.new_zeros(batch.labels.shape)
    shifted[:, 1:] = batch.labels[:, :-1].masked_fill(batch.labels[:, :-1] == IGNORE, 0)
    return shifted


def label_terms(figures: Figures, batch: Batch, weight: float) -> dict[str, Term]:
    """L_pred, and two figures that are only logged: token accuracy and teacher-forced exact match."""
    real = batch.labels != IGNORE
    exact = (figures.right | ~real).all(1) & real.any(1)
    return {
        "label": Term(figures.label.sum(), "tokens", weight),
        "token_accuracy": Term(figures.right.sum().float(), "tokens", 0.0),
        "exact": Term(exact.sum().float(), "examples", 0.0),
    }
