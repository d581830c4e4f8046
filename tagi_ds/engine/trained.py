"""What trained in a checkpoint of any strategy, for those who build models of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from tagi_ds.engine.full_state import WEIGHTS
from tagi_ds.engine.manifest import damage_of
from tagi_ds.engine.universal import open_state
from tagi_ds.errors import UserError
from tagi_ds.files import read_json


class TrainedParameters(Mapping[str, Tensor]):
    """Float32 values of what trained, by the module's parameter names; each is read when it is asked for.

    Attributes:
        shapes: by name.

    Args:
        checkpoint: of any strategy.
        checked: it was just found whole.

    Raises:
        UserError: the checkpoint is damaged.
    """

    def __init__(self, checkpoint: Path, checked: bool = False) -> None:
        damage = None if checked else damage_of(checkpoint)
        if damage is not None:
            raise UserError(f"checkpoint {checkpoint} is damaged: {damage}", "restore it, or train again")
        saved = read_json(checkpoint / "state.json")
        self.shapes = {name: tuple(shape) for name, shape in saved["trainable"].items()}
        self._state = open_state(checkpoint, saved)

    def __getitem__(self, name: str) -> Tensor:
        return self._state.tensor(WEIGHTS, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.names(WEIGHTS))

    def __len__(self) -> int:
        return len(self._state.names(WEIGHTS))


def read_trained_parameters(checkpoint: Path) -> dict[str, Tensor]:
    """All of :class:`TrainedParameters` at once.

    Raises:
        UserError: the checkpoint is damaged.
    """
    return dict(TrainedParameters(checkpoint))
