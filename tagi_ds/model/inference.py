"""How a model answers one batch after the other: tasks compiled once, adapters merged where that is less work."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tagi_ds.model.adapter import TaskState
from tagi_ds.model.compiled import KEPT_BYTES, CompiledTasks
from tagi_ds.model.decoder_rows import input_cache
from tagi_ds.model.greedy import decode, decodes
from tagi_ds.model.merging import can_merge, merged, merging_pays
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.runs import runs_of

LEAST_TOKENS = 1
"""Tokens of an answer that are sure to be written, when it is not known how long it will be."""


class Inference:
    """A model as it answers, a context: at its end the weights are those from before.

    What comes of a batch depends on that batch alone, not on those before it.

    Args:
        model: in evaluation mode; a TAGI model, or one with ``generate``. Its weights do not change meanwhile. Where
            they are sharded all is left to the model's own ``generate``, and every rank has to answer as many batches.
        kept_bytes: memory for compiled tasks.
        merge: whether adapters may be merged into the weights; answers are the same but for rounding.
    """

    def __init__(self, model: Any, kept_bytes: int = KEPT_BYTES, merge: bool = True) -> None:
        self.model = model
        self.is_tagi = isinstance(model, TagiForConditionalGeneration)
        self.is_whole = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        self._greedy = decodes(model.backbone if self.is_tagi else model)
        self._tasks = CompiledTasks(model, kept_bytes) if self.is_tagi else None
        self._can_merge = merge and self.is_tagi and can_merge(model)
        self._weights = contextlib.ExitStack()
        self._merged: tuple[TaskState, TaskState] | None = None

    def __enter__(self) -> Inference:
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @torch.no_grad()
    def generate(
        self, inputs: Mapping[str, Any], max_new_tokens: int, min_new_tokens: int = 0, beams: int = 1
    ) -> Tensor:
        """Answers of N inputs by beam search, or with one beam the likeliest token after each other.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` (N, L); for a TAGI model also ``instruction_ids`` and
                ``instruction_attention_mask`` (U, S), or a ``task`` (state of U tasks) in their place, and
                ``task_index`` (N,), which is not needed where U = 1.
            max_new_tokens, min_new_tokens: bounds of an answer's length, its end token included.
            beams: 1 is greedy.

        Returns:
            (N, 1 + T) token ids, the start token first, padded behind the end token.
        """
        settings = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": False}
        if min_new_tokens:
            settings["min_new_tokens"] = min_new_tokens
        if not self.is_tagi and (beams > 1 or not self._greedy):
            return self.model.generate(**inputs, **settings)  # type: ignore[no-any-return]
        if not self.is_tagi:
            mask = inputs["attention_mask"]
            memory = self.model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
            return decode(self.model, memory, mask, max_new_tokens, min_new_tokens)
        if not self.is_whole:
            return self.model.generate(**inputs, **settings)  # type: ignore[no-any-return]
        return self._answer_tasks(inputs, max_new_tokens, min_new_tokens, beams, settings)

    def state(self, inputs: Mapping[str, Any], answers: int) -> TaskState:
        """The state of a batch's examples, its index set, as the weights are now: without the adapters that they hold.

        Args:
            inputs: of :meth:`generate`, of a TAGI model that is whole.
            answers: tokens that the decoder will write at least, over all examples.
        """
        assert self._tasks is not None
        known = inputs.get("task")
        state = known or self._compiled(inputs["instruction_ids"], inputs["instruction_attention_mask"])
        assert state.mask is not None
        if len(state.mask) > 1:
            self._restore()
            index = inputs.get("task_index")
            return state.at(None if index is None else runs_of(index))
        if not self._can_merge or not merging_pays(self.model.site_table, inputs["input_ids"].numel(), answers):
            self._restore()
            return state
        return self._merge(state)

    def cache(self, memory: Tensor, mask: Tensor, owner: Tensor, state: TaskState | None) -> dict[str, Any]:
        """For a model's forward over C rows of the decoder that read N inputs: each input's keys and values once.

        Args:
            memory, mask: (N, L, d) and (N, L), encoded inputs.
            owner: (C,) int64, which input a row reads.
            state: of :meth:`state`, for a TAGI model.

        Returns:
            ``past_key_values`` and ``use_cache``; where the decoder is not one of ours, that there is no cache.
        """
        if not self._greedy:
            return {"use_cache": False}
        if state is None:
            return {"past_key_values": input_cache(self.model, memory, mask, owner), "use_cache": True}
        config = self.model.config
        own = input_cache(self.model.backbone, memory, mask, owner, state, config.scaling, config.concatenate)
        return {"past_key_values": own, "use_cache": True}

    def _answer_tasks(
        self, inputs: Mapping[str, Any], most: int, least: int, beams: int, settings: Mapping[str, Any]
    ) -> Tensor:
        rows = len(inputs["input_ids"])
        state = self.state(inputs, rows * max(LEAST_TOKENS, least))
        given = inputs["input_ids"], inputs["attention_mask"]
        if beams > 1 or not self._greedy:
            assert state.mask is not None
            index = inputs.get("task_index") if len(state.mask) > 1 else None
            return self.model.generate(*given, task=state, task_index=index, **settings)  # type: ignore[no-any-return]
        memory, _ = self.model.encode_input(*given, state)
        config = self.model.config
        return decode(self.model.backbone, memory, given[1], most, least, state, config.scaling, config.concatenate)

    def _compiled(self, ids: Tensor, mask: Tensor) -> TaskState:
        assert self._tasks is not None
        if not self._tasks.has(ids, mask):
            # Instructions are read by the backbone as it is.
            self._restore()
        return self._tasks.of(ids, mask)

    def _merge(self, state: TaskState) -> TaskState:
        if self._merged is None or self._merged[0] is not state:
            self._restore()
            self._merged = state, self._weights.enter_context(merged(self.model, state))
        return self._merged[1]

    def _restore(self) -> None:
        self._merged = None
        self._weights.close()
