"""From tasks and examples to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, Unit
from tagi_ds.data.examples import Batch, Example, Task, unit_of
from tagi_ds.data.prompts import concatenated_text, input_text, instruction_text

Form = Literal["hypernetwork", "concatenated", "input_only"]
Kind = Literal["instruction", "input", "target"]
IGNORED = -100
PAD_MULTIPLE = 8
"""To which lengths are padded where no configuration says otherwise."""
KEPT_BYTES = 64_000_000
"""Memory for encoded texts of one kind (instruction, input, target) in one process."""
_ENTRY_BYTES = 300


@dataclass(frozen=True)
class TaskChunk:
    """Examples of one task under one wording of its instruction.

    Attributes:
        task: the task.
        paraphrase: 0 is the definition, i > 0 a further wording.
        examples: some of the task's examples.
        references: for each example, which of its references is the target.
    """

    task: Task
    paraphrase: int
    examples: tuple[Example, ...]
    references: tuple[int, ...]


class Collator:
    """Builds a Batch from chunks of tasks.

    Args:
        tokenizer: with padding and end tokens; the end token is put behind every text.
        config: prompt wording and truncation.
        form: `hypernetwork`: instructions beside inputs; `concatenated`: both in the input; `input_only`: no
            instruction at all (category teachers).
        unit: what `Batch.units` names.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        form: Form = "hypernetwork",
        unit: Unit = "category",
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.form = form
        self.unit = unit
        self._encoders: dict[Kind, _Encoder] = {
            "instruction": _Encoder(tokenizer, config.max_source_tokens),
            "input": _Encoder(tokenizer, config.max_source_tokens),
            "target": _Encoder(tokenizer, config.max_target_tokens),
        }

    def __call__(self, chunks: Sequence[TaskChunk]) -> Batch:
        """N examples in the chunks' order; chunks with the same instruction share one of the U rows.

        `Batch.counts` has the texts that were cut, and those that lack demonstrations for which there was no room.
        """
        rows: dict[tuple[str, int], int] = {}
        owners: list[TaskChunk] = []
        task_index: list[int] = []
        texts: dict[Kind, list[str]] = {"instruction": [], "input": [], "target": []}
        fewer = 0
        for chunk in chunks:
            key = (chunk.task.name, chunk.paraphrase)
            if key not in rows:
                rows[key] = len(owners)
                owners.append(chunk)
                if self.form == "hypernetwork":
                    text, whole = self._instruction(chunk)
                    texts["instruction"].append(text)
                    fewer += text != whole
            for example, reference in zip(chunk.examples, chunk.references, strict=True):
                task_index.append(rows[key])
                text, whole = self._input(chunk, example)
                texts["input"].append(text)
                fewer += text != whole
                texts["target"].append(example.references[reference])
        encoded = {kind: [self._encoders[kind](text) for text in found] for kind, found in texts.items()}
        ids = {kind: [part.ids for part in parts] for kind, parts in encoded.items()}
        multiple = self.config.pad_multiple
        input_ids, attention_mask = pad_ids(ids["input"], multiple)
        instructions = pad_ids(ids["instruction"], multiple) if self.form == "hypernetwork" else (None, None)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=pad_labels(ids["target"], multiple),
            instruction_ids=instructions[0],
            instruction_attention_mask=instructions[1],
            task_index=torch.tensor(task_index, dtype=torch.int64),
            example_ids=[example.id for chunk in chunks for example in chunk.examples],
            tasks=[owner.task.name for owner in owners],
            units=[unit_of(owner.task, self.unit) for owner in owners],
            counts={
                **{f"truncated_{kind}": sum(part.cut for part in parts) for kind, parts in encoded.items()},
                "fewer_demonstrations": fewer,
            },
        )

    def encode(self, text: str, kind: Kind) -> np.ndarray:
        """Token ids (length,) int32 with the end token last, cut to the configured length of its kind."""
        return self._encoders[kind](text).ids

    def instruction_ids(self, task: Task, paraphrase: int) -> np.ndarray:
        """Token ids (length,) int32 of one wording of a task's instruction, as every batch has them."""
        return self.encode(self._instruction(TaskChunk(task, paraphrase, (), ()))[0], "instruction")

    def _instruction(self, chunk: TaskChunk) -> tuple[str, str]:
        """The text that fits, and the one with all demonstrations."""
        asked = (chunk.task, chunk.paraphrase, self.config)
        return instruction_text(*asked, self._encoders["instruction"].fits), instruction_text(*asked)

    def _input(self, chunk: TaskChunk, example: Example) -> tuple[str, str]:
        """The text that fits, and the one with all demonstrations."""
        if self.form == "concatenated":
            asked = (chunk.task, chunk.paraphrase, example, self.config)
            return concatenated_text(*asked, self._encoders["input"].fits), concatenated_text(*asked)
        text = input_text(example.input, self.config, chunk.task.collection)
        return text, text


@dataclass(frozen=True)
class _Encoded:
    """Token ids (length,) int32 with the end token last, and whether some were cut."""

    ids: np.ndarray
    cut: bool


class _Encoder:
    """Texts of one kind as token ids, cut to `limit`; what was encoded is kept while there is room.

    Measured on SNI's tasks (135 tokens an example, one core): 190 us an example to encode, one by one or in batches;
    0.1 us to find it here; 0.6 us to read it from a memory-mapped file of token ids. So one process that sees an
    epoch again encodes it once, and a file would bring nothing. A rank of 64 sees an example again after 64 epochs;
    it encodes, and `data.workers` hides that.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._kept: dict[str, _Encoded] = {}
        self._bytes = 0
        self._last: tuple[str, _Encoded] | None = None

    def __call__(self, text: str) -> _Encoded:
        found = self._kept.get(text)
        if found is not None:
            return found
        # A text is first asked whether it fits, then encoded.
        if self._last is not None and self._last[0] == text:
            return self._last[1]
        ids = self._tokenizer(text, add_special_tokens=False, truncation=True, max_length=self._limit)["input_ids"]
        # Reading `limit` tokens without the end token: as many mean that the end token displaces one.
        array = np.array([*ids[: self._limit - 1], self._tokenizer.eos_token_id], dtype=np.int32)
        encoded = _Encoded(array, len(ids) >= self._limit)
        self._last = text, encoded
        # What came first stays: where an epoch does not fit, replacing would lose each text before it comes again.
        if self._bytes < KEPT_BYTES:
            self._kept[text] = encoded
            self._bytes += array.nbytes + len(text) + _ENTRY_BYTES
        return encoded

    def fits(self, text: str) -> bool:
        """Whether a text is encoded without being cut."""
        return not self(text).cut


def pad_ids(rows: Sequence[np.ndarray], multiple: int = PAD_MULTIPLE) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (rows, length) int64, padded right with 0 to a multiple of `multiple`."""
    ids = _padded(rows, 0, multiple)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()


def pad_labels(rows: Sequence[np.ndarray], multiple: int = PAD_MULTIPLE) -> Tensor:
    """(rows, length) int64, padded right with -100 to a multiple of `multiple`."""
    return _padded(rows, IGNORED, multiple)


def _padded(rows: Sequence[np.ndarray], value: int, multiple: int) -> Tensor:
    longest = max(len(row) for row in rows)
    out = np.full((len(rows), -(-longest // multiple) * multiple), value, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(out)
