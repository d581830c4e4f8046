"""When a process that gives no sign of life counts as dead."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch.distributed as dist

from tagi_ds.engine import watch
from tagi_ds.engine.ending import Ending
from tagi_ds.engine.signs import Sign

SIGN = Sign(7, "step 4", "x.py:1 (f)", {}, 0.0)


class Listening(watch.Watch):
    """Rank 0's watch over a rank 1 whose signs the test gives, looked through by hand."""

    def __init__(self) -> None:
        self.server = dist.HashStore()
        super().__init__(0, 2, self.server, 1800)
        self.stop()

    def sign(self, sign: Sign) -> None:
        self.server.set("tagi_ds/watch/1", json.dumps(asdict(sign)))

    def look(self, later_s: float) -> None:
        """As if so many seconds had passed since the last look."""
        self._looked_at = time.monotonic() - later_s
        self._look_for_signs()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Ending, "declare", lambda self, status, text, lost: found.append((status, text, lost)))
    return found


def test_a_minute_without_a_sign_is_death(said: list[tuple[Any, ...]]) -> None:
    listening = Listening()
    listening.sign(SIGN)
    for _ in range(12):
        listening.look(5.1)
    assert not said
    listening.look(5.1)
    assert [(status, lost) for status, _, lost in said] == [(1, [1])]
    assert "error: rank 1 (last seen at step 4) of this run has ended or does not answer" in said[0][1]


@pytest.mark.parametrize("left", [False, True])
def test_a_rank_that_gives_signs_or_has_left_is_not_dead(left: bool, said: list[tuple[Any, ...]]) -> None:
    listening = Listening()
    for beat in range(40):
        listening.sign(Sign(1 if left else 1 + beat // 10, "step 4", "x.py:1 (f)", {}, 0.0, left))
        listening.look(5.1)
    assert not said


def test_who_was_asleep_himself_listens_anew(said: list[tuple[Any, ...]]) -> None:
    """A suspended job: all of its processes are silent meanwhile."""
    listening = Listening()
    listening.sign(SIGN)
    listening.look(5.1)
    listening.look(3600)
    assert not said
