"""The plan of an evaluation: caches as they are, what fits where, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tagi_ds.files import read_json
from tagi_ds.model.compiled import KEPT_BYTES
from tagi_ds.model.decoder_rows import DecoderRows
from tagi_ds.model.merging import merged
from tagi_ds.plan import command
from tagi_ds.plan.answering import Answering, AnsweringPlan, answering_memory, cache_elements, plan_answering
from tagi_ds.plan.cluster import read_cluster
from tagi_ds.plan.memory import largest_fitting
from tagi_ds.plan.shapes import shapes_of
from tests.distributed import ROOT
from tests.plan.models import make_model
from tests.plan.test_advice import read
from tests.plan.test_memory import SMALL

XXL = ROOT / "launchers" / "recipes" / "sni_xxl.yaml"


def plan_of(cluster: str, *flags: str, memory_gb: float | None = None) -> AnsweringPlan:
    asked = read_cluster(cluster)
    asked = asked if memory_gb is None else replace(asked, memory_gb=memory_gb)
    return plan_answering(read("sni_xxl", *flags, stage="evaluate"), asked)


@torch.no_grad()
@pytest.mark.parametrize("target", [5, 20])
def test_caches_are_as_large_as_reckoned(target: int) -> None:
    model = make_model().eval()
    work = Answering(examples=3, instruction=7, source=9, target=target)
    ids = torch.randint(2, 1000, (1, work.instruction))
    state = model.compile_instructions(ids, torch.ones_like(ids))
    memory, mask = torch.randn(3, 9, 64), torch.ones(3, 9, dtype=torch.long)
    rows = DecoderRows(model.backbone, memory, mask, state, model.config.scaling, True)
    for _ in range(target):
        rows.step(torch.zeros(3, dtype=torch.long))
    held = [memory, *(tensor for layer in rows.layers for tensor in (*layer.inputs, *layer.tokens))]
    assert cache_elements(shapes_of(model.backbone, model), work) == sum(tensor.numel() for tensor in held)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("work", [Answering(16, 64, 512, 8), Answering(64, 64, 64, 256)], ids=["inputs", "answers"])
def test_the_peak_of_an_answered_batch_is_within_12_per_cent(work: Answering) -> None:
    task = {"size": SMALL, "work": asdict(work)}
    # Freed tensors go back to the system at once, so that the peak is that of tensors and not of the allocator's store.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    process = [sys.executable, "-m", "tests.plan.answer_memory", json.dumps(task)]
    done = subprocess.run(process, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    model = make_model(SMALL, device="meta")
    memory = answering_memory(shapes_of(model.backbone, model), work, "fp32", cpu=True)
    # One task is kept, not as many as there would be room for.
    planned = memory.peak - memory.weights - KEPT_BYTES
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] == pytest.approx(planned, rel=0.12)


@torch.no_grad()
def test_float32_reckons_the_merged_weights() -> None:
    model = make_model(sites=["q", "wi"]).eval()
    shapes, work = shapes_of(model.backbone, model), Answering(2, 4, 4, 4)
    ids = torch.ones(1, 4, dtype=torch.long)
    own = {id(parameter) for parameter in model.parameters()}
    with merged(model, model.compile_instructions(ids, ids)):
        beside = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in own)
    wide, narrow = (answering_memory(shapes, work, precision, cpu=True) for precision in ("fp32", "bf16"))
    assert (wide.merged, narrow.merged) == (beside, 0)
    assert wide.weights == 2 * narrow.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert wide.peak == wide.weights + wide.merged + wide.tasks + max(wide.encoder, wide.decoder)


def test_eleven_billion_fit_on_40_gb_in_bf16_alone() -> None:
    plan = plan_of("1xA100-40G")
    assert (plan.auto, plan.chosen.precision, plan.fits) == ("bf16", "bf16", True)
    assert [row.precision for row in plan.rows if row.largest] == ["bf16"]
    wide = plan_of("8xA100-40G", "--evaluation.precision", "fp32")
    assert not wide.fits
    assert "set evaluation.precision bf16. More GPUs do not help" in wide.advice[-1]
    small = plan_of("8xA100-40G", memory_gb=24)
    assert not small.fits
    assert "take GPUs with more memory" in small.advice[-1]


def test_a_batch_that_is_too_large_is_told_the_largest() -> None:
    plan = plan_of("1xA100-40G", "--evaluation.batch_examples", "64")
    most = plan.chosen.largest
    assert 0 < most < 64
    assert f"set evaluation.batch_examples {most}." in plan.advice[-1]
    assert plan_of("1xA100-40G", "--evaluation.batch_examples", str(most)).fits
    assert not plan_of("1xA100-40G", "--evaluation.batch_examples", str(most + 1)).fits
    beams = plan_of("1xA100-40G", "--evaluation.beams", "4")
    assert beams.chosen.largest < plan_of("1xA100-40G").chosen.largest


def test_processors_and_gpus_without_units_for_bf16_answer_in_float32() -> None:
    assert plan_of("cpu").auto == "fp32"
    config = read("quickstart", stage="evaluate")
    assert plan_answering(config, replace(read_cluster("1xH100"), tflops_bf16=15, tflops_fp32=15)).auto == "fp32"


@pytest.mark.parametrize("most", [0, 1, 6, 7, 8, 100])
def test_the_largest_that_fits(most: int) -> None:
    assert largest_fitting(lambda number: number <= most) == most


def test_the_command_prints_it_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(XXL), "--stage", "evaluate", "--cluster", "1xH100", "--json", str(tmp_path / "plan.json")]
    command.run(flags, XXL)
    shown = " ".join(capsys.readouterr().out.split())
    written = read_json(tmp_path / "plan.json")
    assert "evaluation.precision auto is bf16 there" in shown
    assert f"{written['memory']['fp32']['peak'] / 1e9:.2f}" in shown
    assert (written["precision"], written["fits"], written["work"]["examples"]) == ("bf16", True, 16)
    command.run(["--explain"], XXL)
    assert "keys and values of inputs and answers in every layer" in capsys.readouterr().out
