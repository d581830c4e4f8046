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
            "train_pretrain_vs_lora": "pretraining step over seq2seq training of the same tokens with peft's LoRA",
            "train_16x1_vs_1x16_def_2_pos": "step with 16 tasks of 1 example over 1 task of 16, Def + 2 Pos",
            "train_16x1_vs_1x16_def": "the same, Def",
            "train_full_logits_peak": "peak memory of a step over the same with full logits, 32 x 128 targets,"
            " inputs cut at 128 tokens",
            "train_full_logits_beyond_model": "the same beyond weights and optimizer",
            "train_full_logits_seconds": "the same step's time over full logits",
            "train_full_logits_peak_recomputed": "peak memory, activations recomputed on both sides",
            "train_full_logits_beyond_model_recomputed": "the same beyond weights and optimizer",
            "train_full_logits_seconds_recomputed": "the same step's time",
        },
        "train_speed.png",
    ),
    Section(
        "Inference",
        f"python tests/benchmarks/inference.py {_OUTPUT} --picture docs/inference_speed.png",
        {
            "inference_compiled_vs_concatenation": "compiled task, examples/s, Def + 2 Pos, 100 examples a task, over"
            " concatenation",
            "inference_compiled_vs_bare_by_flops": "compiled task with fusion over the backbone without instruction, as"
            " a multiple of the counted operations' ratio",
            "inference_merged_vs_bare": "merged adapter, no fusion, no concatenation, over the backbone without"
            " instruction",
            "inference_unmerged_vs_bare": "the same, adapter not merged",
            "inference_relative_flops_def_2_pos": "operations of 100 examples a task, the instruction read once, over"
            " concatenation, Def + 2 Pos, test tasks whose texts fit together",
            "inference_relative_flops_def_2_pos_all_tasks": "the same, all test tasks",
            "inference_relative_flops_def": "the same, Def, texts that fit together",
            "inference_relative_flops_def_all_tasks": "the same, Def, all test tasks",
            "inference_mixed_vs_one_task": "batches of several tasks over batches of one task each",
        },
        "inference_speed.png",
    ),
    Section(
        "Growth",
        f"python tests/benchmarks/growth.py {_OUTPUT} --picture docs/growth.png",
        {
            "growth_tasks": "tasks a batch, examples constant",
            "growth_layers": "layers",
            "growth_width": "width",
            "growth_rank": "rank",
            "growth_instruction": "tokens of an instruction",
            "growth_start_vs_imports": "from the imports' end to the first step on a tiny model, over the imports",
            "startup": "seconds from the launcher's first line to the end of that step",
        },
        "growth.png",
    ),
    Section(
        "Distillation",
        f"python tests/benchmarks/distillation.py {_OUTPUT}",
        {
            "store_step_ratio": "step with logit and parameter store over a step without teachers",
            "logit_store_step_ratio": "the same with the logit store alone",
            "store_vs_online": "teacher in the step over the stores",
            "store_bytes_per_token": "bytes a target token in the logit store",
            "store_reads_per_s": "examples read from it a second, 1 reader",
            "store_reads_per_s_8_readers": "the same, 8 readers",
            "store_kl_error": "mean error of the stored divergence, nats a token",
            "teachers_batched": "teachers trained in groups of 8 over one by one",
        },
    ),
    Section(
        "Data",
        f"python tests/benchmarks/data.py {_OUTPUT}",
        {
            "data_tasks_first_batch_s": "seconds to the first batch, 1 GiB of task files",
            "data_tasks_anonymous_mb": "MB of memory",
            "data_tasks_first_batch_growth": "first batch with 16 times the data",
            "data_tasks_resume_growth": "resume with 16 times the data",
            "data_tasks_resume_late_to_early": "resume late over early",
            "data_tasks_tokens_per_s": "tokens a second",
            "data_ids_encode_us": "microseconds to encode an example",
            "data_ids_kept_us": "the same from memory",
            "data_ids_mapped_us": "the same from a mapped file",
            "data_index_build_s": "seconds to build the index, once",
            "data_documents_first_batch_s": "seconds to the first batch, C4's format",
            "data_documents_anonymous_mb": "MB of memory",
            "data_documents_first_batch_growth": "first batch with 16 times the data",
            "data_documents_resume_growth": "resume with 16 times the data",
            "data_documents_resume_late_to_early": "resume late over early",
            "data_documents_tokens_per_s": "tokens a second",
        },
        "data_growth.png",
    ),
)

REMARKS: dict[str, str] = {
    "train_distilled_vs_naive": "Each task is a micro-batch of its own on both sides, as dealing by length has it. The"
    " naive form computes 2.62 times the operations: inputs are read forward and backward on both sides, and that"
    " is most of the step; only longer instructions or teachers larger than the student would bring it to 4.",
    "train_full_logits_peak": "What is left is what attention and feed-forward keep for the backward pass; with these"
    " recomputed the whole logits' share is larger, and the weights and the optimizer's state the rest.",
    "inference_relative_flops_def_2_pos": "Two of the eight test tasks have texts that concatenation cuts at 1,024"
    " tokens, while TAGI reads instruction and input wholly, each by itself; all eight together are the row below, and"
    " `performance.json` has every task with its lengths. Where an instruction is shorter than an input (`Def`), little"
    " can be saved, and fusion costs some of it.",
    "train_pretrain_vs_lora": "A document's first part is encoded anew in every step, without gradient, beside the"
    " generator and fusion.",
}
"""Row -> what stands in a goal's way, what was tried, or what a figure means."""
