"""The operations on records: how each is worded, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Words = tuple[str, ...]


@dataclass(frozen=True, order=True)
class Step:
    """An operation with its arguments: the fields it names, and its word or the empty string."""

    operation: str
    fields: tuple[str, ...] = ()
    word: str = ""


Program = tuple[Step, ...]


@dataclass(frozen=True)
class Operation:
    """How a step is worded, and what it does.

    Attributes:
        name: unique.
        family: what kind of change it is; compositions are categorised by their steps' families.
        arguments: `none`, `field`, `pair` (unordered), `fields` (ordered), `word`, `word_of_field` (the word's
            own field is named) or `word_and_field`.
        wordings: three paraphrases with {f}, {g} for the fields and {v} for the word.
        apply: (record, positions of the named fields, step) -> new record; called only if all fields are there.
    """

    name: str
    family: str
    arguments: str
    wordings: tuple[str, ...]
    apply: Callable[[Words, tuple[int, ...], Step], Words]


def _without(words: Words, at: int) -> Words:
    return words[:at] + words[at + 1 :]


def _exchanged(words: Words, i: int, j: int) -> Words:
    changed = list(words)
    changed[i], changed[j] = changed[j], changed[i]
    return tuple(changed)


def _moved(words: Words, i: int, j: int, behind: int) -> Words:
    """The word at i directly before (behind=0) or after (behind=1) the word at j."""
    rest = _without(words, i)
    target = j - (i < j) + behind
    return (*rest[:target], words[i], *rest[target:])


_TABLE: list[tuple[str, str, str, str, Callable[[Words, tuple[int, ...], Step], Words]]] = [
    (
        "reverse",
        "order",
        "none",
        "write the words in reverse order | turn the words around | write the words backwards",
        lambda w, p, s: w[::-1],
    ),
    (
        "first_to_end",
        "order",
        "none",
        "move the first word to the end | put the first word last | end with the first word",
        lambda w, p, s: w[1:] + w[:1],
    ),
    (
        "last_to_front",
        "order",
        "none",
        "move the last word to the front | put the last word first | start with the last word",
        lambda w, p, s: w[-1:] + w[:-1],
    ),
    (
        "swap_ends",
        "order",
        "none",
        "swap the first and the last word | exchange the first word with the last word | "
        "let the first and the last word change seats",
        lambda w, p, s: _exchanged(w, 0, len(w) - 1),
    ),
    (
        "delete_first",
        "remove",
        "none",
        "delete the first word | remove the first word | leave out the first word",
        lambda w, p, s: w[1:],
    ),
    (
        "delete_last",
        "remove",
        "none",
        "delete the last word | remove the last word | leave out the last word",
        lambda w, p, s: w[:-1],
    ),
    (
        "double_first",
        "copy",
        "none",
        "double the first word | write the first word twice | repeat the first word",
        lambda w, p, s: w[:1] + w,
    ),
    (
        "double_last",
        "copy",
        "none",
        "double the last word | write the last word twice | repeat the last word",
        lambda w, p, s: w + w[-1:],
    ),
    (
        "field_to_front",
        "move",
        "field",
        "move the {f} to the front | put the {f} first | start with the {f}",
        lambda w, p, s: (w[p[0]], *_without(w, p[0])),
    ),
    (
        "field_to_end",
        "move",
        "field",
        "move the {f} to the end | put the {f} last | end with the {f}",
        lambda w, p, s: (*_without(w, p[0]), w[p[0]]),
    ),
    (
        "delete_field",
        "remove",
        "field",
        "delete the {f} | remove the {f} | leave out the {f}",
        lambda w, p, s: _without(w, p[0]),
    ),
    (
        "keep_field",
        "keep",
        "field",
        "keep only the {f} | answer with the {f} alone | drop everything but the {f}",
        lambda w, p, s: (w[p[0]],),
    ),
    (
        "double_field",
        "copy",
        "field",
        "double the {f} | write the {f} twice | repeat the {f}",
        lambda w, p, s: w[: p[0] + 1] + w[p[0] :],
    ),
    (
        "cut_before",
        "remove",
        "field",
        "delete everything before the {f} | remove what comes before the {f} | begin only at the {f}",
        lambda w, p, s: w[p[0] :],
    ),
    (
        "cut_after",
        "remove",
        "field",
        "delete everything after the {f} | remove what comes after the {f} | stop right after the {f}",
        lambda w, p, s: w[: p[0] + 1],
    ),
    (
        "name_field",
        "write",
        "field",
        "replace the {f} by its name | write the name of the {f} over the {f} | "
        "give the name of the {f} instead of the {f}",
        lambda w, p, s: w[: p[0]] + s.fields + w[p[0] + 1 :],
    ),
    (
        "swap_fields",
        "order",
        "pair",
        "swap the {f} and the {g} | exchange the {f} with the {g} | let the {f} and the {g} change seats",
        lambda w, p, s: _exchanged(w, p[0], p[1]),
    ),
    (
        "keep_fields",
        "keep",
        "pair",
        "keep only the {f} and the {g} | answer with the {f} and the {g} alone | "
        "drop everything but the {f} and the {g}",
        lambda w, p, s: tuple(w[i] for i in sorted(p)),
    ),
    (
        "move_before",
        "move",
        "fields",
        "move the {f} before the {g} | put the {f} right before the {g} | bring the {f} in front of the {g}",
        lambda w, p, s: _moved(w, p[0], p[1], 0),
    ),
    (
        "move_after",
        "move",
        "fields",
        "move the {f} after the {g} | put the {f} right after the {g} | bring the {f} behind the {g}",
        lambda w, p, s: _moved(w, p[0], p[1], 1),
    ),
    (
        "copy_over",
        "copy",
        "fields",
        "replace the {f} by the {g} | write the {g} over the {f} | give the {g} instead of the {f}",
        lambda w, p, s: (*w[: p[0]], w[p[1]], *w[p[0] + 1 :]),
    ),
    (
        "set_field",
        "write",
        "word_of_field",
        "set the {f} to {v} | make the {f} {v} | change the {f} to {v}",
        lambda w, p, s: (*w[: p[0]], s.word, *w[p[0] + 1 :]),
    ),
    (
        "insert_before",
        "write",
        "word_and_field",
        "insert {v} before the {f} | write {v} right before the {f} | add {v} in front of the {f}",
        lambda w, p, s: (*w[: p[0]], s.word, *w[p[0] :]),
    ),
    (
        "insert_after",
        "write",
        "word_and_field",
        "insert {v} after the {f} | write {v} right after the {f} | add {v} behind the {f}",
        lambda w, p, s: (*w[: p[0] + 1], s.word, *w[p[0] + 1 :]),
    ),
    (
        "word_to_front",
        "write",
        "word",
        "put {v} at the front | write {v} first | start with {v}",
        lambda w, p, s: (s.word, *w),
    ),
    (
        "word_to_end",
        "write",
        "word",
        "put {v} at the end | write {v} last | end with {v}",
        lambda w, p, s: (*w, s.word),
    ),
]


OPERATIONS: dict[str, Operation] = {
    name: Operation(name, family, arguments, tuple(wordings.split(" | ")), apply)
    for name, family, arguments, wordings, apply in _TABLE
}
"""Every operation by its name."""
