"""A compiled task: what an instruction implies, computed once, kept in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tagi_ds.errors import UserError
from tagi_ds.files import whole_file
from tagi_ds.model.adapter import LowRank, TaskState
from tagi_ds.model.backbone import parameters_to_train
from tagi_ds.model.decoder_rows import project_instructions

if TYPE_CHECKING:
    from tagi_ds.model.tagi import TagiForConditionalGeneration

FORMAT = "tagi_ds compiled task 2"
_FORMER = "tagi_ds compiled task 1"
"""Files that do not say which fusion and which weights answer them."""
_SINCE_2 = ("fusion_heads", "fusion_norm", "answering")
_SAMPLED = 1024
"""Values of a parameter that its share of a mark is taken of: training moves all of them."""
KEPT_BYTES = 2_000_000_000
"""Memory for the compiled tasks of one process: at 11B, rank 32 and instructions of 512 tokens some six of them."""


@dataclass
class CompiledTask:
    """One task, ready to answer inputs.

    Attributes:
        instruction: its text, empty where only ids were known.
        state: adapters (1, r, d_in) and (1, d_out, r) by site, fusion memory, decoder memory; and what the decoder's
            attention takes of that, which the file does not have.
        shape: of :func:`task_shape`.
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
        """Reads a compiled task for `model`, whose floating-point type it takes on.

        Raises:
            UserError: no such file, another kind of file, or a task compiled by another model.
        """
        mend = "compile the instruction again with this model: launchers/convert.py --convert.to compiled"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).to(model.device) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a compiled task: {error}", mend) from error
        if metadata.get("format") not in (FORMAT, _FORMER):
            raise UserError(f"{path} is not a compiled task", mend)
        shape, expected = json.loads(metadata["shape"]), task_shape(model)
        if metadata["format"] == _FORMER:
            if expected["answering"] is not None:
                raise UserError(f"{path} is of an earlier version, which did not note whose weights answer it", mend)
            expected = {key: value for key, value in expected.items() if key not in _SINCE_2}
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
        )
        # What another precision's model compiled: the decoder reads I in its weights' type.
        state = _as_type(state, model.dtype)
        model.keep_instructions(state)
        return cls(metadata["instruction"], state, shape)


def task_shape(model: TagiForConditionalGeneration) -> dict[str, Any]:
    """What a model must have to answer a task: sites, rank, switches, fusion, backbone, and what it trained of them."""
    config, fusion = model.config, model.hypernetwork.fusion
    keys = ("rank", "alpha", "sites", "fusion", "concatenate", "backbone_hash", "own_head")
    return {key: getattr(config, key) for key in keys} | {
        "d_model": config.backbone_config.d_model,
        "fusion_heads": None if fusion is None else fusion.layers[0].heads,
        "fusion_norm": None if fusion is None else config.fusion_norm,
        "answering": _mark_of_answering(model),
    }


@torch.no_grad()
def _mark_of_answering(model: TagiForConditionalGeneration) -> str | None:
    """Hex SHA-256 of the trained weights that answer beside the task; None where there are none.

    They are fusion's own attention and what trained of the backbone. Rounded to bfloat16, so that they are the same in
    every type; of each parameter evenly spaced values, so that 11B take a moment.
    """
    answering = {id(parameter) for parameter in parameters_to_train(model.backbone, model.config.also_train)}
    if model.hypernetwork.fusion is not None:
        answering |= {id(parameter) for parameter in model.hypernetwork.fusion.layers.parameters()}
    digest, sampled = hashlib.sha256(), []
    for name, parameter in model.named_parameters():
        if id(parameter) in answering:
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            every = max(1, -(-parameter.numel() // _SAMPLED))
            sampled.append(parameter.flatten()[::every].cpu().bfloat16())
    if not sampled:
        return None
    digest.update(torch.cat(sampled).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


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
    model.keep_instructions(state)
    model.train(training)
    return CompiledTask(text, state, task_shape(model))


class CompiledTasks:
    """Instructions compiled once each, the latest used of them kept.

    Each is compiled by itself and without padding: what it implies does not depend on what it is asked for with.

    Args:
        model: whole on this process, in evaluation mode; its weights do not change meanwhile.
        most_bytes: what is kept, as far as the last ones asked for allow.
    """

    def __init__(self, model: TagiForConditionalGeneration, most_bytes: int = KEPT_BYTES) -> None:
        self._model, self._most = model, most_bytes
        self._states: OrderedDict[bytes, TaskState] = OrderedDict()

    def has(self, instruction_ids: Tensor, instruction_attention_mask: Tensor) -> bool:
        """Whether all of U instructions (U, S) are kept."""
        return all(key in self._states for key, _ in _rows(instruction_ids, instruction_attention_mask))

    @torch.no_grad()
    def of(self, instruction_ids: Tensor, instruction_attention_mask: Tensor) -> TaskState:
        """The state of U instructions (U, S), padded on either side; that of one is the kept one itself."""
        found = []
        for key, real in _rows(instruction_ids, instruction_attention_mask):
            if key not in self._states:
                self._states[key] = self._compile(real[None].to(instruction_ids.device))
            self._states.move_to_end(key)
            found.append(self._states[key])
        taken = sum(map(_bytes, self._states.values()))
        while taken > self._most and len(self._states) > len(found):
            taken -= _bytes(self._states.popitem(last=False)[1])
        return found[0] if len(found) == 1 else stack(found)

    def _compile(self, ids: Tensor) -> TaskState:
        state = self._model.compile_instructions(ids, torch.ones_like(ids))
        if self._model.config.concatenate:
            project_instructions(self._model.backbone, state, self._model.config.scaling)
        return state


def stack(states: Sequence[TaskState]) -> TaskState:
    """One state of U tasks from U states of one task each, in order; shorter instructions are padded right."""
    first = states[0]
    masks = [_mask(state) for state in states]
    longest = max(mask.shape[1] for mask in masks)

    def joined(tensors: Sequence[Tensor | None], axis: int = 1) -> Tensor:
        padded = []
        for tensor in tensors:
            assert tensor is not None
            behind = [0, 0] * (tensor.dim() - 1 - axis) + [0, longest - tensor.shape[axis]]
            padded.append(functional.pad(tensor, behind))
        return torch.cat(padded)

    adapters = {
        site: LowRank(*(torch.cat(parts) for parts in zip(*(state.adapters[site] for state in states), strict=True)))
        for site in first.adapters
    }
    fusion = {
        block: (joined([s.fusion[block][0] for s in states], 2), joined([s.fusion[block][1] for s in states], 2))
        for block in first.fusion
    }
    kept = None
    if all(state.kept is not None for state in states):
        common = set.intersection(*(set(state.kept or {}) for state in states))
        kept = {name: joined([(state.kept or {})[name] for state in states]) for name in sorted(common)}
    return TaskState(adapters, fusion, joined([state.memory for state in states]), joined(masks), kept=kept)


def _rows(ids: Tensor, mask: Tensor) -> list[tuple[bytes, Tensor]]:
    """Of each instruction (S,) a name and its ids without padding, on the host."""
    rows = [row[real] for row, real in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
    return [(row.numpy().tobytes(), row) for row in rows]


def _as_type(state: TaskState, dtype: torch.dtype) -> TaskState:
    assert state.memory is not None
    return replace(
        state,
        adapters={site: LowRank(a.to(dtype), b.to(dtype)) for site, (a, b) in state.adapters.items()},
        fusion={block: (keys.to(dtype), values.to(dtype)) for block, (keys, values) in state.fusion.items()},
        memory=state.memory.to(dtype),
    )


def _mask(state: TaskState) -> Tensor:
    assert state.mask is not None
    return state.mask


def _bytes(state: TaskState) -> int:
    """Memory of a state's tensors."""
    tensors = [state.memory, state.mask, *(state.kept or {}).values()]
    tensors += [part for pair in (*state.adapters.values(), *state.fusion.values()) for part in pair]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
