"""ZeRO-2 and ZeRO-3 through DeepSpeed, which is imported only here and only when needed: it takes seconds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import deepspeed_config
from tagi_ds.engine.distributed import Ranks
from tagi_ds.engine.full_state import FullState
from tagi_ds.engine.host_memory import large_blocks_returned
from tagi_ds.engine.placement import make_machine_groups_once, offloads_optimizer
from tagi_ds.engine.schedule import learning_rate
from tagi_ds.engine.strategy import StepOutcome, Strategy, decay_groups
from tagi_ds.engine.zero_loading import load_full_state, partition_of
from tagi_ds.engine.zero_saving import save_engine
from tagi_ds.errors import UserError

TAG = "deepspeed"
"""Folder of DeepSpeed's own files within a checkpoint."""


class ZeroStrategy(Strategy):
    """DeepSpeed with ZeRO stage 2 or 3, any number of processes."""

    def __init__(self, engine: EngineConfig, ranks: Ranks) -> None:
        super().__init__(engine, ranks)
        self.name = engine.strategy
        # Checked before anything is loaded; `prepare` builds it again with the clipping.
        self._config = deepspeed_config.build(engine, ranks.world_size, clip=0.0)
        self._deepspeed = import_deepspeed(ranks)
        self._hugging_face_config: Any = None

    @contextlib.contextmanager
    def model_context(self) -> Iterator[None]:
        """See `Strategy.model_context`."""
        if self.name == "zero3":
            from transformers.integrations import HfDeepSpeedConfig

            # Held weakly by transformers, which asks for it again in `generate`: it lives as long as the strategy.
            self._hugging_face_config = HfDeepSpeedConfig(self._config)
        with large_blocks_returned() if self.name == "zero3" else contextlib.nullcontext():
            yield

    def construction(self) -> contextlib.AbstractContextManager[None]:
        """See `Strategy.construction`."""
        if self.name != "zero3":
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self._deepspeed.zero.Init(config_dict_or_path=self._config)
        return context

    @contextlib.contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """See `Strategy.gathered`."""
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        with self._deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
            yield

    def prepare(self, model: nn.Module, optimizer: OptimizerConfig, total_steps: int) -> None:
        """See `Strategy.prepare`."""
        require_adamw(optimizer, self.name)
        self._settings, self._total_steps = optimizer, total_steps
        config = deepspeed_config.build(self.engine_config, self.ranks.world_size, optimizer.clip)
        trained: list[tuple[Tensor, Tensor]] = [(p, p) for p in model.parameters() if p.requires_grad]
        groups = decay_groups(trained, optimizer.weight_decay)
        # torch's own AdamW: DeepSpeed's fused ones are compiled on first use and round differently.
        # On the CPU, over offloaded masters, its fused form is several times as fast as its plain one.
        fused = True if offloads_optimizer(config) else None
        stepper = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas, fused=fused)
        if self.dtype == torch.float32:
            model.float()
        leaves = getattr(model, "z3_leaf_classes", None)
        if self.name == "zero3" and leaves:
            self._deepspeed.utils.set_z3_leaf_modules(model, list(leaves))
        if self.name == "zero3" and hasattr(model, "parameters_are_sharded"):
            model.parameters_are_sharded = True  # type: ignore[assignment]
        self._engine = initialize(model, stepper, config, self.engine_config)
        self._engine.train()

    @property
    def model(self) -> Callable[..., Any]:
        """See `Strategy.model`."""
        return self._engine

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return self._engine.module

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        # DeepSpeed averages over ranks, and over micro-batches unless told not to.
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, step: int) -> StepOutcome:
        """See `Strategy.step`."""
        rate = learning_rate(self._settings, step, self._total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        # DeepSpeed checks the norm first and leaves the step out where it is not finite.
        taken = not self._engine.optimizer.overflow
        return StepOutcome(rate, float(self._engine.get_global_grad_norm()) if taken else float("nan"), taken)

    def gradient_shares(self) -> dict[str, Tensor] | None:
        """See `Strategy.gradient_shares`; from NVMe each would have to be read back."""
        if self.engine_config.nvme_path is not None:
            return None
        named = self.module.named_parameters()
        return shares_of({name: parameter for name, parameter in named if parameter.requires_grad})

    def save(self, folder: Path) -> list[Path]:
        """See `Strategy.save`."""
        return save_engine(self._engine, folder, TAG)

    def load(self, folder: Path) -> None:
        """See `Strategy.load`."""
        # The frozen parameters are not in the file, hence not strict.
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise UserError(f"DeepSpeed cannot read {folder}", "remove that folder; the run then goes on from another")

    def load_full(self, full: FullState) -> bool:
        """See `Strategy.load_full`."""
        named = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return load_full_state(self._engine, named, full)

    def partition(self) -> str:
        """See `Strategy.partition`."""
        return partition_of(self._engine)


def require_adamw(optimizer: OptimizerConfig, strategy: str) -> None:
    """Refuses an optimizer that ZeRO cannot run exactly.

    Raises:
        UserError: it is not AdamW.
    """
    if optimizer.name != "adamw":
        raise UserError(
            f"optimizer.name {optimizer.name} under engine.strategy {strategy}: ZeRO flattens what it factors",
            "choose adamw, or engine.strategy single",
        )


def import_deepspeed(ranks: Ranks) -> Any:
    """DeepSpeed, with this process in its group."""
    import deepspeed

    if ranks.device.type == "cpu":
        # Optional, and compiled for more than a minute on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It warns of every step that it leaves out, which the run says itself, with the examples.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(verbose=False)
    make_machine_groups_once()
    return deepspeed


def initialize(model: nn.Module, stepper: torch.optim.Optimizer, config: dict[str, Any], engine: EngineConfig) -> Any:
    """DeepSpeed's engine around a model.

    Raises:
        UserError: DeepSpeed refuses the JSON.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        made, *_ = deepspeed.initialize(model=model, optimizer=stepper, config=config, dist_init_required=False)
    except (DeepSpeedConfigError, ValidationError) as error:
        path = engine.deepspeed or f"ds_configs/{engine.strategy}.json"
        raise UserError(f"DeepSpeed refuses {path}: {error}", "mend the named setting in that file") from error
    return made


def shares_of(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """This process's shares of the gradients of parameters that DeepSpeed trains (`Strategy.gradient_shares`)."""
    shares = {name: _share_of(parameter) for name, parameter in named.items()}
    return {name: share for name, share in shares.items() if share is not None}


def _share_of(parameter: Any) -> Tensor | None:
    """This process's share of a parameter's summed gradient under ZeRO-1, 2 or 3; None where it has none of it.

    Every element lies on one process of a group of replicas. Known between the last backward pass and the step.
    """
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        local: Tensor | None = safe_get_local_grad(parameter)
        return local
    fragment = getattr(parameter, "_hp_mapping", None)
    if fragment is None:
        return None
    share: Tensor = fragment.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    place = fragment.lp_fragment_address
    # The bf16 optimizer keeps the whole gradient in every process, the same after its reduction.
    return share.narrow(0, place.start, place.numel) if share.numel() == parameter.numel() else share
