"""A finetuning run's instructions, encoded once: whether that holds, which they are, and how batches get them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Batch, Task
from tagi_ds.data.prompts import PROMPT_FIELDS
from tagi_ds.encodings.building import build
from tagi_ds.encodings.store import EncodingStore, key_of, plan_shards
from tagi_ds.engine.distributed import barrier, is_main
from tagi_ds.engine.strategy import Strategy
from tagi_ds.errors import UserError
from tagi_ds.launch import Stage
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.teachers.binding import content_checksum, tokenizer_hash

FOLDER = "instructions"
"""In the run folder, while the run is not done."""


class InstructionCache:
    """Attaches ``batch.instruction_encoding`` to batches, once it is built.

    Batches get theirs in the process that trains: several tasks' are megabytes, which are better read from the map
    than sent on by the process that made the batch.

    Args:
        folder: where it lies; every rank sees it.
        instructions: token ids (length,) of every wording that a batch may have.
        binding: what the encodings depend on: backbone, tokenizer, prompt, truncation, type.
        width: d of the backbone.
        stage: which says what is done.
    """

    def __init__(
        self, folder: Path, instructions: Sequence[np.ndarray], binding: dict[str, Any], width: int, stage: Stage
    ) -> None:
        keys = sorted({key_of(ids) for ids in instructions})
        self.folder, self.width, self._stage = folder, width, stage
        self.binding = {**binding, "instructions": content_checksum({"keys": keys})}
        self._shards = plan_shards(instructions, binding)
        self._store: EncodingStore | None = None

    def build(self, strategy: Strategy) -> None:
        """Encodes what is not there yet; called on all ranks, the strategy prepared.

        Raises:
            UserError: the disk is full or cannot be written to.
        """
        build(self.folder, self._shards, self.binding, strategy, self.width, self._say)
        self._store = EncodingStore(self.folder, self.binding)

    @property
    def store(self) -> EncodingStore:
        """The files.

        Raises:
            RuntimeError: they are not built yet.
        """
        if self._store is None:
            raise RuntimeError("instructions are asked for before they were encoded")
        return self._store

    @property
    def flops(self) -> int:
        """Operations of building, over all ranks."""
        return int(self.store.manifest["flops"])

    def attach(self, batch: Batch) -> Batch:
        """The same batch with its instructions' encodings (U, S, d).

        Raises:
            UserError: one of them is not in the cache.
        """
        assert batch.instruction_ids is not None
        assert batch.instruction_attention_mask is not None
        batch.instruction_encoding = self.store.read(batch.instruction_ids, batch.instruction_attention_mask)
        return batch

    def attached(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Batches that have their encodings when one asks for them, so that not all of them lie in memory."""
        return _Attached(self, batches)

    def remove(self) -> None:
        """Deletes the files, which nothing reads after the run; called on all ranks."""
        barrier()
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _say(self, text: str) -> None:
        self._stage.say(f"{self._stage.name}: {text}")


class _Attached(Sequence[Batch]):
    def __init__(self, cache: InstructionCache, batches: Sequence[Batch]) -> None:
        self._cache, self._batches = cache, batches

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, at: int) -> Batch: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Batch]: ...

    def __getitem__(self, at: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(at, slice):
            return _Attached(self._cache, self._batches[at])
        return self._cache.attach(dataclasses.replace(self._batches[at]))


def open_cache(
    stage: Stage,
    model: TagiForConditionalGeneration,
    tasks: Sequence[Task],
    validation_tasks: Sequence[Task],
    collator: Collator,
    strategy: Strategy,
) -> InstructionCache | None:
    """The run's cache, not built yet; None where instructions are encoded in every step.

    Args:
        stage: with the run's configuration.
        model: of the run, its `requires_grad` set.
        tasks: the training tasks, of which every wording may come.
        validation_tasks: the held-out ones, which come under their definitions.
        collator: makes the instructions' token ids.
        strategy: of the run; its type is that of the encodings.

    Raises:
        UserError: `engine.instruction_cache on`, and the encodings change from step to step.
    """
    setting = stage.config.engine.instruction_cache
    if setting == "off":
        return None
    if not model.encoding_is_constant:
        reason = f"model.also_train {model.config.also_train}"
        if setting == "on":
            raise UserError(
                f"engine.instruction_cache on with {reason}: an instruction's encoding changes from step to step",
                "set engine.instruction_cache auto, which then encodes in every step, or model.also_train nothing",
            )
        stage.say(f"{stage.name}: instructions are encoded in every step ({reason})")
        return None
    binding = {
        "backbone": model.config.backbone_hash,
        "tokenizer": tokenizer_hash(collator.tokenizer),
        "dtype": str(strategy.dtype).removeprefix("torch."),
        **prompt_binding(collator.config),
    }
    instructions = list(wordings(tasks, validation_tasks, collator))
    folder, width = stage.run_dir / FOLDER, model.backbone.config.d_model
    return InstructionCache(folder, instructions, binding, width, stage)


def prompt_binding(config: DataConfig) -> dict[str, Any]:
    """The fields that decide what is read of an instruction."""
    return {name: getattr(config, name) for name in PROMPT_FIELDS if name != "max_target_tokens"}


def wordings(tasks: Sequence[Task], validation_tasks: Sequence[Task], collator: Collator) -> Iterator[np.ndarray]:
    """Token ids (length,) of every instruction that training and its evaluations may read."""
    for task in tasks:
        for paraphrase in range(1 + len(task.paraphrases)):
            yield collator.instruction_ids(task, paraphrase)
    for task in validation_tasks:
        yield collator.instruction_ids(task, 0)
