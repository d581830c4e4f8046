"""A compiled task: what an instruction implies, computed once, kept in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tagi_ds.errors import UserError
from tagi_ds.files import whole_file
from tagi_ds.model.adapter import LowRank, TaskState

if TYPE_CHECKING:
    from tagi_ds.model.tagi import TagiForConditionalGeneration

FORMAT = "tagi_ds compiled task 1"


@dataclass
class CompiledTask:
    """One task, ready to answer inputs.

    Attributes:
        instruction: its text, empty where only ids were known.
        state: adapters (1, r, d_in) and (1, d_out, r) by site, fusion memory, decoder memory. What the first answer
            computes of the latter for the decoder's attention is kept there too; the file does not have it.
        shape: what a model must have to be answered by it (sites, rank, switches, backbone).
    """

    instruction: str
    state: TaskState
    shape: dict[str, Any]

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for site, (a, b) in self.state.adapters.items():
            tensors[f"adapters.{site}.a"], tensors[f"adapters.{site}.b"] = a, b
        for block, (keys, values) in self.state.fusion.items():
            tensors[f"fusion.{block}.keys"], tensors[f"fusion.{block}.values"] = keys, values
        assert self.state.memory is not None
        assert self.state.mask is not None
        tensors["memory"], tensors["mask"] = self.state.memory, self.state.mask
        metadata = {"format": FORMAT, "instruction": self.instruction, "shape": json.dumps(self.shape)}
        with whole_file(Path(path)) as aside:
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, aside, metadata)

    @classmethod
    def load(cls, path: Path | str, model: TagiForConditionalGeneration) -> CompiledTask:
        """Reads a compiled task for `model`.

        Raises:
            UserError: no such file, another kind of file, or a task compiled by another model.
        """
        mend = "compile the instruction again with this model: launchers/convert.py --to compiled"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).to(model.device) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a compiled task: {error}", mend) from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a compiled task", mend)
        shape, expected = json.loads(metadata["shape"]), task_shape(model)
        differing = sorted(key for key in expected if shape.get(key) != expected[key])
        if differing:
            raise UserError(f"{path} was compiled by another model: {', '.join(differing)} differ", mend)
        sites = [name.removeprefix("adapters.").removesuffix(".a") for name in tensors if name.endswith(".a")]
        blocks = [name.removeprefix("fusion.").removesuffix(".keys") for name in tensors if name.endswith(".keys")]
        state = TaskState(
            {site: LowRank(tensors[f"adapters.{site}.a"], tensors[f"adapters.{site}.b"]) for site in sites},
            {block: (tensors[f"fusion.{block}.keys"], tensors[f"fusion.{block}.values"]) for block in blocks},
            tensors["memory"],
            tensors["mask"],
            kept={},
        )
        return cls(metadata["instruction"], state, shape)


def task_shape(model: TagiForConditionalGeneration) -> dict[str, Any]:
    """What ties a compiled task to a model."""
    config = model.config
    keys = ("rank", "alpha", "sites", "fusion", "concatenate", "backbone_hash", "own_head")
    return {key: getattr(config, key) for key in keys} | {"d_model": config.backbone_config.d_model}


@torch.no_grad()
def compile_task(model: TagiForConditionalGeneration, instruction: str | Tensor, tokenizer: Any) -> CompiledTask:
    """Compiles one instruction, given as text or as token ids (S,) or (1, S), with the model in evaluation mode."""
    text = instruction if isinstance(instruction, str) else ""
    if isinstance(instruction, str):
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        instruction = tokenizer(instruction, return_tensors="pt").input_ids
    assert isinstance(instruction, Tensor)
    ids = instruction.reshape(1, -1).to(model.device)
    training = model.training
    model.eval()
    state = model.compile_instructions(ids, torch.ones_like(ids))
    model.train(training)
    state.kept = {}
    return CompiledTask(text, state, task_shape(model))
