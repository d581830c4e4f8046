"""The plan's memory against what a real step takes on the processor, and how its kinds move with the layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tagi_ds.plan import activations
from tagi_ds.plan.cluster import read_cluster
from tagi_ds.plan.layout import Layout
from tagi_ds.plan.memory import memory_of
from tagi_ds.plan.shapes import shapes_of
from tagi_ds.plan.workload import Workload
from tests.distributed import ROOT
from tests.plan.models import TINY, make_batch, make_model

# Vocabulary, d_model, head width, heads, d_ff, layers; the backbones have 12M, 59M, 182M and 914M parameters.
SMALL = (8000, 256, 32, 8, 768, 4)
MIDDLE = (16000, 512, 64, 8, 1280, 6)
BASE = (32128, 768, 64, 12, 2048, 8)
LARGE = (32128, 1280, 64, 20, 3456, 18)
WORKS = {
    "15M": (SMALL, Workload(8, 8, 96, 192, 48, False, "fp32", cpu=True)),
    "15M recomputed": (SMALL, Workload(16, 16, 96, 256, 48, True, "fp32", cpu=True)),
    "70M shared instructions": (MIDDLE, Workload(6, 3, 96, 160, 32, False, "fp32", cpu=True)),
    "211M": (BASE, Workload(4, 4, 64, 128, 32, False, "fp32", cpu=True)),
}


def measured(size: tuple[int, ...], work: Workload, hypernetwork: dict[str, Any]) -> int:
    task = {"size": size, "settings": hypernetwork, "work": asdict(work)}
    # Freed tensors go back to the system at once, so that the peak is that of tensors and not of the allocator's store.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.plan.step_memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def planned(size: tuple[int, ...], work: Workload, hypernetwork: dict[str, Any]) -> float:
    model = make_model(size, device="meta", **hypernetwork)
    shapes = shapes_of(model.backbone, model)
    return memory_of(shapes, work, Layout("single", 1), read_cluster("cpu"), accumulation=1).peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("name", [*WORKS, pytest.param("1B", marks=pytest.mark.slow)])
def test_the_peak_of_a_real_step_is_within_15_per_cent(name: str) -> None:
    size, work = WORKS.get(name, (LARGE, Workload(2, 2, 96, 256, 64, False, "fp32", cpu=True)))
    hypernetwork = {"rank": 16, "bottleneck": 16}
    assert planned(size, work, hypernetwork) == pytest.approx(measured(size, work, hypernetwork), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "tasks", "padded", "hypernetwork"),
    [
        ("gated-gelu", 4, True, {}),
        ("gated-silu", 4, False, {}),
        ("relu", 2, True, {}),
        ("gated-gelu", 4, True, {"fusion": False, "concatenate": False}),
        ("gated-gelu", 4, True, {"sites": ["q", "k", "v", "o", "wi", "wo"]}),
        ("gated-gelu", 4, True, {"also_train": "norms"}),
    ],
)
def test_activations_are_the_tensors_that_autograd_keeps(
    dtype: torch.dtype, kind: str, tasks: int, padded: bool, hypernetwork: dict[str, Any]
) -> None:
    model = make_model(TINY, kind, **hypernetwork).to(dtype)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    work = Workload(4, tasks, 12, 20, 7, False, precision, cpu=True, padded=padded)
    shapes = shapes_of(model.backbone, model)
    kept = sum(activations.block_bytes(shapes, block, work) for block in shapes.blocks)
    kept += activations.memory_tensor_bytes(shapes, work) + activations.instruction_bytes(shapes, work)
    kept += activations.adapter_bytes(shapes, work)
    assert kept == pytest.approx(_saved_bytes(model, make_batch(work, TINY[0])), rel=0.06)


def _saved_bytes(model: torch.nn.Module, batch: dict[str, Any]) -> int:
    """Bytes of the storages that autograd and the tasks' state keep for a backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Without labels, whose plain loss training never takes.
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        state = model(**given, decoder_input_ids=batch["labels"].clamp_min(0)).state
    for factors in (*state.adapters.values(), *state.fusion.values()):
        for tensor in factors:
            note(tensor)
    return sum(storage.nbytes() for storage in storages.values())


def peak(layout: Layout, work: Workload, cluster: str = "8xH100", accumulation: int = 1) -> Any:
    model = make_model(BASE, device="meta")
    shapes = shapes_of(model.backbone, model)
    stages = [range(0, 8), range(8, 16)] if layout.stages == 2 else []
    return memory_of(shapes, work, layout, read_cluster(cluster), accumulation, stages)


@settings(max_examples=10, deadline=None)
@given(
    examples=st.integers(1, 16),
    more=st.integers(1, 16),
    lengths=st.tuples(*[st.integers(1, 512)] * 3),
    precision=st.sampled_from(["bf16", "fp32"]),
)
def test_more_examples_never_take_less_and_recomputation_never_more(
    examples: int, more: int, lengths: tuple[int, int, int], precision: str
) -> None:
    for layout in (Layout("zero2", 8), Layout("zero3", 8), Layout("pipeline", 8, 2)):
        work = Workload(examples, examples, *lengths, False, precision)
        assert peak(layout, work).peak <= peak(layout, work.sized(examples + more)).peak
        again = Workload(examples, examples, *lengths, True, precision)
        # One block stands twice for a moment: its input and what is recomputed from it.
        slack = work.element * examples * max(lengths[1:]) * (4 * 2048 + 32 * 768) + 1e6
        assert peak(layout, again).peak <= 1.05 * (peak(layout, work).peak + slack)


def test_sharding_divides_what_it_says_it_divides() -> None:
    work = Workload(1, 1, 64, 64, 16, True, "bf16")
    single, zero2, zero3 = (
        peak(Layout(name, gpus), work) for name, gpus in (("single", 1), ("zero2", 8), ("zero3", 8))
    )
    assert zero2.frozen == single.frozen == 8 * zero3.frozen
    assert single.optimizer == 8 * zero2.optimizer == 8 * zero3.optimizer
    assert zero2.gradients == zero3.gradients < single.gradients / 8
    hpz = peak(Layout("zero3", 32, hpz=True), work, "4x8xH100")
    # Its second copy is an eighth of the bf16 parameters, and the rest is as without it.
    plain = peak(Layout("zero3", 32), work, "4x8xH100")
    whole = 32 * (plain.frozen + plain.trained)
    assert hpz.buffers - plain.buffers == pytest.approx(whole / 8)


def test_a_pipeline_holds_as_many_micro_batches_as_it_has_stages() -> None:
    work = Workload(2, 2, 64, 64, 16, False, "bf16")
    one, two, four = (peak(Layout("pipeline", 8, 2), work, accumulation=m) for m in (1, 2, 4))
    assert one.activations < two.activations == four.activations
