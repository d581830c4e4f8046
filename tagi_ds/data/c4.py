"""Documents in C4's format, cut into a | b | c for hypernetwork pretraining.

a goes to the hypernetwork, b to the backbone, and c is predicted. Shards are read in a streaming way, one row after
the other; their order is permuted anew in every epoch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import pad_ids, pad_labels
from tagi_ds.data.examples import Batch
from tagi_ds.data.order import Share, check_state, generator, permutation
from tagi_ds.errors import UserError

_CHARACTERS_A_TOKEN = 32


@dataclass(frozen=True)
class Cut:
    """One document's three parts: token ids without end tokens."""

    id: str
    a: list[int]
    b: list[int]
    c: list[int]


def shards_of(folder: str | Path) -> list[Path]:
    """The shards (*.json.gz, *.jsonl, *.json) anywhere under a folder, sorted.

    Raises:
        UserError: the folder is missing or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the corpus folder {folder} is missing", "check --data.c4_dir")
    found = sorted(p for pattern in ("*.json.gz", "*.jsonl", "*.json") for p in folder.rglob(pattern))
    if not found:
        raise UserError(f"{folder} holds no shard (*.json.gz, *.jsonl, *.json)", "check --data.c4_dir")
    return found


def documents(folder: str | Path) -> Iterator[str]:
    """The texts of a corpus, shard by shard in the order of their names.

    Raises:
        UserError: no shards, or a malformed row.
    """
    for path in shards_of(folder):
        for _, text in _rows(path, 0):
            yield text


def cut_points(length: int, least: int, document: str, seed: int) -> tuple[int, int]:
    """Where a document of `length` tokens is cut: uniform over all cuts whose parts have at least `least` tokens."""
    slack = length - 3 * least
    first, second = sorted(generator(seed, "cut", document).choice(slack + 2, size=2, replace=False))
    return least + int(first), 2 * least + int(second) - 1


class DocumentMixture:
    """Deals out cut documents; the same interface as `TaskMixture`, with one document in the place of a chunk.

    Every rank reads the whole stream and keeps its slice, so the global batch does not depend on the ranks.
    Documents with fewer than three times `min_part_tokens` tokens are skipped.

    Args:
        folder: holds the shards.
        tokenizer: with an end token, which ends each of a, b and c.
        config: `tasks_per_batch` documents a global batch, `document_tokens`, `min_part_tokens`.
        seed: of the shards' order and of the cuts.
        rank, world_size, accumulation: which share of the global batch `next_step` returns.

    Raises:
        UserError: no shards, a malformed row (when it is read), no document long enough, or a global batch that
            cannot be dealt evenly.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        if config.min_part_tokens < 1 or config.document_tokens < 3 * config.min_part_tokens:
            raise UserError(
                f"data.document_tokens = {config.document_tokens} has no room for three parts of "
                f"data.min_part_tokens = {config.min_part_tokens}",
                "raise data.document_tokens or lower data.min_part_tokens (at least 1)",
            )
        self._folder = Path(folder)
        self._shards = shards_of(folder)
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._share = Share(config.tasks_per_batch, rank, world_size, accumulation)
        self._step = 0
        self._position = {"epoch": 0, "shard": 0, "row": 0, "skipped": 0}
        self._stream: Iterator[Cut] | None = None

    @property
    def step(self) -> int:
        """Global batches dealt out so far."""
        return self._step

    @property
    def epoch(self) -> float:
        """Epochs read so far, in whole shards."""
        return self._position["epoch"] + self._position["shard"] / len(self._shards)

    @property
    def skipped(self) -> int:
        """Documents passed over because they were too short."""
        return self._position["skipped"]

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        if self._stream is None:
            self._stream = self._cuts()
        batch = [next(self._stream) for _ in range(self._config.tasks_per_batch)]
        self._step += 1
        return [self._collate(part) for part in self._share.of(batch)]

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, shard in that epoch's order, row; and what it is a position in."""
        return {"step": self._step, **self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; only the begun shard's earlier rows are passed over.

        Raises:
            UserError: the state was taken over another corpus, another seed or another global batch.
        """
        check_state(state, self._identity())
        self._step = int(state["step"])
        self._position = {name: int(state[name]) for name in self._position}
        self._stream = None

    def _identity(self) -> dict[str, Any]:
        listing = [(str(shard.relative_to(self._folder)), shard.stat().st_size) for shard in self._shards]
        return {
            "data": hashlib.sha256(repr(listing).encode()).hexdigest(),
            "seed": self._seed,
            "tasks_per_batch": self._config.tasks_per_batch,
            "document_tokens": self._config.document_tokens,
            "min_part_tokens": self._config.min_part_tokens,
        }

    def _cuts(self) -> Iterator[Cut]:
        """Cut documents from the position on, without end; the position moves with them."""
        at = self._position
        found = at["row"] > 0 or at["shard"] > 0
        while True:
            order = permutation(len(self._shards), self._seed, "shards", at["epoch"])
            while at["shard"] < len(order):
                path = self._shards[order[at["shard"]]]
                for row, text in _rows(path, at["row"]):
                    at["row"] = row + 1
                    cut = self._cut(f"{path.relative_to(self._folder).as_posix()}:{row}", text)
                    if cut is None:
                        at["skipped"] += 1
                    else:
                        found = True
                        yield cut
                at["shard"] += 1
                at["row"] = 0
            if not found:
                raise UserError(
                    f"no document in {self._folder} has {3 * self._config.min_part_tokens} tokens",
                    "lower --data.min_part_tokens or give longer documents",
                )
            at["epoch"] += 1
            at["shard"] = 0

    def _cut(self, document: str, text: str) -> Cut | None:
        limit, least = self._config.document_tokens, self._config.min_part_tokens
        # Tokenising a book for its first thousand tokens would be waste.
        text = text[: limit * _CHARACTERS_A_TOKEN]
        ids = self._tokenizer(text, add_special_tokens=False, truncation=True, max_length=limit)["input_ids"]
        if len(ids) < 3 * least:
            return None
        i, j = cut_points(len(ids), least, document, self._seed)
        return Cut(document, ids[:i], ids[i:j], ids[j:])

    def _collate(self, cuts: Any) -> Batch:
        end = self._tokenizer.eos_token_id

        def ended(parts: list[list[int]]) -> list[np.ndarray]:
            return [np.array([*part, end]) for part in parts]

        instruction_ids, instruction_mask = pad_ids(ended([cut.a for cut in cuts]))
        input_ids, attention_mask = pad_ids(ended([cut.b for cut in cuts]))
        names = [cut.id for cut in cuts]
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=pad_labels(ended([cut.c for cut in cuts])),
            instruction_ids=instruction_ids,
            instruction_attention_mask=instruction_mask,
            task_index=torch.arange(len(names)),
            example_ids=names,
            tasks=list(names),
            units=list(names),
        )


def _rows(path: Path, first: int) -> Iterator[tuple[int, str]]:
    """(row, text) of a shard from row `first` on; rows count from 0, as the lines of the file."""
    mend = "each line must be a JSON object with a string `text`; fetch the shard again"
    row = first
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for row, line in enumerate(lines):
                if row < first or not line.strip():
                    continue
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError("`text` is not a string")
                yield row, text
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: row {row} is malformed ({type(error).__name__}: {error})", mend) from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read near row {row}: {error}", mend) from error
