"""Pipeline parallelism through DeepSpeed: stages of layers, data-parallel replicas beside them, ZeRO-1 inside.

A step is a pass without gradients that encodes the instructions (the first layer's adapters need the encoder's last
output), then DeepSpeed's 1F1B schedule over the micro-batches. Every stage reads its replica's batches itself, so that
hidden states and the alignment's errors are all that travels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import deepspeed_config
from tagi_ds.engine.disk import together
from tagi_ds.engine.distributed import Ranks, gather_objects
from tagi_ds.engine.full_state import FullState
from tagi_ds.engine.objective import Objective, StagedObjective, Term, loss_share
from tagi_ds.engine.pipeline_state import join_stages, load_stage, save_stage, stage_folder
from tagi_ds.engine.schedule import learning_rate
from tagi_ds.engine.strategy import Judged, StepOutcome, Strategy, decay_groups, detached
from tagi_ds.engine.zero import import_deepspeed, initialize, require_adamw, shares_of
from tagi_ds.errors import UserError
from tagi_ds.model.head import Figures, Reader
from tagi_ds.model.payload import MicroBatch
from tagi_ds.plan.stages import balance


class PipelineStrategy(Strategy):
    """DeepSpeed's pipeline engine with ZeRO stage 1.

    The model offers `stage_units()` and, where known, `stage_costs`: what each unit costs, in any measure.
    """

    name = "pipeline"

    def __init__(self, engine: EngineConfig, ranks: Ranks) -> None:
        super().__init__(engine, ranks)
        # Both are checked before anything is loaded.
        self._replicas = self.replica.count
        deepspeed_config.build(engine, self._replicas, clip=0.0)
        import_deepspeed(ranks)
        self._terms: dict[int, tuple[Objective, list[tuple[str, str | None, float]]]] = {}

    @property
    def held(self) -> Callable[[Any], Collection[nn.Parameter]]:
        """See `Strategy.held`."""
        return self._parameters_of_stage

    def _parameters_of_stage(self, model: Any) -> list[nn.Parameter]:
        units, cut = model.stage_units(), self._cut(model)[self.ranks.rank // self._replicas]
        here = {id(p): p for unit in cut for layer in units[unit] for p in layer.parameters()}
        return list(here.values())

    def prepare(self, model: nn.Module, optimizer: OptimizerConfig, total_steps: int) -> None:
        """See `Strategy.prepare`. The model keeps its names, but of its values only this stage's.

        Raises:
            UserError: more stages than blocks, a backbone that trains, or another optimizer than AdamW.
        """
        from deepspeed.runtime.pipe import schedule

        from tagi_ds.engine.pipeline_module import Stages

        require_adamw(optimizer, self.name)
        self._settings, self._total_steps = optimizer, total_steps
        named: Any = dict(model.named_parameters())
        self._shapes = {name: list(p.shape) for name, p in named.items() if p.requires_grad}
        cuts = self._cut(model)
        self._stages = Stages(model.stage_units(), cuts, model.backbone.config.d_model)  # type: ignore[operator, union-attr, arg-type]
        here = set(map(id, self._stages.parameters()))
        self._here: dict[str, nn.Parameter] = {}
        for name, parameter in named.items():
            if id(parameter) in here:
                self._here[name] = parameter
            elif not parameter.is_meta:
                parameter.data = parameter.data.new_empty(0)
        trained: list[tuple[Tensor, Tensor]] = [(p, p) for p in self._here.values() if p.requires_grad]
        groups = decay_groups(trained, optimizer.weight_decay)
        stepper = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas)
        if self.dtype == torch.float32:
            self._stages.float()
        config = deepspeed_config.build(self.engine_config, self._replicas, optimizer.clip)
        # DeepSpeed's optimizer for bf16 tells the memory it takes on the standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine = initialize(self._stages, stepper, config, self.engine_config)
        # DeepSpeed's schedule ends in the optimizer's step, which is to wait until the loss is known to be finite.
        self._engine._INSTRUCTION_MAP = {**self._engine._INSTRUCTION_MAP, schedule.OptimizerStep: _later}
        self._engine.train()

    def _cut(self, model: Any) -> list[range]:
        if any(parameter.requires_grad for parameter in model.backbone.parameters()):
            raise UserError(
                f"model.also_train {model.config.also_train} with engine.strategy pipeline: instructions are encoded "
                "without gradients",
                "set model.also_train nothing, or engine.strategy zero2 or zero3",
            )
        count = len(model.stage_units())
        if self.engine_config.stages > count:
            raise UserError(
                f"engine.stages {self.engine_config.stages}, but the backbone has {count} blocks",
                f"choose at most {count} stages",
            )
        return balance(getattr(model, "stage_costs", None) or [1.0] * count, self.engine_config.stages)

    @property
    def model(self) -> Callable[..., Any]:
        """No process has the whole model: see `accumulate` and `evaluate`."""
        raise RuntimeError("a pipeline's model cannot be called on one process")

    @property
    def module(self) -> nn.Module:
        """This stage's layers."""
        return self._stages

    @property
    def parameters_here(self) -> dict[str, nn.Parameter]:
        """This stage's parameters by the whole model's names."""
        return self._here

    def trainable_shapes(self) -> dict[str, list[int]]:
        """See `Strategy.trainable_shapes`; of all stages."""
        return self._shapes

    def backward(self, loss: Tensor) -> None:
        """Part of `accumulate` here."""
        raise RuntimeError("a pipeline goes backward in `accumulate`")

    def accumulate(self, objective: Objective, batches: Sequence[Any], totals: Mapping[str, float]) -> list[Judged]:
        """See `Strategy.accumulate`. Stages other than the last one return zeros."""
        staged, judged = _staged(objective), []
        moved = [batch.to(self.ranks.device) for batch in batches]
        # DeepSpeed divides by the micro-batches and averages over the replicas.
        scale = float(len(batches) * self._replicas)

        def finish(number: int, figures: Figures, errors: Tensor) -> Tensor:
            terms = staged.terms(figures, moved[number], errors)
            share = loss_share(terms, totals)
            judged.append(Judged(detached(terms), share.detach()))
            return share * scale

        self._begin(staged, moved, finish)
        self._engine.train_batch(_nothing())
        self._stages.end()
        named = self._named(objective, judged[0].terms if judged else None)
        return judged or [Judged(self._zeros(named), self._zero()) for _ in batches]

    def evaluate(self, objective: Objective, batches: Sequence[Any]) -> list[dict[str, Term]]:
        """See `Strategy.evaluate`. Stages other than the last one return zeros."""
        staged, found = _staged(objective), []
        # So many encodings are held at once as in training.
        many = max(self.engine_config.accumulation, self.engine_config.stages)
        for first in range(0, len(batches), many):
            moved = [batch.to(self.ranks.device) for batch in batches[first : first + many]]

            def finish(number: int, figures: Figures, errors: Tensor, moved: list[Any] = moved) -> Tensor:
                found.append(staged.terms(figures, moved[number], errors))
                return figures.label.new_zeros(())

            self._begin(staged, moved, finish)
            settings = {"compute_loss": False, "reduce_output": None, "bcast_loss": False}
            self._engine.eval_batch(_nothing(), num_micro_batches=len(moved), **settings)
            self._stages.end()
        if not batches:
            return []
        named = self._named(objective, found[0] if found else None)
        return found or [self._zeros(named) for _ in batches]

    def _begin(self, objective: StagedObjective, batches: Sequence[Any], finish: Any) -> None:
        micros = [_micro_batch(objective, batch) for batch in batches]
        # Every stage has the same micro-batches, and so comes to the same answer.
        if any(micro.instruction is None for micro in micros):
            self._stages.encode_instructions(micros, self.dtype, self.ranks.device)
        self._stages.begin(micros, finish)

    def encode_instructions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `Strategy.encode_instructions`; on every stage of a replica alike."""
        micro = MicroBatch(ids, mask, None, ids, mask)
        self._stages.encode_instructions([micro], self.dtype, self.ranks.device)
        assert micro.instruction is not None
        return micro.instruction

    def _named(self, objective: Objective, terms: Mapping[str, Term] | None) -> list[tuple[str, str | None, float]]:
        """Name, divisor and weight of an objective's terms, which the last stage tells the others once."""
        known = self._terms.get(id(objective))
        if known is None or known[0] is not objective:
            mine = None if terms is None else [(name, term.per, term.weight) for name, term in terms.items()]
            told = next(found for found in gather_objects(mine) if found is not None)
            known = self._terms[id(objective)] = (objective, [(name, per, weight) for name, per, weight in told])
        return known[1]

    def _zeros(self, named: Sequence[tuple[str, str | None, float]]) -> dict[str, Term]:
        return {name: Term(self._zero(), per, weight) for name, per, weight in named}

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.ranks.device)

    def step(self, step: int) -> StepOutcome:
        """See `Strategy.step`."""
        rate = learning_rate(self._settings, step, self._total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine._exec_optimizer_step()
        taken = not self._engine.optimizer.overflow
        return StepOutcome(rate, float(self._engine.get_global_grad_norm()) if taken else float("nan"), taken)

    def gradient_shares(self) -> dict[str, Tensor]:
        """See `Strategy.gradient_shares`."""
        return shares_of(self._trained)

    def save(self, folder: Path) -> list[Path]:
        """See `Strategy.save`; the full state, whatever the layout."""
        stage = stage_folder(folder, self._stages.stage_id) if self.replica.index == 0 else None
        written: list[Path] = []
        together(lambda: written.extend(save_stage(self._engine, self._trained, stage)), folder)
        return [*written, join_stages(folder, self.engine_config.stages)] if self.ranks.is_main else written

    def load(self, folder: Path) -> None:
        """See `Strategy.load`."""
        self.load_full(FullState(folder))

    def load_full(self, full: FullState) -> bool:
        """See `Strategy.load_full`."""
        return load_stage(self._engine, self._trained, full)

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._here.items() if parameter.requires_grad}


def _micro_batch(objective: StagedObjective, batch: Any) -> MicroBatch:
    inputs: Any = objective.inputs(batch)
    encoded = inputs.pop("instruction_encoding", None)

    def align(adapters: Mapping[str, Any]) -> Tensor | None:
        return objective.alignment_errors(adapters, batch, adapters.keys())

    def reader() -> Reader:
        return objective.reader(batch)

    return MicroBatch(**inputs, instruction=encoded, align=align, reader=reader)


def _staged(objective: Objective) -> StagedObjective:
    if not hasattr(objective, "alignment_errors"):
        raise TypeError(f"{type(objective).__name__} cannot be computed over stages")
    return objective  # type: ignore[return-value]


def _nothing() -> Iterator[tuple[Tensor, Tensor]]:
    """What DeepSpeed's first and last stages load: the stages have their micro-batches already."""
    while True:
        yield torch.zeros(1), torch.zeros(1)


def _later(engine: Any, **_: Any) -> None:
    """In the place of the optimizer's step in DeepSpeed's schedule."""
