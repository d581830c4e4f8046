"""The decoder's attention to [I ; F] when it is handed F alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tagi_ds.model.adapter import BlockAdapter, TaskState


class InstructionFront:
    """Puts the instruction before what a decoder block's cross-attention is given: F becomes [I ; F].

    Keys and values of I depend on the task alone: they are projected once an instruction, not once an example, with
    the module's own weight, inside the block's forward: there a sharding engine has it whole, and recomputation meets
    the block's own state. The attention module takes the number of keys from what it is given, so it is given a tensor
    of that many rows, and its k and v are given F.
    """

    def __init__(self, block: BlockAdapter, attention: Any, name: str) -> None:
        self._block = block
        self._input: Tensor | None = None
        attention.register_forward_pre_hook(self._lengthen, with_kwargs=True)
        attention.register_forward_hook(self._forget, always_call=True)
        for kind in ("k", "v"):
            module = getattr(attention, kind)
            module.register_forward_pre_hook(self._give)
            module.register_forward_hook(self._join(f"{name}.{kind}"))

    def _lengthen(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        state = self._block.state
        if state is not None:
            assert state.memory is not None
            given: Tensor = kwargs["key_value_states"]
            self._input = given
            length = state.memory.shape[1] + given.shape[1]
            rows = given.new_empty(()).expand(given.shape[0], length, given.shape[2])
            kwargs = {**kwargs, "key_value_states": rows}
        return args, kwargs

    def _forget(self, *_: Any) -> None:
        self._input = None

    def _give(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._input is None else (self._input,)

    def _join(self, name: str) -> Any:
        def hook(module: nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
            state = self._block.state
            if state is None:
                return output
            front = state.select(self._front(name, module, state))  # (R, S, width)
            each = output.view(front.shape[0], -1, *output.shape[1:])
            return torch.cat([front[:, None].expand(-1, each.shape[1], -1, -1), each], dim=2).flatten(0, 1)

        return hook

    def _front(self, name: str, module: nn.Linear, state: TaskState) -> Tensor:
        """(U, S, width)."""
        assert state.memory is not None
        kept = None if torch.is_grad_enabled() else state.kept
        if kept is not None and name in kept:
            return kept[name]
        memory = state.memory.to(module.weight.dtype)
        front = self._block.adapt(name, memory, functional.linear(memory, module.weight, module.bias), by_task=True)
        # While a program is traced there are no values to keep.
        if kept is not None and not torch.compiler.is_compiling():
            kept[name] = front
        return front
