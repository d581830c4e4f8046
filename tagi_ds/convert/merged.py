"""An instruction's LoRA merged into the backbone: an ordinary T5 folder, answered by everything that reads T5."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.convert.hugging_face import Form, restore_plain_config
from tagi_ds.convert.model_folder import write_prompt
from tagi_ds.convert.peft_adapter import missing_parts
from tagi_ds.convert.run_weights import merge
from tagi_ds.convert.shards import ShardWriter
from tagi_ds.files import whole_folder
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.compiled import CompiledTask


@torch.no_grad()
def export_merged(
    model: TagiForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    compiled: CompiledTask,
    folder: Path,
    form: Form | None = None,
    prompt: DataConfig | None = None,
) -> str | None:
    """Writes the backbone with W + scaling · B·A in the place of each adapted W; no TAGI code is needed to read it.

    The model is in memory already, since it has compiled the task; beside it one file's tensors are held at a time.

    Args:
        model: which compiled the task.
        tokenizer: written beside it.
        compiled: the task.
        folder: written whole; replaced if it exists.
        form: types and file sizes.
        prompt: the wording in which inputs are read, recorded beside the weights; None: unknown.

    Returns:
        What the folder lacks to be the whole model, in words; None where it answers as the model does.

    Raises:
        UserError: the folder cannot be written.
    """
    form = form or Form()
    note = missing_parts(model, "merged model", own_backbone=True)
    adapters, scaling = compiled.state.adapters, model.config.scaling
    with whole_folder(folder) as aside:
        writer = ShardWriter(aside, form.shard_bytes, form.dtype)
        for name, parameter in model.backbone.named_parameters():
            adapter = adapters.get(name.removesuffix(".weight"))
            writer.add(name, parameter if adapter is None else merge(parameter, adapter.a[0], adapter.b[0], scaling))
        writer.close()
        config = model.backbone.config
        config.dtype = form.dtype or torch.float32
        config.save_pretrained(aside)
        restore_plain_config(aside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(aside)
        if prompt is not None:
            write_prompt(aside, prompt)
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(_card(model, compiled, note), encoding="utf-8")
    return note


def _card(model: TagiForConditionalGeneration, compiled: CompiledTask, note: str | None) -> str:
    quoted = "\n".join(f"> {line}" for line in compiled.instruction.strip().splitlines()) or "> (given as token ids)"
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "# A backbone with the LoRA of an instruction merged in",
        "",
        quoted,
        "",
        f"Backbone: `{model.config.backbone_name or 'unnamed'}`, rank {model.config.rank}, alpha "
        f"{model.config.alpha:g}, {len(compiled.state.adapters)} changed linears. It answers this one task, given bare "
        "inputs; no task instance was used. The wording around an input, as in training, is in `tagi_prompt.json`; the "
        "pipeline of `tagi_ds.convert.text_pipeline` adds it.",
        "",
        *([f"**{note}**", ""] if note else []),
        "```python",
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)
