"""The logit teacher: any T5-family model that reads instruction and input, and demonstrations where asked.

With demonstrations it is a fusion-in-decoder model (FiD-ICL, Ye et al., ACL 2023): k training examples of the task and
the input are encoded each on its own, and the decoder attends to all their encodings at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.data.collate import Collator, TaskChunk, pad_ids
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.mixture import reference_of
from tagi_ds.data.order import permutation
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.divergence import FullDistributions
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.model.backbone import content_hash, load_backbone, merge_lora, resolve_folder
from tagi_ds.teachers.binding import content_checksum, tokenizer_hash

ENCODED_AT_ONCE = 64
"""Passages in one forward of the encoder."""
ADAPTER_CONFIG = "adapter_config.json"
INPUT_MARK, OUTPUT_MARK = "# Input #", " # Output #"
"""FiD-ICL's wording of a demonstration."""


class Reading(NamedTuple):
    """What a logit teacher reads of N examples, P passages each.

    Attributes:
        ids, mask: (M, L) int64, the distinct passages, padded right with 0.
        passages: (N, P) int64, rows of `ids`; -1 where a task has too few demonstrations.
    """

    ids: Tensor
    mask: Tensor
    passages: Tensor


def demonstrations_of(task: Task, example: Example, count: int, seed: int) -> list[Example]:
    """`count` other examples of the task, fewer where it has no more; the choice depends on example and seed alone."""
    order = permutation(len(task.examples), seed, "demonstrations", example.id)
    # One more than asked for, since the example itself may be among them.
    drawn = [task.examples[int(row)] for row in order[: count + 1]]
    return [other for other in drawn if other.id != example.id][:count]


class TeacherReader:
    """Makes readings from chunks of tasks, each under its task's definition, whatever wording the student reads.

    Args:
        tokenizer: the student's.
        config: prompt wording and truncation.
        demonstrations: k; 0: instruction and input in one text.
        seed: of the choice of demonstrations and of their references.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, demonstrations: int, seed: int) -> None:
        self.config, self.demonstrations, self.seed = config, demonstrations, seed
        self._collator = Collator(tokenizer, config, "concatenated")
        self._marks = [
            np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
            for text in (INPUT_MARK, OUTPUT_MARK)
        ]

    def batch(self, chunks: Sequence[TaskChunk]) -> Batch:
        """The examples' own texts, labels and ids."""
        return self._collator([TaskChunk(chunk.task, 0, chunk.examples, chunk.references) for chunk in chunks])

    def __call__(self, chunks: Sequence[TaskChunk]) -> Reading:
        """The reading of all examples of the chunks, in their order."""
        return self.reading(chunks, self.batch(chunks))

    def reading(self, chunks: Sequence[TaskChunk], batch: Batch) -> Reading:
        """The same, from the batch that :meth:`batch` made of these chunks."""
        if not self.demonstrations:
            return Reading(batch.input_ids, batch.attention_mask, torch.arange(len(batch.labels))[:, None])
        rows: dict[str, int] = {}
        shown: list[TaskChunk] = []
        passages = torch.full((len(batch.labels), self.demonstrations + 1), -1)
        pairs = [(chunk.task, example) for chunk in chunks for example in chunk.examples]
        for number, (task, example) in enumerate(pairs):
            for place, other in enumerate(demonstrations_of(task, example, self.demonstrations, self.seed)):
                if other.id not in rows:
                    rows[other.id] = len(shown)
                    shown.append(TaskChunk(task, 0, (other,), (reference_of(other, self.seed),)))
                passages[number, place] = rows[other.id]
        texts = self._demonstrations(shown)
        # The input comes behind the demonstrations, as in FiD-ICL.
        passages[:, -1] = torch.arange(len(pairs)) + len(texts)
        texts += [ids[mask.bool()].numpy() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        return Reading(*pad_ids(texts), passages)

    def _demonstrations(self, chunks: Sequence[TaskChunk]) -> list[np.ndarray]:
        """`# Input # x # Output # y` for one example a chunk; x and y are cut as inputs and targets are."""
        if not chunks:
            return []
        batch = self._collator(chunks)
        limits = self.config.max_source_tokens, self.config.max_target_tokens
        texts = []
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            parts = (ids[mask.bool()][:-1].numpy(), labels[labels >= 0][:-1].numpy())
            marked = [
                np.concatenate([mark, part[: max(limit - len(mark) - 1, 0)]])
                for mark, part, limit in zip(self._marks, parts, limits, strict=True)
            ]
            # Both texts ended with the end token; the passage has one.
            texts.append(np.concatenate([*marked, ids[mask.bool()][-1:].numpy()]))
        return texts


class ReadingCollator(Collator):
    """The student's batches, each with what the online teacher reads of it as ``batch.teacher["reading"]``.

    Args:
        reader: of the teacher.
        settings: of :class:`Collator`.
    """

    def __init__(self, reader: TeacherReader, *settings: Any) -> None:
        super().__init__(*settings)
        self._reader = reader

    def __call__(self, chunks: Sequence[TaskChunk]) -> Batch:
        """See `Collator`."""
        batch = super().__call__(chunks)
        batch.teacher["reading"] = self._reader(chunks)
        return batch


class LogitTeacher:
    """A frozen teacher in evaluation mode.

    Args:
        model: T5-family.
        vocabulary: tokens that both the teacher and the student predict; logits beyond are cut off.

    Attributes:
        meter: what it computes is counted there, each shape once; None: not counted.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary
        self.meter: FlopMeter | None = None

    @torch.no_grad()
    def logits(self, reading: Reading, labels: Tensor) -> Tensor:
        """(N, T, vocabulary) logits at every position of the labels (N, T), teacher-forced."""
        memory, mask = fuse(self._encode(reading), reading)
        decoder_input_ids = self.model.prepare_decoder_input_ids_from_labels(labels)
        with self._counted("decoder", memory.shape, labels.shape):
            logits: Tensor = self.model(
                encoder_outputs=(memory,), attention_mask=mask, decoder_input_ids=decoder_input_ids, use_cache=False
            ).logits
        return logits[..., : self.vocabulary]

    def __call__(self, reading: Reading, labels: Tensor) -> FullDistributions:
        """The teacher's distributions, for the loss; it moves to the labels' device."""
        if self.model.device != labels.device:
            self.model.to(labels.device)
        present = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        return FullDistributions(self.logits(reading, labels), present)

    def _encode(self, reading: Reading) -> Tensor:
        """(M, L, d): every passage by itself."""
        ids, mask = reading.ids, reading.mask
        if len(ids) <= ENCODED_AT_ONCE:
            return self._encode_together(ids, mask)
        hidden = ids.new_zeros((*ids.shape, self.model.config.d_model), dtype=self.model.dtype)
        # Passages of like lengths go together: an article among short ones would widen them all.
        for rows in mask.sum(1).argsort(stable=True).split(ENCODED_AT_ONCE):
            width = int(mask[rows].sum(1).max())
            hidden[rows, :width] = self._encode_together(ids[rows, :width], mask[rows, :width])
        return hidden

    def _encode_together(self, ids: Tensor, mask: Tensor) -> Tensor:
        with self._counted("encoder", ids.shape):
            hidden: Tensor = self.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def _counted(self, *shapes: Hashable) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.meter is None else self.meter.counting_once(*shapes)


def fuse(hidden: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Each example's encoded passages one after the other, without the padding between them.

    Args:
        hidden: (M, L, d).
        reading: which passages an example has.

    Returns:
        (N, S, d) and its mask (N, S), padded right.
    """
    passages = reading.passages
    chosen = passages.clamp(min=0)
    if passages.shape[1] == 1:
        return hidden[chosen[:, 0]], reading.mask[chosen[:, 0]]
    mask = (reading.mask[chosen] * (passages >= 0)[..., None]).flatten(1)
    # T5's decoder sees no positions in the encoder's output, so that moving the real ones together changes nothing.
    real_first = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    rows = torch.arange(len(passages), device=mask.device)[:, None]
    passage, place = real_first // hidden.shape[1], real_first % hidden.shape[1]
    return hidden[chosen[rows, passage], place], mask.gather(1, real_first)


def teacher_folder(config: RunConfig, backbone: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The logit teacher's folder: a whole model, or a PEFT adapter for the backbone; by default the backbone.

    Raises:
        UserError: there is none, or its vocabulary is not the run's.
    """
    named = config.teachers.logit_teacher
    if named is None or (Path(named) / ADAPTER_CONFIG).is_file():
        return backbone if named is None else Path(named)
    folder = resolve_folder(named)
    mend = "name a teacher of the backbone's family with --teachers.logit_teacher"
    if any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        own = tokenizer_hash(load_tokenizer(folder))
        if own != tokenizer_hash(tokenizer):
            raise UserError(f"the logit teacher {folder} has another tokenizer than the backbone", mend)
    shared = shared_vocabulary(folder, backbone)
    if shared < len(tokenizer):
        raise UserError(
            f"the logit teacher {folder} and the backbone both predict {shared} tokens only; "
            f"the tokenizer has {len(tokenizer)}",
            mend,
        )
    return folder


def shared_vocabulary(teacher: Path, backbone: Path) -> int:
    """How many tokens both the teacher and the backbone predict.

    Published models of one tokenizer differ in rows behind its last token, which stand for nothing: T5's have 32,128,
    those finetuned after a resize 32,100.
    """
    folders = [folder for folder in (teacher, backbone) if not (folder / ADAPTER_CONFIG).is_file()]
    return min(int(read_json(folder / "config.json")["vocab_size"]) for folder in folders)


def teacher_hash(teacher: Path, backbone: Path) -> str:
    """What the teacher's distributions depend on: its weights, and the backbone's where it is an adapter."""
    if (teacher / ADAPTER_CONFIG).is_file():
        return content_checksum({"adapter": content_hash(teacher), "backbone": content_hash(backbone)})
    return content_hash(teacher)


def named_teacher(config: RunConfig, backbone: Path) -> dict[str, str]:
    """What a run that names its logit teacher asks of a store made beforehand; nothing where it names none.

    A folder is compared by its weights. A hub id is compared by its name, so that machines which only train need
    neither network nor the teacher.
    """
    named = config.teachers.logit_teacher
    if named is None:
        return {}
    if Path(named).is_dir():
        return {"teacher": teacher_hash(Path(named), backbone)}
    return {"logit_teacher": named}


def load_teacher(teacher: Path, backbone: Path, dtype: torch.dtype) -> LogitTeacher:
    """Loads a teacher from :func:`teacher_folder`; before ZeRO-3's context, so that every rank has it whole.

    Raises:
        UserError: damaged files, or an adapter that does not fit the backbone.
    """
    vocabulary = shared_vocabulary(teacher, backbone)
    if not (teacher / ADAPTER_CONFIG).is_file():
        return LogitTeacher(load_backbone(teacher, dtype), vocabulary)
    from peft import PeftModel

    model: Any = load_backbone(backbone, dtype)
    try:
        model = merge_lora(PeftModel.from_pretrained(model, str(teacher)))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the adapter {teacher} does not fit the backbone {backbone}: {error}",
            "name the backbone that it was trained on with --model.backbone",
        ) from error
    return LogitTeacher(model, vocabulary)
