"""Documents in C4's format as batches a | b | c: the reading of lanes, here or in worker processes.

The order is that of :mod:`tagi_ds.data.lanes`, the cuts are :mod:`tagi_ds.data.cuts`'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.corpus import blocks, documents, shards_of, text_of
from tagi_ds.data.cuts import Cut, Cutter, batch_of, cut_points
from tagi_ds.data.dealing import deal
from tagi_ds.data.drawing import Corpus, Drawn
from tagi_ds.data.examples import Batch
from tagi_ds.data.lanes import LaneState, Order, first_states, redealt, units_read
from tagi_ds.data.loader import Ahead
from tagi_ds.data.order import Share, check_state
from tagi_ds.errors import UserError

__all__ = ["Cut", "DocumentMixture", "cut_points", "documents", "recompute", "shards_of"]


class DocumentMixture:
    """Deals out cut documents; the same interface as `TaskMixture`, with one document in the place of a chunk.

    Document j of every global batch comes from lane j, so a rank reads the shards of its own lanes only, and the global
    batch depends neither on the ranks nor on micro-batches and workers. Each rank deals its own documents to its
    micro-batches by length. Documents with fewer than three times `min_part_tokens` tokens are passed over, and counted
    in `Batch.counts`, as malformed rows are.

    Args:
        address: folder or address that holds the shards.
        tokenizer: with an end token, which ends each of a, b and c.
        config: `tasks_per_batch` documents a global batch, `documents`, `document_tokens`, `min_part_tokens`,
            `shuffle_block`, `malformed`, `workers`, `dealing`, `pad_multiple`.
        seed: of the order and of the cuts.
        rank, world_size, accumulation: which share of the global batch `next_step` returns.

    Raises:
        UserError: no shards, a malformed row (when it is read), no document long enough, or a global batch that
            cannot be dealt evenly.
    """

    def __init__(
        self,
        address: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        self._cutter = Cutter(tokenizer, config, seed)
        self._slots = Share(config.tasks_per_batch, rank, world_size, accumulation).of(range(config.tasks_per_batch))
        self._address, self._config, self._seed = address, config, seed
        self._end = tokenizer.eos_token_id
        self._shards = shards_of(address)
        self._lanes = config.tasks_per_batch
        self._parts = -(-self._lanes // len(self._shards))
        self._step = 0
        self._states: dict[int, dict[str, Any]] = {}
        self._take([state.as_json() for state in first_states(self._lanes)])
        self._ahead: Ahead[list[Drawn]] | None = None

    @property
    def step(self) -> int:
        """Global batches dealt out so far."""
        return self._step

    @property
    def epoch(self) -> float:
        """Epochs read so far, in whole units of the order, as this rank's lanes tell."""
        states = {lane: LaneState.from_json(state) for lane, state in self._states.items()}
        return units_read(states, self._lanes) / (len(self._shards) * self._parts)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        drawn, multiple = self.draw_step(), self._config.pad_multiple
        batches = []
        for slots in self._dealt(drawn):
            counts = sum((Counter(drawn[slot].counts) for slot in slots), Counter())
            batches.append(batch_of([drawn[slot].cut for slot in slots], self._end, dict(counts), multiple))
        return batches

    def _dealt(self, drawn: dict[int, Drawn]) -> list[Sequence[int]]:
        """Which documents are in each micro-batch; those of other ranks are not known, and stay theirs."""
        if self._config.dealing == "order":
            return self._slots
        slots = [slot for part in self._slots for slot in part]
        cuts = [drawn[slot].cut for slot in slots]
        lengths = np.array([(1, len(cut.a) + 1, len(cut.b) + 1, len(cut.c) + 1) for cut in cuts])
        (mine,) = deal(lengths, 1, len(self._slots), self._config.pad_multiple)
        return [[slots[place] for place in part] for part in mine]

    def draw_step(self) -> dict[int, Drawn]:
        """This rank's examples of the next global batch, by their places in it, before they are made a batch."""
        workers = min(self._config.workers, len(self._states))
        if self._ahead is None:
            order = Order(len(self._shards), self._parts, self._seed)
            corpus = Corpus(self._address, self._shards, order, self._cutter, self._config)
            self._ahead = Ahead(partial(corpus.drawing, self._states, self._lanes), workers)
        # One item of each worker makes a step, so what a worker prepared beyond it is in no state.
        try:
            drawn = {entry.lane: entry for _ in range(max(1, workers)) for entry in next(self._ahead)}
        except UserError:
            self.close()
            raise
        self._states = {lane: entry.state for lane, entry in drawn.items()}
        self._step += 1
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the position: those of its lanes; and what it is a position in."""
        lanes = {str(lane): state for lane, state in sorted(self._states.items())}
        return {"step": self._step, "parts": self._parts, "all_lanes": self._lanes, "lanes": lanes, **self._identity()}

    def join(self, shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The run's position, from the shares of all its ranks.

        Raises:
            RuntimeError: they are not of one step of one run.
        """
        lanes = {lane: state for share in shares for lane, state in share["lanes"].items()}
        rests = [{**share, "lanes": None} for share in shares]
        if any(rest != rests[0] for rest in rests) or len(lanes) != rests[0]["all_lanes"]:
            raise RuntimeError("the ranks' data positions are not of one step of one run")
        return {**rests[0], "lanes": {str(lane): lanes[str(lane)] for lane in range(len(lanes))}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position of all ranks; of a begun shard the earlier rows are passed over, no others.

        The run may have another number of ranks, micro-batches and workers than the saved one: its global batches are
        then the same. With another `tasks_per_batch` exactly what was left is dealt anew, so every document still
        comes once an epoch.

        Raises:
            UserError: the state was taken over another corpus, another seed or other cuts.
        """
        check_state(state, self._identity())
        lanes = [LaneState.from_json(state["lanes"][str(lane)]) for lane in range(int(state["all_lanes"]))]
        if len(lanes) != self._lanes:
            lanes = redealt(lanes, self._lanes)
        self.close()
        self._step, self._parts = int(state["step"]), int(state["parts"])
        self._take([lane.as_json() for lane in lanes])

    def close(self) -> None:
        """Ends the worker processes, if there are any; the next step starts new ones."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _take(self, states: list[dict[str, Any]]) -> None:
        self._states = {lane: states[lane] for slots in self._slots for lane in slots}

    def _identity(self) -> dict[str, Any]:
        listing = [(shard.name, shard.size) for shard in self._shards]
        config = self._config
        return {
            "data": hashlib.sha256(repr(listing).encode()).hexdigest(),
            "seed": self._seed,
            "documents": config.documents,
            "document_tokens": config.document_tokens,
            "min_part_tokens": config.min_part_tokens,
            "shuffle_block": config.shuffle_block,
        }


def recompute(name: str, address: str | Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int) -> Cut:
    """The example of an id (`Batch.example_ids`), from the id and the run's settings alone.

    Args:
        name: the id.
        address, tokenizer, config, seed: as given to `DocumentMixture`.

    Raises:
        UserError: the corpus has no such example.
    """
    cutter = Cutter(tokenizer, config, seed)
    shard_name, row, window = cutter.place(name)
    missing = UserError(f"{address} has no example {name}", "check the id, --data.c4_dir and the data section")
    shard = next((shard for shard in shards_of(address) if shard.name == shard_name), None)
    if shard is None:
        raise missing
    size = config.shuffle_block
    block = next(blocks(shard, size, row // size), None)
    text = text_of(block.rows[row % size]) if block is not None and row % size < len(block.rows) else None
    ids = cutter.tokens(text) if isinstance(text, str) else None
    if ids is None or window >= cutter.windows(ids):
        raise missing
    return cutter.cut(shard.name, row, ids, window)
