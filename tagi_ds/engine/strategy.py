"""What every way of running the steps offers: one process, ZeRO-2, ZeRO-3 or a pipeline."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine.distributed import Ranks
from tagi_ds.engine.full_state import FullState
from tagi_ds.engine.objective import Objective, Term, loss_share
from tagi_ds.errors import UserError
from tagi_ds.processes import replicas


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did.

    Attributes:
        learning_rate: of this step.
        grad_norm: global L2 norm before clipping; nan or inf where it is not finite.
        taken: False where the norm is not finite; parameters and optimizer are then as before.
    """

    learning_rate: float
    grad_norm: float
    taken: bool


@dataclass(frozen=True)
class Judged:
    """What a micro-batch came to: its terms and its share of the global loss, without their graph."""

    terms: dict[str, Term]
    share: Tensor


@dataclass(frozen=True)
class Replica:
    """A process's part in the division of the data.

    Attributes:
        index, count: which of how many shares of every global batch it works on.
        speaks: whether its counts and terms are those of that share; of a pipeline's stages, the last one alone does.
    """

    index: int
    count: int
    speaks: bool

    def spoken(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values, or zeros where another process speaks for this share: over all ranks each counts once."""
        return {name: value if self.speaks else 0.0 for name, value in values.items()}


class Strategy(ABC):
    """One way of running the steps.

    Order of use: build the model within `model_context`, set `requires_grad`, `prepare`; then, a step, `accumulate`
    and `step` once each. Parameters without `requires_grad` get neither gradient nor optimizer state.
    """

    name: str

    def __init__(self, engine: EngineConfig, ranks: Ranks) -> None:
        self.engine_config = engine
        self.ranks = ranks

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters that compute; masters of what trains are float32 in either case."""
        return torch.bfloat16 if self.engine_config.precision == "bf16" else torch.float32

    @property
    def replica(self) -> Replica:
        """Which share of the data this process works on."""
        return replica_of(self.engine_config, self.ranks)

    def model_context(self) -> AbstractContextManager[None]:
        """Within it the model is built or loaded; ZeRO-3 then holds it in shards from the start."""
        return contextlib.nullcontext()

    def construction(self) -> AbstractContextManager[None]:
        """Within it, inside of `model_context`, modules are made whose values come later (through `gathered`).

        ZeRO-3 shards each module's parameters as soon as it is made.
        """
        return contextlib.nullcontext()

    @property
    def held(self) -> Callable[[Any], Collection[nn.Parameter]] | None:
        """Chooses, of a model without values, the parameters that this process is to hold; None: it loads them all.

        A pipeline's processes hold their stage's.
        """
        return None

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it these parameters are whole; what is written to them on rank 0 is kept on every rank."""
        return contextlib.nullcontext()

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: OptimizerConfig, total_steps: int) -> None:
        """Takes the model over: device, precision, optimizer.

        Args:
            model: its parameters' `requires_grad` says what trains.
            total_steps: optimizer steps of the whole run, for the schedule.

        Raises:
            UserError: nothing trains, or the settings do not go together.
        """

    @property
    @abstractmethod
    def model(self) -> Callable[..., Any]:
        """What the objective calls."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The model itself; under ZeRO-3 its parameters are shards outside of a forward."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's share of the loss; over micro-batches and ranks shares are summed."""

    def accumulate(self, objective: Objective, batches: Sequence[Any], totals: Mapping[str, float]) -> list[Judged]:
        """Forward and backward passes of this step's micro-batches, in order; called on all ranks together.

        Args:
            totals: counts of the global batch, by which the terms are divided.
        """
        judged = []
        for batch in batches:
            terms = objective(self.model, batch.to(self.ranks.device))
            share = loss_share(terms, totals)
            self.backward(share)
            judged.append(Judged(detached(terms), share.detach()))
        return judged

    @torch.no_grad()
    def evaluate(self, objective: Objective, batches: Sequence[Any]) -> list[dict[str, Term]]:
        """Terms of batches, without gradients; called on all ranks together, with equally many batches."""
        return [objective(self.model, batch.to(self.ranks.device)) for batch in batches]

    @torch.no_grad()
    def encode_instructions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the backbone's encoder makes of instructions; called on all ranks together, equally often.

        Args:
            ids, mask: (U, S) int64 on this process's device; each replica has instructions of its own.

        Returns:
            (U, S, d), in the type that computes.
        """
        module: Any = self.module
        encoded: Tensor = module.encode_instructions(ids, mask)
        return encoded

    @abstractmethod
    def step(self, step: int) -> StepOutcome:
        """Clips, steps the optimizer at the schedule's rate and clears the gradients.

        Args:
            step: optimizer steps taken before this one.
        """

    def gradient_shares(self) -> dict[str, Tensor] | None:
        """This process's share of the summed gradient of each parameter that trains, by name, before the step is taken.

        Over all processes every element comes once. None where the gradient does not lie in memory.
        """
        return None

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Writes what trains and the optimizer's state into an existing folder; called on every rank.

        Returns:
            The files that this process wrote.

        Raises:
            UserError: this process could not write one; the others have not been left to wait for it.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; the folder's manifest has been verified before."""

    def load_full(self, full: FullState) -> bool:
        """Reads what a run of any strategy and number of processes saved; called on every rank.

        Args:
            full: of exactly the parameters that train.

        Returns:
            Whether the optimizer's state was taken over; False where the saved one is of another kind.

        Raises:
            UserError: this strategy resumes from its own layout alone.
        """
        raise UserError(
            f"engine.strategy {self.name} resumes only from a checkpoint of its own layout, not from {full.folder}",
            "choose single, zero2 or zero3, or resume with the saved layout",
        )

    def partition(self) -> str:
        """How what `save` writes is divided; what was written under another division is read by `load_full` alone."""
        return ""

    def trainable_shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter that trains, by its name; the checkpoint's fingerprint."""
        return {
            name: list(full_shape(parameter))
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        }


def replica_of(engine: EngineConfig, ranks: Ranks) -> Replica:
    """This process's share of the data. Stage by stage, the ranks of a pipeline count its replicas.

    Raises:
        UserError: the stages do not divide the processes.
    """
    if engine.strategy != "pipeline":
        return Replica(ranks.rank, ranks.world_size, True)
    count = replicas(engine, ranks.world_size)
    return Replica(ranks.rank % count, count, ranks.rank // count == engine.stages - 1)


def detached(terms: Mapping[str, Term]) -> dict[str, Term]:
    """The terms without their graph."""
    return {name: replace(term, value=term.value.detach()) for name, term in terms.items()}


def make_strategy(engine: EngineConfig, ranks: Ranks) -> Strategy:
    """The strategy that `engine.strategy` names.

    Raises:
        UserError: `single` with several processes, stages that do not divide them, or a DeepSpeed JSON that
            contradicts the run.
    """
    if engine.strategy == "single":
        from tagi_ds.engine.single import SingleStrategy

        return SingleStrategy(engine, ranks)
    if engine.strategy == "pipeline":
        from tagi_ds.engine.pipeline import PipelineStrategy

        return PipelineStrategy(engine, ranks)
    from tagi_ds.engine.zero import ZeroStrategy

    return ZeroStrategy(engine, ranks)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def decay_groups(parameters: list[tuple[Tensor, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay, 1-D parameters (norms, biases) do not.

    Args:
        parameters: (model's parameter, the tensor that the optimizer steps) of what trains.

    Raises:
        UserError: there are none.
    """
    if not parameters:
        raise UserError("no parameter trains", "set model.also_train, or a method with a hypernetwork")
    decayed = [stepped for own, stepped in parameters if len(full_shape(own)) > 1]
    kept = [stepped for own, stepped in parameters if len(full_shape(own)) <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
