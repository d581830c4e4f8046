"""Rank classification: the answer choice that a model finds likeliest, by all ranks, safe against interruption.

The encoder runs once for each example, and the decoder projects keys and values of its output once: they are repeated
for the example's choices, which the decoder scores in one forward. A batch is one forward of each, on every rank.
Source: Sanh et al. 2022 (arXiv 2110.08207), section 4: the choice with the highest log-likelihood; T-Few and FiD-ICL
divide it by the choice's length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from tagi_ds.data.collate import IGNORED, pad_labels
from tagi_ds.data.examples import Batch, Task
from tagi_ds.evaluation.dealing import Collate, Pair, answer_all, plan_batches
from tagi_ds.evaluation.generation import GenerationSettings, example_keys, model_inputs
from tagi_ds.evaluation.predictions import Prediction, PredictionStore
from tagi_ds.model.adapter import TaskState
from tagi_ds.model.inference import Inference
from tagi_ds.runs import runs_of

Encode = Callable[[str], np.ndarray]
"""An answer choice -> its token ids (length,), the end token last."""
DECIMALS = 6
"""Of the log-likelihoods that are kept, and by which choices are compared."""


def has_choices(tasks: Sequence[Task]) -> bool:
    """Whether every example has answer choices, so that a group is ranked rather than answered freely."""
    return all(example.choices for task in tasks for example in task.examples)


def rank(
    model: nn.Module,
    tasks: Sequence[Task],
    collate: Collate,
    encode: Encode,
    settings: GenerationSettings,
    folder: Path,
    group: str,
    fingerprint: Mapping[str, Any],
    progress: bool = True,
) -> list[Prediction]:
    """Ranks the choices of every example of `tasks`; every rank must call it.

    It resumes and deals as :func:`tagi_ds.evaluation.generation.predict` does.

    Args:
        model: a TAGI model where the batches carry instructions, else any T5-family model.
        tasks: whose examples all have choices.
        collate: makes batches of inputs.
        encode: makes labels of choices.
        settings: `batch_examples` bounds the choices in a batch.
        folder, group, fingerprint, progress: as in ``predict``.

    Returns:
        The predictions in the order of `tasks` and their examples, on every rank; `prediction` is the choice with the
        highest mean log-likelihood a token.
    """
    pairs = [(task, example) for task in tasks for example in task.examples]
    keys = example_keys(group, pairs, "rank", dict(fingerprint))

    def prepare(batch: Sequence[Pair]) -> tuple[Batch, list[list[np.ndarray]]]:
        return collate(batch), [[encode(choice) for choice in example.choices] for _, example in batch]

    batches = plan_batches(pairs, settings.batch_examples, lambda example: len(example.choices))
    with Inference(model) as inference:

        def answer(batch: Sequence[Pair], prepared: tuple[Batch, list[list[np.ndarray]]]) -> list[Prediction]:
            return _answer(inference, batch, *prepared, keys)

        return answer_all(model, pairs, batches, keys, prepare, answer, PredictionStore(folder, group), progress)


def chosen(prediction: Prediction, normalised: bool) -> str:
    """The likeliest choice, by the mean log-likelihood of its tokens or by their sum; of equals the first."""
    scores = list(prediction.likelihoods)
    if normalised:
        scores = [score / length for score, length in zip(scores, prediction.lengths, strict=True)]
    return prediction.choices[scores.index(max(scores))]


@torch.no_grad()
def choice_likelihoods(inference: Inference, batch: Batch, labels: Tensor, owner: Tensor) -> Tensor:
    """Log-likelihoods of C answer choices, each of one of N examples.

    Args:
        inference: of the model of :func:`rank`.
        batch: the N examples.
        labels: (C, T) int64, the choices' tokens, -100 behind them.
        owner: (C,) int64, which of the examples a choice belongs to.

    Returns:
        (C,) float32, in nats.
    """
    model = inference.model
    state, further = None, {}
    if batch.instruction_ids is not None:
        state = _state(inference, batch, int((labels != IGNORED).sum()))
        memory, mask = model.encode_input(batch.input_ids, batch.attention_mask, state)
        assert batch.task_index is not None
        one = len(batch.instruction_ids) == 1
        further = {"state": state.at(None if one else runs_of(batch.task_index[owner]))}
        shift = model.backbone.prepare_decoder_input_ids_from_labels
    else:
        encoder = model.get_encoder()
        memory = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask, shift = batch.attention_mask, model.prepare_decoder_input_ids_from_labels
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=memory[owner]),
        attention_mask=mask[owner],
        decoder_input_ids=shift(labels),
        **inference.cache(memory, batch.attention_mask, owner, state),
        **further,
    ).logits
    lost = functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
    return -lost.sum(dim=1)


def _state(inference: Inference, batch: Batch, tokens: int) -> TaskState:
    if inference.is_whole:
        return inference.state(model_inputs(batch), tokens)
    # Every rank compiles with every batch: which of them has the tasks already would differ.
    compiled: TaskState = inference.model.compile_instructions(batch.instruction_ids, batch.instruction_attention_mask)
    return compiled.at(batch.runs)


def _answer(
    inference: Inference,
    pairs: Sequence[Pair],
    read: Batch,
    ids: Sequence[Sequence[np.ndarray]],
    keys: Mapping[str, str],
) -> list[Prediction]:
    began = time.perf_counter()
    device = next(inference.model.parameters()).device
    owner = torch.tensor([at for at, choices in enumerate(ids) for _ in choices])
    labels = pad_labels([choice for choices in ids for choice in choices])
    sums = choice_likelihoods(inference, read.to(device), labels.to(device), owner.to(device))
    rounded = iter([round(value, DECIMALS) for value in sums.tolist()])
    seconds = (time.perf_counter() - began) / len(pairs)
    found = []
    for (task, example), choices in zip(pairs, ids, strict=True):
        ranked = Prediction(
            example.id,
            task.name,
            example.input,
            "",
            example.references,
            seconds,
            keys[example.id],
            example.choices,
            tuple(next(rounded) for _ in choices),
            tuple(len(choice) for choice in choices),
        )
        found.append(replace(ranked, prediction=chosen(ranked, normalised=True)))
    return found
