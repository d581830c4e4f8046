"""FLOPs of one micro-batch, part by part, as torch's FlopCounterMode counts them: 2·m·n·k a matrix product.

Backward passes: a frozen linear costs its forward again (the gradient of its input alone), a trained one twice that;
attention 2.5 times its forward (its kernels compute the scores again). The first block of a stack has an input that
needs no gradient. Instructions are encoded once a task, forward only where the encoder is frozen, and not at all where
they were encoded before the first step; of a frozen encoder they have no gradient but under ZeRO-3. With recomputation
a block's forward is paid once more, except for its last product, whose result nothing keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tagi_ds.model.adapter import Site
from tagi_ds.plan.shapes import Block, Shapes
from tagi_ds.plan.workload import Workload

_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Cost:
    """FLOPs of one part.

    Attributes:
        forward, backward: of one micro-batch.
        recomputed: of the forward pass that recomputation repeats.
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    @property
    def total(self) -> float:
        """What is computed."""
        return self.forward + self.backward + self.recomputed

    @property
    def useful(self) -> float:
        """What MFU counts: without what is computed twice."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Operations:
    """FLOPs of one micro-batch.

    Attributes:
        blocks: by name, the backbone's block with its adapters and fusion.
        hypernetwork: by block name, its part of the generator and of the fusion's keys and values.
        instruction: by encoder block name, the encoding of instructions.
        head: the output projection.
        alignment: the loss on the adapters.
    """

    blocks: dict[str, Cost]
    hypernetwork: dict[str, Cost]
    instruction: dict[str, Cost]
    head: Cost
    alignment: Cost

    @property
    def total(self) -> Cost:
        """Of everything."""
        parts = [self.head, self.alignment]
        for table in (self.blocks, self.hypernetwork, self.instruction):
            parts += table.values()
        return sum(parts, Cost())

    def of_block(self, name: str) -> Cost:
        """Of all that lies on a block's pipeline stage for it."""
        zero = Cost()
        return self.blocks[name] + self.hypernetwork.get(name, zero) + self.instruction.get(name, zero)

    def by_part(self) -> dict[str, Cost]:
        """Name of a part -> its cost, for a table."""

        def summed(table: dict[str, Cost], prefix: str = "") -> Cost:
            return sum((cost for name, cost in table.items() if name.startswith(prefix)), Cost())

        return {
            "instruction encoding": summed(self.instruction),
            "generator and fusion memory": summed(self.hypernetwork),
            "encoder with adapters and fusion": summed(self.blocks, "encoder"),
            "decoder with adapters": summed(self.blocks, "decoder"),
            "output head": self.head,
            "alignment loss": self.alignment,
        }


def count_operations(shapes: Shapes, work: Workload) -> Operations:
    """FLOPs of one micro-batch of `work`."""
    instruction: dict[str, Cost] = {}
    if work.tasks and not (work.instruction_cache and shapes.encoding_is_constant):
        plain = replace(work, examples=work.tasks, source=work.instruction)
        for block in shapes.encoder:
            bare = replace(block, sites=(), fusion=0)
            cost = _block(shapes, bare, plain)
            # Adapters are what makes the input's pass need gradients; instructions have none.
            instruction[block.name] = cost if shapes.encoder_trains else Cost(cost.forward)
    counted = work.examples * work.target if work.counted is None else work.counted
    product = 2.0 * counted * shapes.d_model * shapes.vocabulary
    trained_head = shapes.trains[0] if shapes.head else shapes.trains[2]
    elements = 2.0 * work.tasks * shapes.rank**2 * sum(s.d_in + s.d_out for b in shapes.blocks for s in b.sites)
    return Operations(
        blocks={block.name: _block(shapes, block, work) for block in shapes.blocks},
        hypernetwork={block.name: _hypernetwork(shapes, block, work) for block in shapes.blocks} if work.tasks else {},
        instruction=instruction,
        head=Cost(product, product * (2 if trained_head else 1)),
        # Three pairs of Gram products forward; of two of them the generated side's gradients.
        alignment=Cost(3 * elements, 3 * elements) if work.alignment else Cost(),
    )


def _block(shapes: Shapes, block: Block, work: Workload) -> Cost:
    n, d, inner = work.examples, shapes.d_model, shapes.inner
    length = work.source if block.encoder else work.target
    tokens = n * length
    projection = 2.0 * tokens * d * inner
    # transformers lets the embeddings' output ask for a gradient where blocks are recomputed.
    needs_input = not block.first or shapes.trains[1] or shapes.trains[2] or work.checkpointing
    cost = _linears(shapes, 3 * projection, needs_input) + _linears(shapes, projection)
    cost += _attention(n * length * length * inner)
    if block.encoder and block.fusion:
        query = 2.0 * tokens * d * shapes.fusion_inner
        cost += Cost(2 * query, 4 * query) + _attention(tokens * work.instruction * shapes.fusion_inner)
    # The instruction's keys and values are computed once a task, and examples attend to them.
    front = work.memory_tokens if shapes.concatenate else 0
    if not block.encoder:
        cost += _linears(shapes, 2 * projection) + _linears(shapes, 4.0 * n * work.source * d * inner)
        cost += _linears(shapes, 4.0 * work.tasks * front * d * inner, shapes.encoder_trains)
        cost += _attention(n * length * (front + work.source) * inner)
    last = 2.0 * tokens * d * shapes.d_ff
    cost += _linears(shapes, last * (2 if shapes.gated else 1)) + _linears(shapes, last)
    for site in block.sites:
        if site.name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
            cost += _adapter(shapes, site, n * work.source)
            cost += _adapter(shapes, site, work.tasks * front, shapes.encoder_trains)
        else:
            reads_input = block.first and "SelfAttention" in site.name and not site.name.endswith(".o")
            cost += _adapter(shapes, site, n * length, needs_input or not reads_input)
    if not work.checkpointing:
        return cost
    # Dropout keeps a mask of the last product's result, so that it is computed again too.
    spared = 0.0 if shapes.dropout > 0 or any(s.name.endswith("wo") for s in block.sites) else last
    return replace(cost, recomputed=cost.forward - spared)


def _adapter(shapes: Shapes, site: Site, rows: int, needs_input: bool = True) -> Cost:
    down, up = 2.0 * rows * shapes.rank * site.d_in, 2.0 * rows * shapes.rank * site.d_out
    return Cost(down + up, (shapes.generates_a + needs_input) * down + 2 * up)


def _linears(shapes: Shapes, forward: float, needs_input: bool = True) -> Cost:
    return Cost(forward, forward * (needs_input + shapes.trains[0]))


def _attention(pairs: float) -> Cost:
    forward = 4.0 * pairs
    return Cost(forward, _ATTENTION_BACKWARD * forward)


def _hypernetwork(shapes: Shapes, block: Block, work: Workload) -> Cost:
    u, d, m = work.tasks, shapes.d_model, shapes.bottleneck
    modules = {(site.name.rpartition(".")[0], site.d_in, site.d_out) for site in block.sites}
    pools = len(block.sites) if shapes.attention_pooling else len(modules)
    pooled = 2.0 * u * pools * work.instruction * d * (2 if shapes.attention_pooling else 1)
    down = 2.0 * u * len(block.sites) * d * m
    width = sum(site.d_out + (site.d_in if shapes.generates_a else 0) for site in block.sites)
    heads = 2.0 * u * shapes.rank * m * width
    fused = 4.0 * u * work.instruction * d * shapes.fusion_inner if block.fusion else 0.0
    # Products with the instruction have its gradient only where it has one; the mean's weights are given.
    of_instruction = shapes.encoder_trains or work.sharded
    backward = pooled * (shapes.attention_pooling + of_instruction) + fused * (1 + of_instruction)
    return Cost(pooled + down + heads + fused, backward + 2 * (down + heads))
