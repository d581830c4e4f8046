"""What became of a step's evaluation, noted beside the sealed files of its checkpoint.

A step is saved before it is evaluated, so that an evaluation that fails costs no steps. Its checkpoint then says that
the evaluation is to come, and a note in the same folder that it has come.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tagi_ds.files import read_json, write_json

NOTE = "evaluated.json"


def note_evaluated(checkpoint: Path, best: Mapping[str, float] | None) -> None:
    """Notes that the checkpoint's step has been evaluated, and the best value so far with its step."""
    write_json(checkpoint / NOTE, {"best": best})


def state_of(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`, its `run` as it is after the evaluation, if that has come.

    Raises:
        UserError: it cannot be read.
    """
    saved: dict[str, Any] = read_json(checkpoint / "state.json")
    if saved["run"].get("unevaluated") is not None and (checkpoint / NOTE).is_file():
        saved["run"] |= {"unevaluated": None, "best": read_json(checkpoint / NOTE)["best"]}
    return saved
