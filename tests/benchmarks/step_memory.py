"""Peak memory of one training step, in a process of its own, with the project's losses or with full logits."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from tagi_ds.build import build_tagi
from tagi_ds.config import LossConfig
from tagi_ds.data.examples import Batch
from tagi_ds.divergence import StoredDistributions
from tagi_ds.engine.distributed import quieten_libraries
from tagi_ds.objectives import TagiObjective
from tests.benchmarks.speed_study import Study, Training
from tests.benchmarks.whole_logits import WholeLogits

TASKS, ENTRIES = 4, 12
LOSS = LossConfig(kl=5.0)


def peaks(study: Study, form: str, recompute: bool) -> dict[str, float]:
    """Bytes and seconds of a step in a fresh process.

    Args:
        study: with its backbone made.
        form: `own`, the project's losses, or `full`.
        recompute: activations in the backward pass.

    Returns:
        "peak": most bytes during a step behind the first, beyond those of the process after its imports (weights,
        optimizer and activations); "beyond_model": beyond those before that step; "seconds": its time.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        # Settings of this process, such as its threads, do not reach the new one.
        asked = (study.root, study.sni, study.size_name, form, recompute, torch.get_num_threads())
        return pool.submit(_measure, *asked).result()


def _measure(root: Path, sni: Path, size: str, form: str, recompute: bool, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    quieten_libraries()
    transformers.utils.logging.disable_progress_bar()
    imported = _status("VmRSS")
    study = Study(root, sni, size)
    config = study.config()
    model = build_tagi(config)
    kind = {"own": TagiObjective, "full": WholeLogits}[form]
    if recompute:
        model.backbone.gradient_checkpointing_enable()
    examples, targets = study.size.grid
    few = _batch(study, TASKS, targets)
    training = Training(model, kind(LOSS, model.config.scaling), lambda batch: batch, [[few]])
    # The first step makes the optimizer's state, which a small batch does as well.
    training()
    training.work = [[_batch(study, examples, targets)]]
    ctypes.CDLL(None).malloc_trim(0)
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    training()
    seconds = time.perf_counter() - began
    peak = _status("VmHWM")
    return {"peak": peak - imported, "beyond_model": peak - held, "seconds": seconds}


def _batch(study: Study, examples: int, targets: int) -> Batch:
    """SNI's instructions, its inputs cut at so many tokens as a target has (their mean), targets of one length and
    stored distributions for all of them.
    """
    batch = study.collator("hypernetwork", study.config())(study.chunks(TASKS, examples // TASKS)[0])
    batch.input_ids, batch.attention_mask = batch.input_ids[:, :targets], batch.attention_mask[:, :targets]
    generator = torch.Generator().manual_seed(0)
    vocabulary = study.size.shape["vocab_size"]
    batch.labels = torch.randint(3, vocabulary, (examples, targets), generator=generator)
    scores = torch.randn(examples, targets, ENTRIES + 1, generator=generator).log_softmax(-1)
    # Distinct tokens: a random start and steps that do not come around.
    ids = torch.randint(0, vocabulary, (examples, targets, 1), generator=generator) + 7 * torch.arange(ENTRIES)
    listed = scores[..., :ENTRIES]
    batch.teacher["distributions"] = StoredDistributions(
        ids % vocabulary, listed.exp(), listed, scores[..., -1].exp(), torch.ones(examples, dtype=torch.bool)
    )
    return batch


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
