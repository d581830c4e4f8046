"""A generated adapter as an ordinary PEFT LoRA folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from tagi_ds.errors import UserError
from tagi_ds.files import whole_folder
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.backbone import backbone_class
from tagi_ds.model.compiled import CompiledTask


def export_adapter(
    model: TagiForConditionalGeneration, tokenizer: Any, instruction: str | CompiledTask, folder: Path
) -> str | None:
    """Writes the LoRA that `model` generates for an instruction; `peft.PeftModel.from_pretrained` loads it.

    Args:
        model: in evaluation mode or not; it is left as it was.
        tokenizer: for a text; unused for a compiled task.
        instruction: the instruction in the wording of the training, or the task compiled from it.
        folder: written whole; replaced if it exists.

    Returns:
        What the adapter lacks to be the whole model, in words; None where backbone + adapter equal the model.

    Raises:
        UserError: the model generates no LoRA, or the folder cannot be written.
    """
    if not model.site_table:
        raise UserError("this model has no adapter sites: it generates no LoRA", "use --convert.to compiled")
    compiled = instruction if isinstance(instruction, CompiledTask) else model.compile_task(instruction, tokenizer)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=model.config.rank,
        lora_alpha=model.config.alpha,  # type: ignore[arg-type]  # any number scales
        target_modules=[site.name for site in model.site_table],
        base_model_name_or_path=model.config.backbone_name,
        inference_mode=True,
    )
    tensors = _peft_tensors(compiled)
    _check_names(model, config, tensors)
    note = missing_parts(model)
    with whole_folder(folder) as aside:
        config.save_pretrained(str(aside))
        save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
        (aside / "README.md").write_text(_card(model, compiled, note), encoding="utf-8")
    return note


def missing_parts(
    model: TagiForConditionalGeneration, what: str = "PEFT adapter", own_backbone: bool = False
) -> str | None:
    """What `what` lacks of the model, in words; None where it lacks nothing.

    Args:
        model: which generated it.
        what: its name.
        own_backbone: whether it holds the model's own backbone, rather than lying on the plain one that the training
            began with.
    """
    config, parts = model.config, []
    if config.fusion:
        parts.append("instruction fusion in the encoder")
    if config.concatenate:
        parts.append("the encoded instruction before the decoder's memory (concatenation)")
    if config.also_train != "nothing" and not own_backbone:
        parts.append(f"the backbone parameters that were trained too (also_train: {config.also_train})")
    if not parts:
        return None
    return (
        f"This {what} is not the whole model: it lacks {' and '.join(parts)}. "
        "Its answers differ from the model's. Use the compiled task instead: "
        "launchers/convert.py --convert.to compiled, answered by launchers/answer.py --task."
    )


def _peft_tensors(compiled: CompiledTask) -> dict[str, Tensor]:
    """PEFT's names: A (r, d_in) and B (d_out, r) of each site."""
    tensors = {}
    for site, (a, b) in compiled.state.adapters.items():
        tensors[f"base_model.model.{site}.lora_A.weight"] = a[0].detach().cpu().clone().contiguous()
        tensors[f"base_model.model.{site}.lora_B.weight"] = b[0].detach().cpu().clone().contiguous()
    return tensors


def _check_names(model: TagiForConditionalGeneration, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Lets peft itself adapt an empty copy of the backbone, which must ask for exactly these tensors."""
    sub = model.config.backbone_config
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that are about to change
        empty = backbone_class(sub.model_type, model.config.own_head)(sub)
        # peft narrows target_modules of the object it is given.
        adapted = get_peft_model(empty, LoraConfig(**{**config.to_dict(), "inference_mode": False}))
    expected = {name: value.shape for name, value in get_peft_model_state_dict(adapted).items()}
    if expected != {name: value.shape for name, value in tensors.items()}:
        raise RuntimeError(f"peft expects other tensors: {sorted(set(expected) ^ set(tensors))[:4]}")


def _card(model: TagiForConditionalGeneration, compiled: CompiledTask, note: str | None) -> str:
    base = model.config.backbone_name or "BACKBONE"
    quoted = "\n".join(f"> {line}" for line in compiled.instruction.strip().splitlines()) or "> (given as token ids)"
    lines = [
        "---",
        "library_name: peft",
        "---",
        "# A LoRA adapter generated from an instruction",
        "",
        quoted,
        "",
        f"Backbone: `{base}`, rank {model.config.rank}, alpha {model.config.alpha:g}, "
        f"{len(compiled.state.adapters)} adapted linears. No task instance was used.",
        "",
        *([f"**{note}**", ""] if note else []),
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForSeq2SeqLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained("{base}"), "THIS FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)
