"""What a batch learns from the stores: attached before the step, read by the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tagi_ds.config import LossConfig
from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError
from tagi_ds.teachers.logit_store import LogitStore
from tagi_ds.teachers.parameter_store import ParameterStore


class Distillation:
    """Attaches ``batch.teacher["distributions"]`` and ``batch.teacher["adapters"]`` to batches.

    Args:
        logits: the logit store, or None.
        parameters: the parameter store, or None.
        missing: ``error`` or ``label_only``: what happens to examples and units that the stores lack.
    """

    def __init__(self, logits: LogitStore | None, parameters: ParameterStore | None, config: LossConfig) -> None:
        self.logits, self.parameters, self.missing = logits, parameters, config.missing

    def attach(self, batch: Batch) -> Batch:
        """The same batch with what its examples' and units' teachers say.

        Raises:
            UserError: something is missing and the policy is ``error``.
        """
        if self.logits is not None:
            distributions = self.logits.read(batch.example_ids, batch.labels)
            self._require(distributions.present, batch.example_ids, self.logits)
            batch.teacher["distributions"] = distributions
        if self.parameters is not None:
            adapters, present = self.parameters.read(batch.units)
            self._require(present, batch.units, self.parameters)
            batch.teacher["adapters"] = (adapters, present)
        return batch

    def _require(self, present: Any, names: list[str], store: LogitStore | ParameterStore) -> None:
        if self.missing == "label_only" or bool(present.all()):
            return
        name = names[int((~present).nonzero()[0])]
        raise UserError(
            f"the store {store.folder} lacks {name!r}",
            "complete the store, or set --loss.missing label_only to learn such examples from their labels alone",
        )


class DistilledSource:
    """A source of batches whose batches carry what the stores hold; its state is the inner source's.

    Args:
        source: has ``next_step``, ``state_dict`` and ``load_state_dict``.
        attach: of :class:`Distillation`.
    """

    def __init__(self, source: Any, attach: Callable[[Batch], Batch]) -> None:
        self.source, self.attach = source, attach

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step, each with its teachers."""
        return [self.attach(batch) for batch in self.source.next_step()]

    def state_dict(self) -> dict[str, Any]:
        """The inner source's state."""
        state: dict[str, Any] = self.source.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the inner source."""
        self.source.load_state_dict(state)
