"""The words of docs/performance.md: its sections, what each row compares, and remarks on figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

INTRODUCTION = """# Performance

Every figure is the median of runs that took turns with what it is compared with, on one machine; the runs' least and
most stand beside it. A ratio says how the first of a row's two sides stands to the second. `performance.json` holds
all runs. This page is written from it by `python tests/benchmarks/page.py`.

Training and inference are measured with a T5 of 60M parameters and 32,128 tokens with random weights, in fp32, on the
texts of Super-NaturalInstructions; alternatives share backbone, attention kernel, padding and decoding.
"""

GROWTH_PICTURE = (
    "Seconds of a step by what grows (dashed in the picture: what the counted operations alone would take):"
)


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: of the section.
        command: that measures it.
        rows: name in the file -> what it compares, in the table's order.
        picture: file beside the page, or empty.
    """

    title: str
    command: str
    rows: Mapping[str, str]
    picture: str = ""


_OUTPUT = "--output docs/performance.json"
SECTIONS = (
    Section(
        "Training",
        f"python tests/benchmarks/train.py {_OUTPUT} --picture docs/train_speed.png",
        {
            "train_finetune_vs_meta_whole": "finetuning, examples/s, Def + 2 Pos, 8 examples a task, over meta-training"
            " of the whole model with the instruction concatenated",
            "train_finetune_vs_meta_lora": "the same over meta-training with LoRA",
            "train_encoding_in_the_step_vs_once": "finetuning step that encodes its instructions over one that reads"
            " them encoded once",
            "train_distilled_vs_naive": "whole step with stored teachers, examples/s, over the naive form: every"
            " example's instruction encoded, teacher in the step, full logits",
            "train_vs_lora_by_flops_fusion_on": "finetuning step over peft's LoRA on the bare inputs, as a multiple of"
            " the counted operations' ratio, with fusion",
            "train_vs_lora_by_flops_fusion_off": "the same without fusion",
            "inference_relative_flops_def_2_pos": "Two of the eight test tasks have texts that concatenation cuts at 1,024"
    " tokens while TAGI reads instruction and input wholly, in inputs of their own; all eight together are the row below,"
    " and `performance.json` has every task with its lengths. Where an instruction is about as long as an input (`Def`),"
    " little can be saved, and fusion costs some of it.",
    "train_pretrain_vs_lora": "A document's first part is encoded anew in every step, without gradient, beside the"
    " generator and fusion.",
}
"""Row -> what stands in a goal's way, what was tried, or what a figure means."""
