"""Documents cut into a | b | c for hypernetwork pretraining: a goes to the hypernetwork, b to the backbone, c is
predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import PAD_MULTIPLE, pad_ids, pad_labels
from tagi_ds.data.examples import Batch
from tagi_ds.data.order import generator
from tagi_ds.errors import UserError

_CHARACTERS_A_TOKEN = (6, 32)
"""How much of a long text is tokenised for its first tokens: little at first, and more only where that is too little
(T5's English text has 4 to 5; a bound there must be, since one word may be megabytes long)."""


@dataclass(frozen=True)
class Cut:
    """One example's three parts: token ids (length,) int32 without end tokens."""

    id: str
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def cut_points(length: int, least: int, document: str, seed: int) -> tuple[int, int]:
    """Where an example of `length` tokens is cut: uniform over all cuts whose parts have at least `least` tokens."""
    slack = length - 3 * least
    first, second = sorted(generator(seed, "cut", document).choice(slack + 2, size=2, replace=False))
    return least + int(first), 2 * least + int(second) - 1


class Cutter:
    """Tokenises documents and cuts them; every cut depends on the seed, the document and the window alone.

    With ``documents: truncate`` a document is one example, its beginning; its id is `shard:row`. With ``windows`` every
    `document_tokens` tokens of it are one, with the ids `shard:row#window`; the last window may be shorter.

    Args:
        tokenizer: makes the tokens.
        config: `documents`, `document_tokens`, `min_part_tokens`.
        seed: of the cuts.

    Raises:
        UserError: an example has no room for three parts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int) -> None:
        self.limit, self.least = config.document_tokens, config.min_part_tokens
        self.whole = config.documents == "windows"
        if self.least < 1 or self.limit < 3 * self.least:
            raise UserError(
                f"data.document_tokens = {self.limit} has no room for three parts of "
                f"data.min_part_tokens = {self.least}",
                "raise data.document_tokens or lower data.min_part_tokens (at least 1)",
            )
        self._tokenizer, self._seed = tokenizer, seed

    def tokens(self, text: str) -> np.ndarray:
        """Token ids (length,) int32: the whole document's, or its first `document_tokens`."""
        if self.whole:
            return np.array(self._encode(text), dtype=np.int32)
        # Tokenising a book for its first thousand tokens would be waste.
        for characters in _CHARACTERS_A_TOKEN:
            ids = self._encode(text[: self.limit * characters])
            if len(ids) >= self.limit or len(text) <= self.limit * characters:
                break
        return np.array(ids[: self.limit], dtype=np.int32)

    def windows(self, ids: np.ndarray) -> int:
        """Examples of a document: those with at least three times `min_part_tokens` tokens."""
        full, rest = divmod(len(ids), self.limit)
        return full + (rest >= 3 * self.least)

    def drops_end(self, ids: np.ndarray) -> bool:
        """Whether the document's end is too short for an example, though the document is not."""
        return self.windows(ids) > 0 and 0 < len(ids) % self.limit < 3 * self.least

    def cut(self, shard: str, row: int, ids: np.ndarray, window: int) -> Cut:
        """One example of a document."""
        name = f"{shard}:{row}#{window}" if self.whole else f"{shard}:{row}"
        part = ids[window * self.limit : (window + 1) * self.limit]
        i, j = cut_points(len(part), self.least, name, self._seed)
        return Cut(name, part[:i], part[i:j], part[j:])

    def place(self, name: str) -> tuple[str, int, int]:
        """(shard, row, window) of an example's id.

        Raises:
            UserError: it is no such id.
        """
        document, _, window = name.rpartition("#") if self.whole else (name, "", "0")
        shard, _, row = document.rpartition(":")
        if not (shard and row.isdecimal() and window.isdecimal()):
            shape = "SHARD:ROW#WINDOW" if self.whole else "SHARD:ROW"
            raise UserError(f"{name!r} is no example of documents: one is {shape}", "check the id and data.documents")
        return shard, int(row), int(window)

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids


def batch_of(cuts: list[Cut], end: int, counts: dict[str, int], multiple: int = PAD_MULTIPLE) -> Batch:
    """The batch of some cuts; `end`, the end token, is put behind each part.

    Args:
        cuts: N of them; each is a task of its own, with a as its instruction.
        end: id of the end token.
        counts: what was passed over on the way.
        multiple: to which lengths are padded.
    """

    def ended(parts: list[np.ndarray]) -> list[np.ndarray]:
        return [np.append(part, end) for part in parts]

    instruction_ids, instruction_mask = pad_ids(ended([cut.a for cut in cuts]), multiple)
    input_ids, attention_mask = pad_ids(ended([cut.b for cut in cuts]), multiple)
    names = [cut.id for cut in cuts]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=pad_labels(ended([cut.c for cut in cuts]), multiple),
        instruction_ids=instruction_ids,
        instruction_attention_mask=instruction_mask,
        task_index=torch.arange(len(names)),
        example_ids=names,
        tasks=list(names),
        units=list(names),
        counts=counts,
    )
