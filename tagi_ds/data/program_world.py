"""The embedded benchmark's world: records of words, and the operations that rewrite them.

A record is three to five words, one a field, in the fields' fixed order with some missing, so that a word's
class tells what its position would. A program is one or two steps; a step is an operation with its arguments.
Where a step names a field, the record's first word of that field is meant; without one the step changes nothing.
"""

from __future__ import annotations

import random

from tagi_ds.data.program_operations import OPERATIONS, Operation, Program, Step, Words

_WORDS = """
size: tiny small little short medium large big huge giant narrow wide thin thick tall
colour: red blue green yellow black white grey brown pink purple orange golden silver violet
shape: round square oval flat curved pointed hollow bent twisted straight curly crooked ribbed spiral
stuff: wood stone glass iron paper cotton leather plastic rubber clay wool copper silk marble
thing: box cup chair lamp ball key clock spoon basket bottle mirror ring plate bell
place: kitchen garden cellar attic garage office library school station market harbour church museum hotel
"""

FIELDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split()) for name, words in (row.split(": ") for row in _WORDS.strip().splitlines())
}
"""Each field's words, in the fields' order within a record."""

FIELD_OF: dict[str, str] = {word: name for name, words in FIELDS.items() for word in words}
"""The field of each word."""

JOINTS = ("first {x}, then {y}", "{x}, and then {y}", "{x}, after that {y}")
"""Wordings of a composition."""


def every_step(operation: Operation) -> list[Step]:
    """The operation with each of its possible arguments, in a fixed order."""
    names = list(FIELDS)
    arguments: dict[str, list[tuple[tuple[str, ...], str]]] = {
        "none": [((), "")],
        "field": [((f,), "") for f in names],
        "pair": [((f, g), "") for i, f in enumerate(names) for g in names[i + 1 :]],
        "fields": [((f, g), "") for f in names for g in names if f != g],
        "word": [((), v) for v in FIELD_OF],
        "word_of_field": [((FIELD_OF[v],), v) for v in FIELD_OF],
        "word_and_field": [((f,), v) for v in FIELD_OF for f in names],
    }
    return [Step(operation.name, fields, word) for fields, word in arguments[operation.arguments]]


def apply_step(step: Step, words: Words) -> Words:
    """The record after one step."""
    positions = []
    for name in step.fields:
        position = next((i for i, word in enumerate(words) if FIELD_OF.get(word) == name), None)
        if position is None:
            return words
        positions.append(position)
    return OPERATIONS[step.operation].apply(words, tuple(positions), step) if words else words


def run_program(program: Program, words: Words) -> Words:
    """The record after all steps."""
    for step in program:
        words = apply_step(step, words)
    return words


def word_step(step: Step, paraphrase: int) -> str:
    """One of a step's three wordings."""
    names = dict(zip("fg", step.fields, strict=False))
    return OPERATIONS[step.operation].wordings[paraphrase].format(**names, v=step.word)


def word_program(program: Program) -> list[str]:
    """A program's three wordings; a composition's steps are worded independently of each other."""
    if len(program) == 1:
        return [word_step(program[0], i) for i in range(3)]
    choice = random.Random(repr(program))
    firsts, seconds = choice.sample(range(3), 3), choice.sample(range(3), 3)
    return [JOINTS[i].format(x=word_step(program[0], firsts[i]), y=word_step(program[1], seconds[i])) for i in range(3)]


def draw_record(rng: random.Random, needed: set[str]) -> Words:
    """A random record of three to five words that has the needed fields (at most five)."""
    # Half a million records are drawn for one benchmark: `random()` is several times faster than `choice`.
    draw = rng.random
    others = [name for name in FIELDS if name not in needed]
    for _ in range(len(FIELDS) - max(3 + int(3 * draw()), len(needed))):
        others.pop(int(len(others) * draw()))
    return tuple(words[int(len(words) * draw())] for name, words in FIELDS.items() if name in needed or name in others)


def draw_inputs(program: Program, rng: random.Random, count: int) -> list[Words] | None:
    """Distinct records on which every step of the program shows, or None where there are hardly any.

    A composition differs from each of its steps alone on all of them, and the second step's fields are
    unambiguous: the record in between has one word of each.
    """
    found: dict[Words, None] = {}
    needed = set(program[0].fields)
    if len(program) == 2:
        supplied = FIELD_OF.get(program[0].word)
        needed |= {name for name in program[1].fields if name != supplied}
    if len(needed) > 5:
        return None
    for attempt in range(30 * count):
        if attempt == 200 and len(found) < 5:
            return None
        record = draw_record(rng, needed)
        if record not in found and _shows(program, record):
            found[record] = None
            if len(found) == count:
                return list(found)
    return None


def _shows(program: Program, record: Words) -> bool:
    between = apply_step(program[0], record)
    if between == record or not between:
        return False
    if len(program) == 1:
        return True
    classes = [FIELD_OF.get(word) for word in between]
    if any(classes.count(name) != 1 for name in program[1].fields):
        return False
    result = apply_step(program[1], between)
    return bool(result) and result not in (between, record, apply_step(program[1], record))
