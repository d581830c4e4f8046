"""Adapter sites, and how generated low-rank updates reach an ordinary Hugging Face T5.

Adapters are activations, not parameters: a :class:`TaskState` travels through the backbone as the keyword
argument :data:`STATE_KEYWORD`, which T5's stacks hand down through every block to its sublayers. A hook at the
block's first sublayer takes it off and lets the block's sites see it until the last sublayer is done. Activation
checkpointing recomputes a block's ``forward`` with the keyword of the forward pass, first sublayer included, so the
adapter in force is always the right one, however many micro-batches are in flight. (Hooks on the block itself would
not do: transformers keeps those outside the recomputed region.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tagi_ds.model.instruction_front import InstructionFront

STATE_KEYWORD = "tagi_state"
ATTENTION_KINDS = ("q", "k", "v", "o")
FEED_FORWARD_KINDS = ("wi", "wi_0", "wi_1", "wo")


class LowRank(NamedTuple):
    """A low-rank update for each of U tasks: ΔW = scaling · B·A.

    Attributes:
        a: (U, r, d_in).
        b: (U, d_out, r).
    """

    a: Tensor
    b: Tensor


class Site(NamedTuple):
    """One adapted linear of the backbone.

    Attributes:
        name: dotted module name inside the backbone, e.g. ``encoder.block.0.layer.0.SelfAttention.q``.
        block: dotted name of its T5 block.
        parent: dotted name of the attention or feed-forward module that holds it.
        d_in, d_out: the linear's widths.
    """

    name: str
    block: str
    parent: str
    d_in: int
    d_out: int


@dataclass
class TaskState:
    """Everything that U instructions imply for the backbone.

    Attributes:
        adapters: site name -> LowRank.
        fusion: encoder block name -> (keys, values), each (U, heads, S, head width); empty without fusion.
        memory: (U, S, d) encoded instructions I.
        mask: (U, S) int64, 1 on real instruction tokens.
        index: (R,) int64, which instruction each of R runs of examples has; None: the U instructions in order. A batch
            of N examples is R runs of N / R each, in order.
        kept: module name -> (U, S, width), what a module of the decoder's cross-attention makes of I; filled without
            gradients where it is a dictionary, for tasks that answer more than once. None: nothing is kept.
    """

    adapters: dict[str, LowRank]
    fusion: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    memory: Tensor | None = None
    mask: Tensor | None = None
    index: Tensor | None = None
    kept: dict[str, Tensor] | None = None

    def at(self, index: Tensor | None) -> TaskState:
        """The same state for a batch whose runs of examples have the tasks `index` (R,)."""
        return replace(self, index=index)

    def select(self, tensor: Tensor) -> Tensor:
        """Rows (R, ...) of a per-task tensor (U, ...) for the batch's runs; where every task is one, the tensor itself.

        A gather would cost a copy of every task's factors, and its backward as much again.
        """
        return tensor if self.index is None else tensor.index_select(0, self.index)

    def spread(self, tensor: Tensor, examples: int) -> Tensor:
        """Rows (N, ...) of a per-task tensor (U, ...) for `examples` = N of them, copied."""
        rows = self.select(tensor)
        each = rows[:, None].expand(-1, examples // rows.shape[0], *rows.shape[1:])
        return each.flatten(0, 1)


def find_sites(backbone: nn.Module, kinds: Iterable[str]) -> list[Site]:
    """The linears named by `kinds` in every block of an encoder-decoder backbone, in forward order.

    ``wi`` stands for both halves of a gated feed-forward (``wi_0``, ``wi_1``).

    Raises:
        ValueError: an unknown kind, or one that the backbone does not have.
    """
    wanted = set(kinds)
    unknown = wanted - set(ATTENTION_KINDS) - set(FEED_FORWARD_KINDS)
    if unknown:
        raise ValueError(f"unknown adapter sites {sorted(unknown)}; choose from {ATTENTION_KINDS + FEED_FORWARD_KINDS}")
    sites, seen = [], set()
    for name, module in backbone.named_modules():
        parts = name.split(".")
        kind = "wi" if parts[-1] in ("wi_0", "wi_1") and "wi" in wanted else parts[-1]
        if kind not in wanted or "block" not in parts or not isinstance(module, nn.Linear):
            continue
        block = ".".join(parts[: parts.index("block") + 2])
        # Widths come from the module, not from its weight: a ZeRO-3 shard's weight is empty.
        sites.append(Site(name, block, ".".join(parts[:-1]), module.in_features, module.out_features))
        seen.add(kind)
    if wanted - seen:
        raise ValueError(f"the backbone has no linears named {sorted(wanted - seen)}")
    return sites


def add_low_rank(output: Tensor, x: Tensor, adapter: LowRank, scaling: float) -> Tensor:
    """output + scaling · B·A·x, each run of examples with its own factors: one product over all tokens of a run.

    Args:
        output: (N, L, d_out), the linear's.
        x: (N, L, d_in), its input.
        adapter: factors of R runs, of N / R examples each.
        scaling: LoRA's alpha / r.

    Returns:
        (N, L, d_out).
    """
    runs = adapter.a.shape[0]
    a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype)
    down = torch.bmm(x.reshape(runs, -1, x.shape[-1]), a.transpose(1, 2))
    updated = torch.baddbmm(output.reshape(runs, -1, output.shape[-1]), down, b.transpose(1, 2), alpha=scaling)
    return updated.view(output.shape)


class BlockAdapter:
    """Lets one T5 block be answered by a :class:`TaskState` handed down as a keyword argument.

    Args:
        block: the T5 block.
        sites: its sites, by name, with their modules.
        scaling: LoRA's alpha / r.
        fusion: called as fusion(hidden, keys, values, mask) after the block's self-attention; None for no fusion.
        name: the block's dotted name, the key into ``TaskState.fusion``.
        concatenate: whether a decoder block, given F, attends to [I ; F].
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        sites: Mapping[str, nn.Module],
        scaling: float,
        fusion: nn.Module | None,
        concatenate: bool = False,
    ) -> None:
        self.name, self.scaling, self.fusion = name, scaling, fusion
        self.state: TaskState | None = None
        layers: Sequence[nn.Module] = block.layer  # type: ignore[assignment]
        layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for attention in layers[1:-1]:
            attention.register_forward_pre_hook(self._take_off, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave, always_call=True)
        for site, module in sites.items():
            module.register_forward_hook(self._adapt(site))
        if fusion is not None:
            layers[0].register_forward_hook(self._fuse)
        if concatenate:
            for at, layer in enumerate(layers[1:-1], start=1):
                crossing: Any = layer.EncDecAttention
                InstructionFront(self, crossing, f"{name}.layer.{at}.EncDecAttention")

    def adapt(self, site: str, x: Tensor, output: Tensor, by_task: bool = False) -> Tensor:
        """A site's output (N, L, d_out) with its update; as it is where the state has none for it.

        Args:
            site: its dotted name.
            x: (N, L, d_in), its input.
            output: of the linear alone.
            by_task: the rows are the U instructions rather than the batch's examples.
        """
        if self.state is None or site not in self.state.adapters:
            return output
        a, b = self.state.adapters[site]
        if not by_task:
            a, b = self.state.select(a), self.state.select(b)
        return add_low_rank(output, x, LowRank(a, b), self.scaling)

    def _enter(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        self.state = kwargs.pop(STATE_KEYWORD, None)
        return args, kwargs

    def _take_off(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {key: value for key, value in kwargs.items() if key != STATE_KEYWORD}

    def _leave(self, *_: Any) -> None:
        self.state = None

    def _adapt(self, site: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self.adapt(site, args[0], output)

        return hook

    def _fuse(self, _: nn.Module, args: tuple, output: tuple) -> tuple:
        if self.state is None or self.name not in self.state.fusion or self.fusion is None:
            return output
        keys, values = (self.state.select(t) for t in self.state.fusion[self.name])
        assert self.state.mask is not None
        return self.fusion(output[0], keys, values, self.state.select(self.state.mask)), *output[1:]


def install(
    backbone: nn.Module,
    sites: list[Site],
    scaling: float,
    fusion: Mapping[str, nn.Module] | None = None,
    concatenate: bool = False,
) -> list[BlockAdapter]:
    """Makes every block of `backbone` answer to a handed-down state, those without a site or a fusion layer by taking
    it off: transformers hands it to all of them. With `concatenate` the decoder, given F and a mask of S + L, attends
    to [I ; F].

    Returns the hooks' owners; parameter names and modules of the backbone stay as they are.
    """
    modules = dict(backbone.named_modules())
    fusion = fusion or {}
    blocks = [name for name in modules if name.split(".")[-2:-1] == ["block"]]
    return [
        BlockAdapter(
            modules[block],
            block,
            {site.name: modules[site.name] for site in sites if site.block == block},
            scaling,
            fusion.get(block),
            concatenate,
        )
        for block in blocks
    ]
