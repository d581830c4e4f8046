"""FLOPs of the plan against those that torch counts while a real model runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tagi_ds.engine.flops import FlopMeter
from tagi_ds.plan.operations import count_operations
from tagi_ds.plan.shapes import shapes_of
from tagi_ds.plan.workload import Workload
from tests.plan.models import TINY, make_batch, make_model

SMALL = (2000, 192, 32, 6, 512, 4)


def counted(size: tuple[int, ...], work: Workload, kind: str, settings: dict[str, Any]) -> tuple[float, float]:
    model = make_model(size, kind, **settings)
    if work.checkpointing:
        model.backbone.gradient_checkpointing_enable()
    meter = FlopMeter()
    with meter.counting():
        model(**make_batch(work, size[0])).logits.float().logsumexp(-1).sum().backward()
    return count_operations(shapes_of(model.backbone, model), work).total.total, meter.flops


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fusion": False},
        {"concatenate": False},
        {"head": "slot"},
        {"pooling": "mean"},
        {"sites": ["q", "k", "v", "o", "wi", "wo"]},
        {"also_train": "norms"},
    ],
)
def test_frozen_backbones_are_counted_exactly(kind: str, settings: dict[str, Any]) -> None:
    reckoned, real = counted(TINY, Workload(4, 4, 12, 20, 7, False, "fp32"), kind, settings)
    assert reckoned == real


@pytest.mark.parametrize("settings", [{}, {"fusion": False}, {"pooling": "mean"}])
def test_a_sharded_hypernetwork_has_a_gradient_of_its_input(settings: dict[str, Any]) -> None:
    work, model = Workload(4, 4, 12, 20, 7, False, "fp32", sharded=True), make_model(**settings)
    model.parameters_are_sharded = True
    meter = FlopMeter()
    with meter.counting():
        model(**make_batch(work, TINY[0])).logits.float().logsumexp(-1).sum().backward()
    assert count_operations(shapes_of(model.backbone, model), work).total.total == meter.flops


def test_what_was_encoded_before_is_not_counted() -> None:
    work = Workload(4, 2, 12, 20, 7, False, "fp32", instruction_cache=True)
    model, batch, counts = make_model(), make_batch(work, TINY[0]), []
    for encoding in (None, torch.randn(2, 12, TINY[1])):
        meter = FlopMeter()
        with meter.counting():
            model(**batch, instruction_encoding=encoding).logits.float().logsumexp(-1).sum().backward()
        counts.append(meter.flops)
    shapes = shapes_of(model.backbone, model)
    in_the_step = count_operations(shapes, replace(work, instruction_cache=False))
    assert counts[0] - counts[1] == in_the_step.total.total - count_operations(shapes, work).total.total > 0
    assert not count_operations(shapes, work).instruction
    # An encoder that trains encodes in every step whatever is asked for.
    trained = make_model(also_train="norms")
    assert count_operations(shapes_of(trained.backbone, trained), work).instruction


@pytest.mark.parametrize("size", [TINY, SMALL])
@pytest.mark.parametrize(
    ("tasks", "checkpointing", "settings"),
    [
        (2, False, {}),
        (4, True, {}),
        (2, True, {"fusion": False}),
        (4, False, {"a": "shared"}),
        (4, False, {"also_train": "embeddings"}),
        (4, False, {"also_train": "all"}),
    ],
)
def test_all_others_within_two_per_cent(
    size: tuple[int, ...], tasks: int, checkpointing: bool, settings: dict[str, Any]
) -> None:
    work = Workload(4, tasks, 24, 48, 12, checkpointing, "fp32")
    reckoned, real = counted(size, work, "gated-gelu", settings)
    assert reckoned == pytest.approx(real, rel=0.02)


def test_the_head_reads_the_targets_that_count() -> None:
    model, work = make_model(), Workload(4, 2, 12, 10, 6, False, "fp32")
    shapes = shapes_of(model.backbone, model)
    whole, some = (count_operations(shapes, replace(work, counted=read)) for read in (None, 9))
    assert some.head.total * work.examples * work.target == whole.head.total * 9
    assert some.total.total - some.head.total == whole.total.total - whole.head.total
