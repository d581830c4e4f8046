"""The hypernetwork: encoded instruction -> LoRA factors of every site (paper, section 3.2) and fusion memory.

One part a block of the backbone, so that a pipeline stage can hold the parts of its own layers. Within a block the
sites of one module that share a shape share one two-layer MLP, as the paper's q and v do, and are told apart by a
learned embedding of the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

from tagi_ds.errors import UserError
from tagi_ds.model.adapter import LowRank, Site
from tagi_ds.model.fusion import Fusion
from tagi_ds.model.start import ONE, ZERO, Gather, Start, whole


class SiteGroup(nn.Module):
    """Generates the factors of n sites of one shape with one two-layer MLP.

    The update is exactly zero at the start: B's head is zero, A starts at a learned base ~ N(0, 1 / d_in).

    Args:
        sites: the sites; all of one (d_in, d_out).
        d_model: width of the encoded instruction.
        bottleneck: the MLP's width m.
        rank: r.
        head: ``full`` (one output a rank row) or ``slot`` (one head shared by the r slots, told apart by an embedding).
        pooling: ``attention`` (a learned query a site) or ``mean``.
        shared_a: A is the frozen base alone.
    """

    def __init__(
        self, sites: list[Site], d_model: int, bottleneck: int, rank: int, head: str, pooling: str, shared_a: bool
    ) -> None:
        super().__init__()
        self.names = [site.name for site in sites]
        self.rank, self.d_in, self.d_out, self.slot = rank, sites[0].d_in, sites[0].d_out, head == "slot"
        n, rows = len(sites), 1 if self.slot else rank
        self.query = nn.Parameter(torch.empty(n, d_model)) if pooling == "attention" else None
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.site = nn.Parameter(torch.empty(n, d_model))
        self.rank_slot = nn.Parameter(torch.empty(rank, bottleneck)) if self.slot else None
        self.down = nn.Linear(d_model, bottleneck)
        self.a_base = nn.Parameter(torch.empty(n, rank, self.d_in), requires_grad=not shared_a)
        self.a_head = None if shared_a else nn.Linear(bottleneck, rows * self.d_in, bias=False)
        self.b_head = nn.Linear(bottleneck, rows * self.d_out, bias=False)

    def starts(self) -> dict[str, Start]:
        """Zero update, unit-scale pooled input, A ~ N(0, 1 / d_in)."""
        d_model, bottleneck = self.down.in_features, self.down.out_features
        found = {
            "site": Start(std=0.5),
            "norm.weight": ONE,
            "down.weight": Start(std=d_model**-0.5),
            "down.bias": ZERO,
            "a_base": Start(std=self.d_in**-0.5),
            "b_head.weight": ZERO,
        }
        if self.query is not None:
            found["query"] = Start(std=d_model**-0.5)
        if self.rank_slot is not None:
            found["rank_slot"] = Start(std=0.5)
        if self.a_head is not None:
            found["a_head.weight"] = Start(std=0.1 * (self.d_in * bottleneck) ** -0.5)
        return found

    def pool(self, instruction: Tensor, mask: Tensor) -> Tensor:
        """(U, S, d), (U, S) -> (U, n, d), or (U, 1, d) for the mean; padding has no weight."""
        if self.query is None:
            weights = (mask / mask.sum(1, keepdim=True).clamp(min=1)).to(instruction.dtype)
            return torch.einsum("us,usd->ud", weights, instruction)[:, None]
        scores = torch.einsum("nd,usd->uns", self.query, instruction)
        scores = scores.masked_fill(~mask[:, None].bool(), torch.finfo(scores.dtype).min)
        return torch.einsum("uns,usd->und", scores.softmax(-1), instruction)

    def forward(self, instruction: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded instructions (U, S, d) and their mask (U, S) -> A (U, n, r, d_in) and B (U, n, d_out, r).

        Tensors, not a dictionary: ZeRO-3 gathers a module's own parameters again for the backward pass only where
        its outputs are tensors.
        """
        tasks = instruction.shape[0]
        hidden = self.down(self.norm(self.pool(instruction, mask)) + self.site)  # (U, n, m)
        if self.rank_slot is not None:
            hidden = hidden[:, :, None] + self.rank_slot  # (U, n, r, m)
        hidden = functional.gelu(hidden)
        shape = (tasks, len(self.names), self.rank, -1)
        b = self.b_head(hidden).view(shape).transpose(2, 3)  # (U, n, d_out, r)
        a = self.a_base.expand(tasks, -1, -1, -1)
        if self.a_head is not None:
            a = a + self.a_head(hidden).view(shape)
        return a, b


class BlockGenerator(nn.Module):
    """The adapter generator's part for one block of the backbone."""

    def __init__(self, sites: list[Site], **settings: int | str | bool) -> None:
        super().__init__()
        key = lambda site: (site.parent, site.d_in, site.d_out)  # noqa: E731
        groups = groupby(sorted(sites, key=key), key=key)
        self.groups = nn.ModuleList(SiteGroup(list(group), **settings) for _, group in groups)  # type: ignore[arg-type]

    def forward(self, instruction: Tensor, mask: Tensor) -> dict[str, LowRank]:
        """Encoded instructions (U, S, d) and their mask (U, S) -> site name -> LowRank."""
        adapters: dict[str, LowRank] = {}
        for group in self.groups:
            a, b = group(instruction, mask)
            names: list[str] = group.names  # type: ignore[assignment]
            # Not one by one: the backward of each index would fill a tensor of the group's size with zeros.
            adapters.update(zip(names, map(LowRank, a.unbind(1), b.unbind(1)), strict=True))
        return adapters


class Hypernetwork(nn.Module):
    """Adapter generator and fusion.

    Args:
        sites: all adapted sites.
        fusion: the fusion parts, or None.
        settings: of :class:`SiteGroup`, without the sites.
    """

    def __init__(self, sites: list[Site], fusion: Fusion | None, **settings: int | str | bool) -> None:
        super().__init__()
        blocks = dict.fromkeys(site.block for site in sites)
        self.generator = nn.ModuleDict(
            {
                block.replace(".", "_"): BlockGenerator([site for site in sites if site.block == block], **settings)
                for block in blocks
            }
        )
        self.fusion = fusion

    @torch.no_grad()
    def set_shared_a(self, a: Mapping[str, Tensor], gather: Gather = whole) -> None:
        """Takes over the A (r, d_in) of every site, e.g. the one from which all teachers started.

        Args:
            a: site name -> A.
            gather: makes sharded parameters whole.

        Raises:
            UserError: a site is missing or of another shape.
        """
        for group in self.modules():
            if not isinstance(group, SiteGroup):
                continue
            shape = (group.rank, group.d_in)
            for name in group.names:
                if name not in a or tuple(a[name].shape) != shape:
                    found = tuple(a[name].shape) if name in a else "none"
                    raise UserError(
                        f"the shared A of {name} is to have the shape {shape}; the teachers' is {found}",
                        "train the teachers with this model's rank and sites",
                    )
            with gather([group.a_base]):
                group.a_base.copy_(torch.stack([a[name] for name in group.names]))

    def forward(self, instruction: Tensor, mask: Tensor) -> tuple[dict[str, LowRank], dict[str, tuple[Tensor, Tensor]]]:
        """Encoded instructions (U, S, d) and their mask (U, S) -> adapters by site, fusion memory by block."""
        adapters: dict[str, LowRank] = {}
        for part in self.generator.values():
            adapters.update(part(instruction, mask))
        return adapters, self.fusion(instruction) if self.fusion is not None else {}
