"""The reference: one process, plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine.distributed import Ranks
from tagi_ds.engine.full_state import WEIGHTS, FullState, write_full_state
from tagi_ds.engine.schedule import learning_rate
from tagi_ds.engine.strategy import StepOutcome, Strategy, decay_groups
from tagi_ds.errors import UserError
from tagi_ds.processes import check_single


class SingleStrategy(Strategy):
    """One process without DeepSpeed; the others must equal it."""

    name = "single"

    def __init__(self, engine: EngineConfig, ranks: Ranks) -> None:
        super().__init__(engine, ranks)
        check_single(ranks.world_size)
        if engine.deepspeed is not None:
            raise UserError(
                f"engine.strategy single does not use engine.deepspeed ({engine.deepspeed})",
                "leave engine.deepspeed out, or choose zero2 or zero3",
            )

    def prepare(self, model: nn.Module, optimizer: OptimizerConfig, total_steps: int) -> None:
        """See `Strategy.prepare`."""
        self._module = model.to(device=self.ranks.device, dtype=self.dtype)
        self._settings, self._total_steps = optimizer, total_steps
        self._trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        # In float32 a parameter is its own master.
        self._masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self._trained.items()
        }
        pairs: list[tuple[Tensor, Tensor]] = [
            (parameter, self._masters[name]) for name, parameter in self._trained.items()
        ]
        self._optimizer = _make_optimizer(optimizer, decay_groups(pairs, optimizer.weight_decay))
        self._module.train()

    @property
    def model(self) -> Callable[..., Any]:
        """See `Strategy.model`."""
        return self._module

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return self._module

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        loss.backward()
        for name, parameter in self._trained.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def step(self, step: int) -> StepOutcome:
        """See `Strategy.step`."""
        rate = learning_rate(self._settings, step, self._total_steps)
        masters = list(self._masters.values())
        for master in masters:
            # ZeRO steps parameters that no micro-batch touched, with a gradient of zero.
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = get_total_norm([master.grad for master in masters if master.grad is not None])
        grad_norm = float(norm)
        taken = bool(torch.isfinite(norm))
        if taken:
            if self._settings.clip > 0:
                clip_grads_with_norm_(masters, self._settings.clip, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            self._copy_masters()
        for master in masters:
            master.grad = None
        return StepOutcome(rate, grad_norm, taken)

    def gradient_shares(self) -> dict[str, Tensor]:
        """See `Strategy.gradient_shares`; here it is the whole."""
        return {name: master.grad for name, master in self._masters.items() if master.grad is not None}

    def save(self, folder: Path) -> list[Path]:
        """See `Strategy.save`; the full state, which every strategy can read."""
        names = {id(master): name for name, master in self._masters.items()}
        kinds: dict[str, dict[str, Tensor]] = {WEIGHTS: dict(self._masters)}
        for master, entries in self._optimizer.state.items():
            for kind, value in entries.items():
                # Adafactor keeps a Python number too.
                kinds.setdefault(kind, {})[names[id(master)]] = torch.as_tensor(value)
        return write_full_state(folder, {kind: tensors.items() for kind, tensors in kinds.items()})

    def load(self, folder: Path) -> None:
        """See `Strategy.load`."""
        self.load_full(FullState(folder))

    def load_full(self, full: FullState) -> bool:
        """See `Strategy.load_full`."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(full.tensor(WEIGHTS, name))
        self._copy_masters()
        known = {"adamw": "exp_avg", "adafactor": "RMS"}[self._settings.name]
        if known not in full.kinds:
            return False
        states: dict[str, dict[str, Any]] = {name: {} for name in self._masters}
        for kind in full.kinds[1:]:
            for name in full.names(kind):
                value = full.tensor(kind, name)
                states[name][kind] = value.clone() if value.is_floating_point() else value.item()
        names = {id(master): name for name, master in self._masters.items()}
        described = self._optimizer.state_dict()
        stepped = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        described["state"] = {number: states[names[id(parameter)]] for number, parameter in enumerate(stepped)}
        self._optimizer.load_state_dict(described)
        return True

    def _copy_masters(self) -> None:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])


def _make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.name == "adafactor":
        from transformers.optimization import Adafactor

        # The schedule is ours; Adafactor's own relative steps would multiply it.
        return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False)
    # On the CPU its fused form takes a third of the plain one's time, and differs by the last bit or two of a float32.
    fused = True if all(p.device.type == "cpu" for group in groups for p in group["params"]) else None
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)
