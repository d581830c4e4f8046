"""Estimates of how many tokens an example has, from how long its texts are: nothing of other ranks' share is encoded.

All ranks must come to the same estimates, so they are whole numbers throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

from tagi_ds.data.collate import Collator, Kind
from tagi_ds.data.examples import Extent, Task, extent_of
from tagi_ds.data.prompts import input_text

SAMPLED = 4
"""Examples of a task whose texts are encoded, once, for its tokens a byte: tasks of symbols have three times as many as
tasks of prose."""


class Extents:
    """Lengths of chunks in tokens: instructions' exact, inputs' and targets' estimated from bytes.

    Args:
        collator: makes the batches whose lengths are to be told.
    """

    def __init__(self, collator: Collator) -> None:
        self._collator = collator
        self._rates: dict[str, tuple[_Rate, _Rate]] = {}
        self._instructions: dict[tuple[str, int], int] = {}

    def __call__(self, task: Task, paraphrase: int, rows: Sequence[int]) -> tuple[int, int, int, int]:
        """What `deal` wants to know of a chunk: examples, and tokens of instruction, longest input, longest target.

        Args:
            task: the task.
            paraphrase: the wording of its instruction.
            rows: which of its examples, at least one.
        """
        config, form = self._collator.config, self._collator.form
        input_rate, target_rate = self._rates_of(task)
        instruction = self._instruction(task, paraphrase)
        extents = [extent_of(task.examples, row) for row in rows]
        given = max(input_rate.tokens(self._read(extent)) for extent in extents)
        if form == "concatenated" and not any(extent.rendered for extent in extents):
            given += instruction
        target = max(target_rate.tokens(extent.reference) for extent in extents)
        return (
            len(rows),
            instruction if form == "hypernetwork" else 0,
            min(given, config.max_source_tokens),
            min(target, config.max_target_tokens),
        )

    def _instruction(self, task: Task, paraphrase: int) -> int:
        """Tokens of an instruction; 0 where the model reads none."""
        if self._collator.form == "input_only":
            return 0
        key = task.name, paraphrase
        if key not in self._instructions:
            self._instructions[key] = len(self._collator.instruction_ids(task, paraphrase))
        return self._instructions[key]

    def _read(self, extent: Extent) -> int:
        """Bytes of an example beside the instruction and the prompt's own words."""
        return extent.rendered or extent.input if self._collator.form == "concatenated" else extent.input

    def _rates_of(self, task: Task) -> tuple[_Rate, _Rate]:
        found = self._rates.get(task.name)
        if found is None:
            found = self._rates[task.name] = self._measured(task)
        return found

    def _measured(self, task: Task) -> tuple[_Rate, _Rate]:
        config, collection = self._collator.config, task.collection
        rows = range(min(SAMPLED, len(task.examples)))
        examples = [task.examples[row] for row in rows]
        extents = [extent_of(task.examples, row) for row in rows]
        rendered = self._collator.form == "concatenated" and examples[0].rendered is not None
        bare = [input_text(example.input, config, collection) for example in examples]
        read = [example.rendered or text for example, text in zip(examples, bare, strict=True)] if rendered else bare
        # The prompt's own words, and the end token.
        frame = 1 if rendered else self._tokens(input_text("", config, collection), "input")
        targets = [example.references[0] for example in examples]
        sizes = [self._read(extent) for extent in extents]
        return (
            _Rate.of([self._tokens(text, "input") for text in read], sizes, frame, config.max_source_tokens),
            _Rate.of(
                [self._tokens(text, "target") for text in targets],
                [len(text.encode()) for text in targets],
                1,
                config.max_target_tokens,
            ),
        )

    def _tokens(self, text: str, kind: Kind) -> int:
        return len(self._collator.encode(text, kind))


class _Rate:
    """A line through some texts' lengths: `frame` tokens, and `tokens` more for every `size` bytes."""

    def __init__(self, frame: int, tokens: int, size: int) -> None:
        self._frame, self._tokens, self._size = frame, tokens, size

    @classmethod
    def of(cls, tokens: Sequence[int], sizes: Sequence[int], frame: int, limit: int) -> _Rate:
        """From texts that were not cut at the limit; where there are none, a token for four bytes, as in English."""
        whole = [(count - frame, size) for count, size in zip(tokens, sizes, strict=True) if count < limit and size]
        if not whole:
            return cls(frame, 1, 4)
        return cls(frame, max(1, sum(count for count, _ in whole)), sum(size for _, size in whole))

    def tokens(self, size: int) -> int:
        """Tokens of so many bytes, rounded up."""
        return self._frame - (-size * self._tokens // self._size)
