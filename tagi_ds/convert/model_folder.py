"""A converted TAGI model in its folder: weights, tokenizer, and the wording under which it was trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Task
from tagi_ds.data.prompts import PROMPT_FIELDS, input_text, instruction_text
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.errors import UserError
from tagi_ds.files import read_json, write_json
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.compiled import CompiledTask

PROMPT_FILE = "tagi_prompt.json"
"""Wording and truncation of the training, beside the weights."""


@dataclass(frozen=True)
class ModelFolder:
    """A loaded TAGI model, in evaluation mode, that reads texts as it did in training.

    Attributes:
        folder: where it was loaded from.
        model, tokenizer: the loaded parts.
        prompt: wording and truncation; the other fields have their defaults.
    """

    folder: Path
    model: TagiForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    prompt: DataConfig

    def compile(self, task: Task) -> CompiledTask:
        """Compiles a task's instruction: its definition and as many positive examples as in training."""
        text = instruction_text(task, 0, self.prompt)
        compiled = self.model.compile_task(self._ids(text, "instruction"))
        return dataclasses.replace(compiled, instruction=text)

    def input_ids(self, given: str) -> Tensor:
        """Token ids (1, L) of one bare input in its wording."""
        return self._ids(input_text(given, self.prompt), "input")

    def _ids(self, text: str, kind: Literal["instruction", "input"]) -> Tensor:
        ids = Collator(self.tokenizer, self.prompt).encode(text, kind)
        return torch.from_numpy(ids).long()[None].to(self.model.device)


def load_model_folder(
    folder: Path,
    device: torch.device | None = None,
    backbone: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> ModelFolder:
    """Loads a folder that :func:`tagi_ds.convert.hugging_face.export_model` wrote.

    Args:
        folder: with a TAGI model, or with a hypernetwork that names its backbone.
        device: by default the CPU.
        backbone: where the named backbone lies now; None: where it lay in training.
        dtype: of the parameters; None: as the folder says.

    Raises:
        UserError: it is missing, damaged, holds no TAGI model, or names a backbone that is not there or another one.
    """
    mend = "name a folder written by launchers/convert.py --convert.to model"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json", mend)
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "tagi":
        raise UserError(f"{folder}/config.json describes a {model_type} model, not a TAGI model", mend)
    prompt = read_prompt(folder)
    try:
        model = TagiForConditionalGeneration.from_pretrained(folder, backbone=backbone, dtype=dtype or "auto")
    except UserError:
        raise
    except Exception as error:
        # Damaged safetensors raise a class of their own, damaged configurations almost any.
        raise UserError(f"cannot load the model in {folder}: {error}", "convert the run again") from error
    model.eval()
    return ModelFolder(folder, model.to(device) if device else model, load_tokenizer(folder), prompt)


def text_task(instruction: str) -> Task:
    """A task of which only the instruction is known.

    Raises:
        UserError: the instruction is empty.
    """
    if not instruction.strip():
        raise UserError("the instruction is empty", "say in a sentence what is to be done with the inputs")
    return Task(name=_slug(instruction), definition=instruction, category="", examples=())


def write_prompt(folder: Path, config: DataConfig) -> None:
    """Writes wording and truncation into a model folder."""
    write_json(folder / PROMPT_FILE, {name: getattr(config, name) for name in PROMPT_FIELDS})


def read_prompt(folder: Path) -> DataConfig:
    """Reads what :func:`write_prompt` wrote.

    Raises:
        UserError: the file is missing or malformed.
    """
    path = folder / PROMPT_FILE
    values: Any = read_json(path)
    if not isinstance(values, dict) or set(values) != set(PROMPT_FIELDS):
        raise UserError(f"{path} does not hold {', '.join(PROMPT_FIELDS)}", "convert the run again")
    return DataConfig(**values)


def _slug(text: str, longest: int = 48) -> str:
    words = "".join(letter.lower() if letter.isalnum() else " " for letter in text).split()
    return "_".join(words)[:longest].rstrip("_") or "task"
