"""A process of its own: one batch answered in float32, and the peak of its memory on the processor beside the weights.

python -m tests.plan.answer_memory '{"size": [...], "work": {...}}'   prints bytes, as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tagi_ds.model.inference import Inference
from tagi_ds.plan.answering import Answering
from tests.plan.models import make_model
from tests.plan.step_memory import resident


def main(task: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _answer(make_model().eval(), Answering(2, 4, 4, 4))  # libraries, once
    model = make_model(tuple(task["size"])).eval()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest resident size starts anew
    before = resident("VmRSS")
    _answer(model, Answering(**task["work"]))
    return {"bytes": resident("VmHWM") - before}


def _answer(model: Any, work: Answering) -> None:
    ids = torch.randint(2, 1000, (work.examples, work.source))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    instruction = torch.randint(2, 1000, (1, work.instruction))
    asked = {"instruction_ids": instruction, "instruction_attention_mask": torch.ones_like(instruction)}
    with Inference(model) as inference:
        inference.generate({"input_ids": ids, "attention_mask": mask, **asked}, work.target, work.target, work.beams)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
