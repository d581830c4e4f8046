"""Bytes on one GPU while a study is evaluated: every process holds a whole copy of the model and answers by itself.

With P parameters, e bytes an element, N examples of L input tokens that are answered together, T tokens of an answer:

* weights: e·P. In float32 the adapters of one task are merged, which lays other weights beside, e·d_out·d_in a site.
* compiled tasks: what a process keeps of them, and one more.
* encoder: attention (q, k, v) with the mask laid over the position bias, e·N·heads·L·L, twice while it is made
  contiguous; or the feed-forward.
* decoder: keys and values of inputs and answers in every layer, 2·e·N·(L + T)·inner (the answers' in buffers that are
  doubled as they fill; one layer's are there twice meanwhile), the encoded inputs, and the scores of N tokens; of
  answer choices those of N·T tokens, twice in float32. Beams are rows of their own, which have the instruction's keys
  and values each.

The peak is the weights with the larger of the two. TAGI is reckoned: its backbone alone, whose input holds the
instruction and is cut to the same length, needs less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tagi_ds.config import RunConfig
from tagi_ds.model.compiled import KEPT_BYTES
from tagi_ds.model.precision import DTYPES, Precision
from tagi_ds.plan.activations import forward_elements
from tagi_ds.plan.cluster import Cluster
from tagi_ds.plan.memory import CONTEXT, FRAGMENTATION, largest_fitting
from tagi_ds.plan.shapes import Shapes, adapter_elements, count_model

_FIRST_BUFFER = 16


@dataclass(frozen=True)
class Answering:
    """What is answered together, each length at its limit.

    Attributes:
        examples: N, or so many answer choices.
        instruction, source, target: S, L, T in tokens.
        beams: 1 is greedy.
        ranked: whether examples have answer choices.
    """

    examples: int
    instruction: int
    source: int
    target: int
    beams: int = 1
    ranked: bool = False


@dataclass(frozen=True)
class AnsweringMemory:
    """Bytes on one GPU, see the module."""

    weights: float
    merged: float
    tasks: float
    encoder: float
    decoder: float
    peak: float


@dataclass(frozen=True)
class AnsweringRow:
    """A precision, reckoned.

    Attributes:
        memory: with `evaluation.batch_examples` of the recipe.
        largest: most examples together that fit; 0: not even one.
    """

    precision: Precision
    memory: AnsweringMemory
    largest: int


@dataclass(frozen=True)
class AnsweringPlan:
    """An evaluation on a cluster.

    Attributes:
        auto: what `evaluation.precision: auto` is there.
        chosen: what the recipe's is.
    """

    cluster: Cluster
    shapes: Shapes
    work: Answering
    rows: list[AnsweringRow]
    auto: Precision
    chosen: AnsweringRow
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Whether the recipe's batch can be answered in the recipe's precision."""
        return self.chosen.largest >= self.work.examples


def plan_answering(config: RunConfig, cluster: Cluster) -> AnsweringPlan:
    """Reckons both precisions of an evaluation on a cluster's GPUs; loads nothing.

    Args:
        config: resolved for evaluation.
        cluster: whose GPUs are alike.

    Raises:
        UserError: the backbone is not known.
    """
    shapes, data, asked = count_model(config, "finetune"), config.data, config.evaluation
    lengths = (data.max_source_tokens, data.max_source_tokens, data.max_target_tokens)
    work = Answering(asked.batch_examples, *lengths, asked.beams, data.p3_dir is not None)
    rows: list[AnsweringRow] = []
    for precision in ("bf16", "fp32"):
        memory = answering_memory(shapes, work, precision, cluster.is_cpu)
        rows.append(AnsweringRow(precision, memory, _largest(shapes, work, precision, cluster)))
    # A GPU without units for bf16 is no faster in it.
    auto: Precision = "bf16" if not cluster.is_cpu and cluster.tflops_bf16 > cluster.tflops_fp32 else "fp32"
    wanted = auto if asked.precision == "auto" else asked.precision
    chosen = next(row for row in rows if row.precision == wanted)
    plan = AnsweringPlan(cluster, shapes, work, rows, auto, chosen, [])
    plan.advice.extend(_advise(plan))
    return plan


def answering_memory(shapes: Shapes, work: Answering, precision: Precision, cpu: bool = False) -> AnsweringMemory:
    """Memory of one process, every length at its limit."""
    e = DTYPES[precision].itemsize
    weights = e * shapes.parameters
    sites = [site for block in shapes.blocks for site in block.sites]
    merged = e * sum(site.d_in * site.d_out for site in sites) if precision == "fp32" else 0
    tasks = KEPT_BYTES + e * _task_elements(shapes, work)
    encoder = e * forward_elements(shapes, work.examples, work.source, e)
    decoder = e * (cache_elements(shapes, work) + 2 * work.examples * work.beams * _buffer(work) * shapes.inner)
    tokens = work.examples * (work.target if work.ranked else work.beams)
    decoder += tokens * shapes.vocabulary * (e + (8 if work.ranked else 0))
    summit = weights + merged + tasks + max(encoder, decoder)
    allowance = 0.0 if cpu else CONTEXT + FRAGMENTATION * summit
    return AnsweringMemory(weights, merged, tasks, encoder, decoder, summit + allowance)


def cache_elements(shapes: Shapes, work: Answering) -> int:
    """Elements of the decoder's caches and of the encoded inputs, at the end of the longest answers."""
    rows = work.examples * work.beams
    keys = work.source + (work.instruction if shapes.concatenate and work.beams > 1 else 0)
    of_layer = 2 * rows * (keys + _buffer(work)) * shapes.inner
    return len(shapes.decoder) * of_layer + rows * work.source * shapes.d_model


def _buffer(work: Answering) -> int:
    """Tokens for which an answer's keys and values have room in the end."""
    return int(_FIRST_BUFFER * 2 ** math.ceil(math.log2(max(1.0, work.target / _FIRST_BUFFER))))


def _task_elements(shapes: Shapes, work: Answering) -> int:
    """Of one compiled task: adapters, fusion's and the decoder's keys and values of the instruction, and itself."""
    adapters = adapter_elements((site for block in shapes.blocks for site in block.sites), shapes.rank)
    fusion = 2 * shapes.fusion_inner * sum(1 for block in shapes.encoder if block.fusion)
    front = 2 * shapes.inner * len(shapes.decoder) * shapes.concatenate
    return adapters + work.instruction * (fusion + front + shapes.d_model)


def _largest(shapes: Shapes, work: Answering, precision: Precision, cluster: Cluster) -> int:
    def fits(examples: int) -> bool:
        together = Answering(examples, work.instruction, work.source, work.target, work.beams, work.ranked)
        return answering_memory(shapes, together, precision, cluster.is_cpu).peak <= cluster.memory

    return largest_fitting(fits)


def _advise(plan: AnsweringPlan) -> list[str]:
    chosen, batch, room = plan.chosen, plan.work.examples, plan.cluster.memory_gb
    said = [f"evaluation.precision auto is {plan.auto} there; every process holds a whole copy and answers by itself."]
    peak = f"{chosen.memory.peak / 1e9:.1f} GB"
    if plan.fits:
        said.append(f"In {chosen.precision} {batch} examples together take at most {peak} of {room:.0f}.")
        if chosen.largest > batch:
            said.append(f"Up to {chosen.largest:,} fit at the longest; shorter ones take less.")
    elif chosen.largest:
        said.append(
            f"In {chosen.precision} {batch} examples at their longest take {peak} of {room:.0f}: should memory not do, "
            f"set evaluation.batch_examples {chosen.largest}."
        )
    else:
        other = next(row for row in plan.rows if row is not chosen)
        mend = f"set evaluation.precision {other.precision}" if other.largest else "take GPUs with more memory"
        said.append(
            f"Nothing can be answered in {chosen.precision}: not even one example fits into {room:.0f} GB, where the "
            f"weights take {chosen.memory.weights / 1e9:.1f}; {mend}. More GPUs do not help: the model is not sharded."
        )
    return said
