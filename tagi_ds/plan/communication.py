"""Bytes that GPUs exchange in a step, and the seconds that it takes.

A collective over W GPUs moves (W - 1) / W of its volume into each GPU over its node's links, and (n - 1) / n of it
into each of n nodes over the network; the slower of the two counts. An all-reduce moves twice that.

ZeRO-2 reduces the trained gradients after every micro-batch — by an all-reduce, DeepSpeed's default
(`use_multi_rank_bucket_allreduce`) — and gathers the trained parameters after a step. ZeRO-3 gathers the encoder for
the instructions where the step encodes them, the whole model for the forward and again for the backward pass
(recomputation shares that one), and scatters the gradients. hpZ gathers within each node from its second copy, in the
forward pass too: a frozen parameter's copy never expires, a trained one's does with the optimizer's step, so that what
trains is gathered over all nodes once a step (DeepSpeed 0.19.8, `all_gather_coalesced`, `invalidate_secondary_tensor`).
What is offloaded passes between each GPU and its host besides, a shard in every gathering, a share of the gradients
down and of the parameters up again; beside the gathering, so that the slower of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tagi_ds.plan.cluster import Cluster
from tagi_ds.plan.layout import Layout
from tagi_ds.plan.memory import boundary_bytes
from tagi_ds.plan.shapes import Shapes
from tagi_ds.plan.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Volumes of collectives in bytes, and seconds of them.

    Attributes:
        gathered: parameters that ZeRO-3 gathers for one micro-batch.
        gather_s: of those.
        reduced: gradients that are reduced a micro-batch (in a pipeline: a step).
        reduce_s: of those.
        updated_s: gathering updated parameters after a step; under hpZ, what that takes beyond gathering in a node.
        passed, pass_s: what one pipeline stage hands to the next for a micro-batch, forward and back.
    """

    gathered: float = 0.0
    gather_s: float = 0.0
    reduced: float = 0.0
    reduce_s: float = 0.0
    updated_s: float = 0.0
    passed: float = 0.0
    pass_s: float = 0.0


def collective_s(cluster: Cluster, volume: float, gpus: int, within_node: bool = False) -> float:
    """Seconds of an all-gather or reduce-scatter of `volume` bytes over `gpus` GPUs."""
    if gpus <= 1:
        return 0.0
    if within_node:
        gpus = min(gpus, cluster.gpus_per_node)
    nodes = -(-gpus // cluster.gpus_per_node)
    inside = volume * (gpus - 1) / gpus / (cluster.link_gbs * 1e9)
    between = volume * (nodes - 1) / nodes / (cluster.network_gbs * 1e9)
    return max(inside if cluster.gpus_per_node > 1 else 0.0, between)


def backbone_gather(shapes: Shapes, element: int) -> float:
    """Bytes of gathering a sharded backbone twice, for the forward and the backward pass."""
    return 2.0 * element * shapes.backbone


def traffic_of(shapes: Shapes, work: Workload, layout: Layout, cluster: Cluster) -> Traffic:
    """What a layout exchanges for one micro-batch, and after a step."""
    e = work.element
    gradients = float(e * shapes.trained)
    if layout.strategy == "zero2":
        reduce_s = 2 * collective_s(cluster, gradients, layout.gpus)
        updated_s = collective_s(cluster, gradients, layout.gpus)
        share_s = _host_s(cluster, gradients / layout.gpus, layout.buffers.offload_optimizer)
        return Traffic(reduced=gradients, reduce_s=max(reduce_s, share_s), updated_s=updated_s + share_s)
    if layout.strategy == "zero3":
        encodes = work.tasks and not (work.instruction_cache and shapes.encoding_is_constant)
        encoder = sum(block.backbone for block in shapes.encoder) + shapes.embeddings if encodes else 0
        forward, backward = float(e * (shapes.parameters + encoder)), float(e * shapes.parameters)
        gather_s = collective_s(cluster, forward + backward, layout.gpus, within_node=layout.hpz)
        # Of the gathers counted there, a step's first of what trains goes over all nodes.
        renewed_s = collective_s(cluster, gradients, layout.gpus)
        renewed_s -= collective_s(cluster, gradients, layout.gpus, within_node=layout.hpz)
        shards_s = _host_s(cluster, (forward + backward) / layout.gpus, layout.buffers.offload_parameters)
        share_s = _host_s(cluster, gradients / layout.gpus, layout.buffers.offload_optimizer)
        return Traffic(
            gathered=forward + backward,
            gather_s=max(gather_s, shards_s),
            reduced=gradients,
            reduce_s=max(collective_s(cluster, gradients, layout.gpus), share_s),
            updated_s=share_s + renewed_s,
        )
    if layout.strategy == "pipeline":
        return _pipeline(shapes, work, layout, cluster, gradients)
    return Traffic()


def _host_s(cluster: Cluster, volume: float, offloaded: bool) -> float:
    """Seconds of `volume` bytes between one GPU and its host."""
    return volume / (cluster.host_gbs * 1e9) if offloaded else 0.0


def _pipeline(shapes: Shapes, work: Workload, layout: Layout, cluster: Cluster, gradients: float) -> Traffic:
    own = gradients / layout.stages
    passed = 2.0 * boundary_bytes(shapes, work)
    within = layout.stages <= cluster.gpus_per_node
    bandwidth = cluster.link_gbs if within else min(cluster.link_gbs, cluster.network_gbs / cluster.gpus_per_node)
    gather_s = _replicas_s(layout, cluster, own)
    return Traffic(
        reduced=own,
        reduce_s=2 * gather_s,
        updated_s=gather_s,
        passed=passed,
        pass_s=passed / (bandwidth * 1e9),
    )


def _replicas_s(layout: Layout, cluster: Cluster, volume: float) -> float:
    """Seconds of gathering `volume` bytes over a stage's replicas, which are a pipeline's length apart.

    Replicas of several stages lie in one node and share its network.
    """
    replicas = layout.replicas
    if replicas <= 1:
        return 0.0
    in_node = max(1, cluster.gpus_per_node // layout.stages)
    nodes = -(-replicas // in_node)
    inside = volume * (replicas - 1) / replicas / (cluster.link_gbs * 1e9) if in_node > 1 else 0.0
    sharing = min(layout.stages, cluster.gpus_per_node)
    return max(inside, sharing * volume * (nodes - 1) / nodes / (cluster.network_gbs * 1e9))
