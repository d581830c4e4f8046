"""Bytes that torch keeps between the forward and the backward pass, block by block.

Each figure is the sum of the tensors that autograd saves in this project's model (a frozen linear saves nothing but
its weight; one that trains, or that carries an adapter, saves its input). With e bytes an element, N examples of L
tokens, and R = N·L·d, I = N·L·inner, F = N·L·d_ff elements:

* norm: its input e·R; in bf16 also the fp32 copy that it squares, 4·R.
* attention: q, k, v and the output 4·e·I, a float32 a head and token, the input of the adapters e·R, and the mask
  laid over the position bias, e·N·heads·L·L — transformers builds one for every layer.
* adapter: A·x, e·N·L·r a site; its factors are read by runs of examples of one task, without copies.
* fusion: norm, query and output 2·e·N·L·inner_f, the normed input e·R, keys and values 2·e·U·S·inner_f.
* feed-forward: k tensors of F (k = 6 for gated gelu_new, 3 for gated silu, 1 for relu) and its norm.
* dropout: a byte an element on a GPU, an element on the processor.

With recomputation a block keeps its input alone, and one block at a time has all of the above again.

A validation batch keeps nothing for a backward pass: it takes its instructions, adapters and fusion's keys and values,
and of one block at a time the larger of attention (q, k, v, and the mask laid over the position bias, e·N·heads·L·L,
twice while it is made contiguous) and feed-forward; in the decoder also the encoded inputs and their keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

from tagi_ds.model.head import CHUNK_ELEMENTS
from tagi_ds.plan.shapes import Block, Shapes, adapter_elements
from tagi_ds.plan.workload import Workload


def block_bytes(shapes: Shapes, block: Block, work: Workload) -> int:
    """Bytes that one block keeps for its backward pass without recomputation."""
    length = work.source if block.encoder else work.target
    kept = _attention(shapes, block, work, length) + _feed_forward(shapes, block, work, length)
    kept += _adapters(shapes, block, work)
    if block.encoder:
        return kept + (_fusion(shapes, work) if block.fusion else 0)
    return kept + _cross_attention(shapes, block, work)


def checkpoint_bytes(shapes: Shapes, block: Block, work: Workload) -> int:
    """Bytes that a recomputed block keeps: its input."""
    length = work.source if block.encoder else work.target
    return work.element * work.examples * length * shapes.d_model


def memory_tensor_bytes(shapes: Shapes, work: Workload) -> int:
    """Bytes around the blocks: the encoded input, final norms, position biases."""
    n, d, e = work.examples, shapes.d_model, work.element
    memory = work.source + (work.memory_tokens if shapes.concatenate else 0)
    final = sum(_norm(shapes, work, length) for length in (work.source, work.target))
    bias = e * shapes.heads * (work.source**2 + work.target**2 + work.target * memory)
    encoded = e * n * d * work.source
    return encoded + final + bias


def instruction_bytes(shapes: Shapes, work: Workload) -> int:
    """Bytes of encoded instructions, their adapters' and fusion's activations; the generator's own are small.

    Where the encoder itself trains, encoding instructions keeps what encoding inputs keeps, without sites or fusion.
    """
    if not work.tasks:
        return 0
    e, tokens = work.element, work.tasks * work.instruction
    kept = 2 * e * tokens * shapes.d_model
    pools = sum(1 for block in shapes.blocks if block.fusion)
    # Keys and values; the normed instruction from which all of them come is the second of its size above.
    kept += pools * tokens * 2 * shapes.fusion_inner * e
    if work.cpu and e == 2:  # the composed norm keeps its result and its input in float32
        kept += tokens * shapes.d_model * 8
    if shapes.encoder_trains:
        plain = Workload(
            work.tasks, 0, 0, work.instruction, 1, work.checkpointing, work.precision, cpu=work.cpu, padded=work.padded
        )
        for block in shapes.encoder:
            bare = Block(block.name, True, block.first, block.backbone, 0, 0, 0, ())
            kept += (checkpoint_bytes if work.checkpointing else block_bytes)(shapes, bare, plain)
    return kept


def adapter_bytes(shapes: Shapes, work: Workload) -> int:
    """Bytes of the generated adapters of U instructions."""
    return work.element * work.tasks * adapter_elements((s for b in shapes.blocks for s in b.sites), shapes.rank)


def alignment_bytes(shapes: Shapes, work: Workload) -> int:
    """Bytes of the alignment loss: the teachers' adapters in float32, and in bf16 a float32 copy of the generated."""
    if not work.alignment:
        return 0
    elements = adapter_bytes(shapes, work) // work.element
    return elements * 4 * (1 if work.precision == "fp32" else 2)


def logit_bytes(shapes: Shapes, work: Workload) -> int:
    """Bytes at the loss: one chunk of logits, in bf16 with a float32 copy, for a store's teacher of temperature 1.

    Beside it the hidden states of the targets, what is kept of them and their gradient; where the head trains, its
    gradient in float32 and one chunk's share of it.
    """
    positions, chunk = work.examples * work.target, _chunk_bytes(shapes, work)
    trained_head = shapes.trains[0] if shapes.head else shapes.trains[2]
    weight = shapes.vocabulary * shapes.d_model * (4 + work.element) * trained_head
    return chunk + weight + 3 * work.element * positions * shapes.d_model


def validation_bytes(shapes: Shapes, blocks: Sequence[Block], work: Workload) -> int:
    """Bytes of a validation batch on a part of the model beside what lasts: no gradients, every length at its limit."""
    e, n, d = work.element, work.examples, shapes.d_model
    pools = sum(1 for block in shapes.blocks if block.fusion)
    instructions = work.tasks * work.instruction * (2 * d + 2 * pools * shapes.fusion_inner)
    front = work.memory_tokens if shapes.concatenate else 0
    summits = [0]
    if any(block.encoder for block in blocks):
        summits.append(e * forward_elements(shapes, n, work.source, e))
    if not all(block.encoder for block in blocks):
        memory = n * work.source * d + 2 * n * (work.source + front) * shapes.inner
        summits.append(e * (memory + forward_elements(shapes, n, work.target, e)) + _chunk_bytes(shapes, work))
    return e * instructions + adapter_bytes(shapes, work) + max(summits)


def forward_elements(shapes: Shapes, examples: int, length: int, e: int) -> int:
    """Elements, of e bytes, that a stack of blocks takes without gradients: one block's, and what goes through all.

    Before attention the norm has squared a float32 copy of its input; in the feed-forward both halves and their product
    are there.
    """
    tokens = examples * length
    stream = 3 * tokens * shapes.d_model
    mask = examples * shapes.heads * length**2
    attention = 2 * mask + 3 * tokens * shapes.inner + tokens * shapes.d_model * 4 // e
    return stream + max(attention, (3 if shapes.gated else 2) * tokens * shapes.d_ff)


def backward_bytes(shapes: Shapes, work: Workload) -> int:
    """Bytes that a block's backward pass needs for a moment: gradients of width d_ff and of the residual stream."""
    tokens = work.examples * max(work.source, work.target)
    return work.element * tokens * (4 * shapes.d_ff + 3 * shapes.d_model)


def _chunk_bytes(shapes: Shapes, work: Workload) -> int:
    rows = min(work.examples * work.target, max(1, CHUNK_ELEMENTS // shapes.vocabulary))
    return rows * shapes.vocabulary * (4 if work.precision == "fp32" else 6)


def _norm(shapes: Shapes, work: Workload, length: int) -> int:
    elements = work.examples * length * shapes.d_model
    kept = elements * (work.element + (4 if work.precision == "bf16" else 0))
    return kept + (elements * work.element if shapes.trains[1] else 0)


def _attention(shapes: Shapes, block: Block, work: Workload, length: int) -> int:
    n, e = work.examples, work.element
    adapted = {site.name.rsplit(".", 1)[1] for site in block.sites if "SelfAttention" in site.name}
    inner = n * length * shapes.inner
    kept = _norm(shapes, work, length) + 4 * e * inner + 4 * n * length * shapes.heads
    if adapted & {"q", "k", "v"} or shapes.trains[0]:
        kept += e * n * length * shapes.d_model
    mask = work.examples if work.padded else 0
    if not block.encoder and not work.padded:
        mask = 1
    kept += e * mask * shapes.heads * length * length
    return kept + _dropout(shapes, work, n * length * shapes.d_model)


def _cross_attention(shapes: Shapes, block: Block, work: Workload) -> int:
    n, e, length = work.examples, work.element, work.target
    memory = work.source + (work.memory_tokens if shapes.concatenate else 0)
    kept = _norm(shapes, work, length) + 2 * e * n * (length + memory) * shapes.inner + 4 * n * length * shapes.heads
    if shapes.trains[0] or any(site.name.endswith("EncDecAttention.q") for site in block.sites):
        kept += e * n * length * shapes.d_model
    # The mask, which has no heads (tagi_ds.model.cross_bias).
    kept += e * (n if work.padded else 0) * length * memory
    return kept + _dropout(shapes, work, n * length * shapes.d_model)


def _feed_forward(shapes: Shapes, block: Block, work: Workload, length: int) -> int:
    tokens, e = work.examples * length, work.element
    adapted = {site.name.rsplit(".", 1)[1] for site in block.sites if "DenseReluDense" in site.name}
    kept = _norm(shapes, work, length) + shapes.kept_ff * e * tokens * shapes.d_ff
    if shapes.trains[0] or adapted & {"wi", "wi_0", "wi_1"}:
        kept += e * tokens * shapes.d_model
    if shapes.gated and (shapes.trains[0] or "wo" in adapted):
        kept += e * tokens * shapes.d_ff
    return kept + _dropout(shapes, work, tokens * (shapes.d_ff + shapes.d_model))


def _fusion(shapes: Shapes, work: Workload) -> int:
    n, e, length = work.examples, work.element, work.source
    elements, inner = n * length * shapes.d_model, n * length * shapes.fusion_inner
    # The norm's input; the query's; query and output; what the softmax leaves a head and token.
    kept = 2 * e * elements + 2 * e * inner + 4 * n * length * shapes.fusion_heads
    if work.cpu:
        kept += elements * (4 if e == 4 else 6)
    return kept


def _adapters(shapes: Shapes, block: Block, work: Workload) -> int:
    n, tokens = work.examples, 0
    front = work.tasks * work.memory_tokens if shapes.concatenate else 0
    for site in block.sites:
        long = site.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        tokens += n * work.source + front if long else n * (work.source if block.encoder else work.target)
    return work.element * tokens * shapes.rank


def _dropout(shapes: Shapes, work: Workload, elements: int) -> int:
    return 0 if shapes.dropout == 0 else elements * (work.element if work.cpu else 1)
