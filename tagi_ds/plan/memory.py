"""Bytes on one GPU by kind, and the peak of a step.

With P_f frozen and P_t trained parameters, e bytes an element that computes, D data-parallel ranks, W ranks:

=================== ====================== ========================= ======================= =====================
kind                single                 zero2                     zero3                   pipeline, per stage
=================== ====================== ========================= ======================= =====================
frozen weights      e·P_f                  e·P_f                     e·P_f / W               e·P_f
trained weights     e·P_t                  e·P_t                     e·P_t / W               e·P_t
masters             4·P_t (none in fp32)   4·P_t / D                 4·P_t / W               4·P_t / D
Adam's two moments  8·P_t                  8·P_t / D                 8·P_t / W               8·P_t / D
gradients           4·P_t (+ e·P_t, bf16)  4·P_t / D                 4·P_t / W               (4 + e)·P_t
buffers             none                   e·bucket (x 2, overlap)   e·(bucket + gathered)   e·bucket, messages
=================== ====================== ========================= ======================= =====================

What is offloaded lies in the host's memory instead. Gathered under ZeRO-3 are at most `stage3_max_live_parameters` and
the module in hand; hpZ adds e·P / GPUs of a node. A step has three summits, of which the highest counts: at the loss
(activations, logits, adapters), at the end of the backward pass (gradients, adapters and theirs), and in the optimizer
(gradients and its temporaries).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tagi_ds.plan import activations
from tagi_ds.plan.cluster import Cluster
from tagi_ds.plan.layout import Layout
from tagi_ds.plan.shapes import Block, Shapes, adapter_elements
from tagi_ds.plan.workload import Workload

CONTEXT = 1.5e9
"""Allowance: CUDA's context, cuBLAS's workspace and NCCL's channels on one GPU."""
FRAGMENTATION = 0.05
"""Allowance: share of what is allocated that the caching allocator holds beside it."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        frozen, trained, optimizer, gradients, buffers: see the module; `optimizer` is masters and moments.
        activations: kept for the backward pass, and in recomputation one block's again.
        logits: at the loss.
        adapters: of U instructions, their gradients, and the teachers' with alignment.
        temporaries: of the optimizer's step.
        allowance: context and fragmentation.
        peak: the highest summit with the allowance; kinds of different summits do not add up to it.
        host: what is offloaded, in the host's memory for this GPU (or on its disk).
        validation: the peak of a validation batch with the allowance, which a step's peak leaves out; 0 without one.
    """

    frozen: float
    trained: float
    optimizer: float
    gradients: float
    buffers: float
    activations: float
    logits: float
    adapters: float
    temporaries: float
    allowance: float
    peak: float
    host: float = 0.0
    validation: float = 0.0


def memory_of(
    shapes: Shapes,
    work: Workload,
    layout: Layout,
    cluster: Cluster,
    accumulation: int,
    stages: Sequence[range] = (),
    validation: Workload | None = None,
) -> Memory:
    """Memory of the fullest GPU.

    Args:
        work: one micro-batch of one GPU, or of one pipeline.
        accumulation: micro-batches a step.
        stages: blocks of each pipeline stage (of :func:`tagi_ds.plan.stages.balance`).
        validation: a validation batch (of :func:`tagi_ds.plan.workload.validation_work`).
    """
    parts = list(stages) if layout.strategy == "pipeline" else [range(len(shapes.blocks))]
    found = [_of_part(shapes, work, layout, cluster, accumulation, part, i, validation) for i, part in enumerate(parts)]
    fullest = max(found, key=lambda memory: memory.peak)
    return replace(fullest, validation=max(memory.validation for memory in found))


def largest_fitting(fits: Callable[[int], bool], most: int = 4096) -> int:
    """The largest number for which `fits` holds, by doubling and halving; it holds for all below one that it holds for.

    Args:
        fits: asked for numbers from 1 on.
        most: beyond which no more is asked.

    Returns:
        0 where it does not hold for 1.
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _of_part(
    shapes: Shapes,
    work: Workload,
    layout: Layout,
    cluster: Cluster,
    accumulation: int,
    part: range,
    stage: int,
    validation: Workload | None,
) -> Memory:
    blocks = [shapes.blocks[i] for i in part]
    e, buffers = work.element, layout.buffers
    total, trained = _parameters(shapes, blocks, part)
    sharded = layout.gpus if layout.strategy == "zero3" else 1
    owners = layout.replicas if layout.strategy != "single" else 1
    frozen_bytes = 0.0 if buffers.offload_parameters else e * (total - trained) / sharded
    trained_bytes = 0.0 if buffers.offload_parameters else e * trained / sharded
    masters = 0 if layout.strategy == "single" and work.precision == "fp32" else 4
    optimizer = 0.0 if buffers.offload_optimizer else (masters + 8) * trained / owners
    # Sums of gradients lie beside the optimizer's state.
    gradients = 0.0 if buffers.offload_optimizer else _gradient_bytes(layout, trained, owners, e, work.precision)
    host = e * total / sharded * buffers.offload_parameters
    host += (masters + 8 + 4) * trained / owners * buffers.offload_optimizer
    in_flight = min(layout.stages - stage, accumulation)
    buffer_bytes = _buffer_bytes(shapes, work, layout, cluster, total, trained) + _messages(shapes, work, layout)
    kept, again, logits, adapters = _activations(shapes, work, blocks, in_flight)
    temporaries = 4.0 * trained / owners if not cluster.is_cpu else 8.0 * shapes.largest_gathered
    if buffers.offload_optimizer:
        temporaries = 0.0
    lasting = frozen_bytes + trained_bytes + optimizer + buffer_bytes
    carried = gradients if accumulation > 1 or layout.strategy == "zero3" else 0.0
    at_loss = carried + kept + max(logits, again + activations.backward_bytes(shapes, work)) + adapters / 2
    after_backward = gradients + adapters + (0 if in_flight == 1 else kept)
    summit = lasting + max(at_loss, after_backward, gradients + temporaries)
    allowance = 0.0 if cluster.is_cpu else CONTEXT + FRAGMENTATION * summit
    validated = 0.0
    if validation is not None:
        validated = lasting + activations.validation_bytes(shapes, blocks, validation)
        validated += 0.0 if cluster.is_cpu else CONTEXT + FRAGMENTATION * validated
    return Memory(
        frozen_bytes,
        trained_bytes,
        optimizer,
        gradients,
        buffer_bytes,
        kept + again,
        logits,
        adapters,
        temporaries,
        allowance,
        summit + allowance,
        host,
        validated,
    )


def _parameters(shapes: Shapes, blocks: Sequence[Block], part: range) -> tuple[int, int]:
    """All and trained parameters of a part; embeddings lie where a stack begins, the head where the last one ends."""
    if len(blocks) == len(shapes.blocks):
        return shapes.parameters, shapes.trained
    total = sum(block.parameters for block in blocks)
    trained = sum(block.trained for block in blocks)
    total += shapes.embeddings * any(block.first for block in blocks)
    if part.stop == len(shapes.blocks):
        total += shapes.head or shapes.embeddings * (not any(block.first for block in blocks))
    return total, trained


def _gradient_bytes(layout: Layout, trained: int, owners: int, e: int, precision: str) -> float:
    if layout.strategy == "single":
        return (4.0 + (e if precision == "bf16" else 0)) * trained
    if layout.strategy == "pipeline":  # ZeRO-1 keeps whole gradients, and whole float32 sums of them
        return (4.0 + e) * trained
    return 4.0 * trained / owners


def _buffer_bytes(shapes: Shapes, work: Workload, layout: Layout, cluster: Cluster, total: int, trained: int) -> float:
    e, buffers = work.element, layout.buffers
    if layout.strategy == "single":
        return 0.0
    if layout.strategy != "zero3":
        return e * buffers.reduce_bucket * (2 if buffers.overlap else 1)
    live = min(buffers.live + buffers.prefetch, total) + shapes.largest_gathered
    copy = e * total / min(cluster.gpus_per_node, layout.gpus) if layout.hpz else 0.0
    return e * (buffers.reduce_bucket + min(live, total)) + copy


def _messages(shapes: Shapes, work: Workload, layout: Layout) -> float:
    """Bytes that a stage receives and sends, forward and back: the residual stream and the decoder's memory."""
    if layout.stages == 1:
        return 0.0
    return 4.0 * boundary_bytes(shapes, work)


def boundary_bytes(shapes: Shapes, work: Workload) -> int:
    """Bytes that pass from stage to stage for one micro-batch: hidden states, memory and encoded instructions."""
    tokens = work.examples * (max(work.source, work.target) + work.source) + work.tasks * work.instruction
    return work.element * tokens * shapes.d_model


def _activations(
    shapes: Shapes, work: Workload, blocks: Sequence[Block], in_flight: int
) -> tuple[float, float, float, float]:
    """Bytes on one part of the model: activations kept, one block's recomputed, logits, adapters and what is theirs."""
    whole = [activations.block_bytes(shapes, block, work) for block in blocks]
    if work.checkpointing:
        kept, again = float(sum(activations.checkpoint_bytes(shapes, block, work) for block in blocks)), max(whole)
    else:
        kept, again = float(sum(whole)), 0
    kept *= in_flight
    kept += activations.memory_tensor_bytes(shapes, work) * in_flight
    kept += activations.instruction_bytes(shapes, work) * in_flight * len(blocks) / len(shapes.blocks)
    last = blocks[-1] is shapes.blocks[-1]
    own = adapter_elements((site for block in blocks for site in block.sites), shapes.rank)
    everything = max(1, adapter_elements((site for block in shapes.blocks for site in block.sites), shapes.rank))
    adapters = 2.0 * activations.adapter_bytes(shapes, work) * in_flight
    adapters = (adapters + activations.alignment_bytes(shapes, work)) * own / everything
    return kept, again, activations.logit_bytes(shapes, work) if last else 0.0, adapters
