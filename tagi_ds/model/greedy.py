"""Greedy answers of a T5 and of a TAGI model, token by token, over caches of our own.

The tokens are those of transformers' greedy ``generate``. What is saved beside it:

- rows that have ended are taken out of the batch, so that the longest answer does not have all others decoded on;
- the instruction's keys and values in the decoder are read once for all examples of a task, not once an example: the
  scores against [I ; F] are those against I, one product for a run of examples, beside those against F;
- self-attention's keys and values are written into a buffer instead of being copied with every token;
- masks, position biases and the rows of the tasks' factors are made once a batch, and nothing is made for settings that
  greedy decoding does not have.

An ordinary T5 takes the same way, with nothing of the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

from tagi_ds.model.adapter import TaskState
from tagi_ds.model.decoder_rows import DecoderRows

FEWER = 0.75
"""Rows that have ended leave the batch once at most this share of its rows goes on: until then the copies of the caches
would cost more than what they save."""
_KNOWN_SETTINGS = {
    "_from_model_config", "bos_token_id", "decoder_start_token_id", "do_sample", "early_stopping", "eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "num_beams", "pad_token_id", "temperature", "top_k", "top_p",
    "transformers_version", "use_cache",
}  # fmt: skip
"""Settings of a generation configuration that greedy decoding follows, or to which it is indifferent."""


def decodes(backbone: nn.Module) -> bool:
    """Whether :func:`decode` answers as ``generate`` does: a T5 or mT5 whose settings ask for greedy tokens alone.

    In float16 transformers clamps activations, and in sharded models every rank has to take every step: both are left
    to it.
    """
    if not isinstance(backbone, T5ForConditionalGeneration | MT5ForConditionalGeneration):
        return False
    if any(hasattr(parameter, "ds_id") for parameter in backbone.parameters()) or backbone.dtype == torch.float16:
        return False
    asked = {} if backbone.generation_config is None else backbone.generation_config.to_diff_dict()
    return {name for name, value in asked.items() if value} <= _KNOWN_SETTINGS


@torch.no_grad()
def decode(
    backbone: Any,
    memory: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    state: TaskState | None = None,
    scaling: float = 1.0,
    concatenate: bool = False,
) -> Tensor:
    """The likeliest token after each other, until every row has its end token.

    Args:
        backbone: for which :func:`decodes` holds, in evaluation mode.
        memory, mask: (N, L, d) and (N, L): the encoded inputs F, and 1 on their real tokens.
        max_new_tokens, min_new_tokens: no end token comes before the latter.
        state: of the N examples (its index set), for a TAGI model.
        scaling: LoRA's alpha / r.
        concatenate: whether the decoder attends to [I ; F], of which the state has I.

    Returns:
        (N, 1 + T) int64, the start token first, padded behind the end token; T is the longest answer's length.
    """
    settings = backbone.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    end = torch.tensor([token for token in ends if token is not None], device=memory.device, dtype=torch.long)
    rows = DecoderRows(backbone, memory, mask, state, scaling, concatenate)
    tokens = torch.full((len(memory),), settings.decoder_start_token_id, device=memory.device)
    answers = tokens.new_full((len(memory), 1 + max_new_tokens), settings.pad_token_id or 0)
    answers[:, 0] = tokens
    batch = torch.arange(len(memory), device=memory.device)
    goes_on = torch.ones_like(batch, dtype=torch.bool)
    for length in range(1, max_new_tokens + 1):
        scores = rows.step(tokens)
        if length <= min_new_tokens:
            scores[:, end] = -torch.inf
        tokens = scores.argmax(dim=-1)
        # Rows that have ended and are still in the batch keep their padding.
        answers[batch, length] = torch.where(goes_on, tokens, answers[batch, length])
        goes_on &= ~torch.isin(tokens, end)
        left = int(goes_on.sum())
        if left == 0:
            return answers[:, : length + 1]
        if left <= FEWER * len(batch):
            kept = goes_on.nonzero()[:, 0]
            batch, tokens, goes_on = batch[kept], tokens[kept], goes_on[kept]
            rows.keep(kept)
    return answers
