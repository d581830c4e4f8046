"""A compiled task as two torch.export programs, which run by torch alone: no transformers, no code of ours.

The instruction's adapters, fusion memory and decoder memory are constants of the programs; inputs are of any number and
length. Encoder: (input_ids, attention_mask) -> (memory, memory_mask). Decoder: (memory, memory_mask,
decoder_input_ids) -> logits; the instruction's part of what it attends to is in its constants, and in the mask before
the input's. The decoder keeps no cache: each token costs a pass over those before it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, save
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.convert.model_folder import write_prompt
from tagi_ds.files import whole_folder
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.compiled import CompiledTask

ENCODER, DECODER = "encoder.pt2", "decoder.pt2"


class _Encoder(nn.Module):
    """F of bare inputs and the mask of [I ; F]. It owns what it runs, not the generator, which has done its work."""

    def __init__(self, model: TagiForConditionalGeneration, task: CompiledTask) -> None:
        super().__init__()
        self.encoder, self.fusion = model.backbone.encoder, model.hypernetwork.fusion
        self._run, self._state = model.encode_input, task.state

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(input_ids, attention_mask, self._state)


class _Decoder(nn.Module):
    """Logits of tokens, given the encoder's memory."""

    def __init__(self, model: TagiForConditionalGeneration, task: CompiledTask) -> None:
        super().__init__()
        self.decoder, self.head = model.backbone.decoder, model.backbone.lm_head
        self._run, self._state = model.forward, task.state

    def forward(self, memory: Tensor, memory_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        output = self._run(
            state=self._state,
            encoder_outputs=(memory,),  # type: ignore[arg-type]
            attention_mask=memory_mask,
            decoder_input_ids=decoder_input_ids,
        )
        assert output.logits is not None
        return output.logits


def export_programs(model: TagiForConditionalGeneration, task: CompiledTask) -> tuple[ExportedProgram, ExportedProgram]:
    """The encoder's and the decoder's program of a task, for inputs of any number and length.

    Args:
        model: in evaluation mode, on the device on which the programs are to run.
        task: compiled by that model.
    """
    assert task.state.mask is not None
    device = model.device
    examples, length, tokens = Dim("examples"), Dim("length"), Dim("tokens")
    attended: Any = length + task.state.mask.shape[1] if model.config.concatenate else length
    ids = torch.ones(3, 7, dtype=torch.long, device=device)
    with torch.no_grad():
        encoder = _Encoder(model, task).eval()
        inputs = {0: examples, 1: length}
        first = export(encoder, (ids, ids.clone()), dynamic_shapes=(inputs, inputs))
        memory, mask = encoder(ids, ids.clone())
        shapes: Any = (inputs, {0: examples, 1: attended}, {0: examples, 1: tokens})
        second = export(_Decoder(model, task).eval(), (memory, mask, ids[:, :4].contiguous()), dynamic_shapes=shapes)
    return first, second


def export_task(
    model: TagiForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    task: CompiledTask,
    folder: Path,
    prompt: DataConfig,
) -> None:
    """Writes both programs, the tokenizer and the wording.

    Args:
        model, task: of :func:`export_programs`.
        tokenizer: written beside them.
        folder: written whole; replaced if it exists.
        prompt: the wording in which inputs are read.

    Raises:
        UserError: the folder cannot be written.
    """
    programs = dict(zip((ENCODER, DECODER), export_programs(model, task), strict=True))
    with whole_folder(folder) as aside, warnings.catch_warnings():
        # torch remarks on views of a common tensor, such as a task's factors are.
        warnings.simplefilter("ignore", UserWarning)
        for name, program in programs.items():
            save(program, aside / name)
        tokenizer.save_pretrained(aside)
        write_prompt(aside, prompt)
        start, end = model.config.decoder_start_token_id, model.config.eos_token_id
        (aside / "README.md").write_text(_card(task, start, end), encoding="utf-8")


def _card(task: CompiledTask, start: int | None, end: int | list | None) -> str:
    quoted = "\n".join(f"> {line}" for line in task.instruction.strip().splitlines()) or "> (given as token ids)"
    return f"""# A task compiled from its instruction, as torch.export programs

{quoted}

They need torch alone. `input_ids` and `attention_mask` are int64 of shape (examples, length), padded right; the wording
around an input is in `tagi_prompt.json`. A greedy answer:

```python
import torch

encoder, decoder = (torch.export.load(f"FOLDER/{{name}}.pt2").module() for name in ("encoder", "decoder"))
memory, mask = encoder(input_ids, attention_mask)
tokens = torch.full((len(input_ids), 1), {start})
for _ in range(32):
    tokens = torch.cat([tokens, decoder(memory, mask, tokens)[:, -1:].argmax(-1)], dim=1)  # ends with token {end}
```
"""
