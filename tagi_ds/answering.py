"""Answering bare inputs by a converted model under one instruction."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from tagi_ds.convert.model_folder import ModelFolder, load_model_folder, text_task
from tagi_ds.errors import UserError
from tagi_ds.model.compiled import CompiledTask
from tagi_ds.model.inference import Inference
from tagi_ds.model.precision import DTYPES, Asked, native_precision

BATCH, WINDOW = 32, 256
"""Inputs that are answered together, and among how many those of like lengths are looked for."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        given: the bare input.
        text: the answer.
        seconds: time from input to answer; of those answered together, an equal share.
    """

    given: str
    text: str
    seconds: float


class Answerer:
    """A loaded model and one compiled task.

    Args:
        loaded: the model.
        task: compiled by that model.
        seconds: time that compiling (or reading) the task took.
    """

    def __init__(self, loaded: ModelFolder, task: CompiledTask, seconds: float) -> None:
        self.loaded, self.task, self.seconds = loaded, task, seconds

    @classmethod
    def open(
        cls,
        folder: Path,
        instruction: str | None,
        task_file: Path | None,
        backbone: Path | str | None = None,
        precision: Asked = "auto",
    ) -> Answerer:
        """Loads a model folder and compiles `instruction`, or reads the compiled task of `task_file`.

        Args:
            folder: of a converted model.
            instruction, task_file: one of them.
            backbone: where the backbone lies now, if the folder holds a hypernetwork alone.
            precision: ``auto`` is bf16 on a GPU that computes in it, and elsewhere what the folder says.

        Raises:
            UserError: no TAGI model there, an empty instruction, no or another model's compiled task.
        """
        if (instruction is None) == (task_file is None):
            raise UserError("give an instruction or a compiled task, one of them", "--instruction TEXT or --task FILE")
        task = None if instruction is None else text_task(instruction)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if precision == "auto" and native_precision(device) == "bf16":
            precision = "bf16"
        loaded = load_model_folder(folder, device, backbone, DTYPES.get(precision))
        began = time.perf_counter()
        if task is not None:
            compiled = loaded.compile(task)
        else:
            assert task_file is not None
            if not task_file.is_file():
                mend = "check --task, or write one: launchers/convert.py --convert.to compiled"
                raise UserError(f"the compiled task {task_file} is missing", mend)
            compiled = CompiledTask.load(task_file, loaded.model)
        return cls(loaded, compiled, time.perf_counter() - began)

    def answer(self, given: str, max_new_tokens: int | None = None, beams: int = 1) -> Answer:
        """Answers one input.

        Args:
            given: the bare input.
            max_new_tokens: longest answer; default the training's longest target.
            beams: 1 is greedy.
        """
        return next(self.answer_all([given], max_new_tokens, beams))

    def answer_all(self, given: Sequence[str], max_new_tokens: int | None = None, beams: int = 1) -> Iterator[Answer]:
        """Answers inputs, in their order; those of like lengths together.

        Args:
            given: bare inputs.
            max_new_tokens, beams: as in :meth:`answer`.
        """
        most = max_new_tokens or self.loaded.prompt.max_target_tokens
        for first in range(0, len(given), WINDOW):
            window = given[first : first + WINDOW]
            lengths = [len(text) for text in window]
            order = sorted(range(len(window)), key=lambda at: -lengths[at])
            found: dict[int, Answer] = {}
            with Inference(self.loaded.model) as inference:
                for start in range(0, len(order), BATCH):
                    chosen = order[start : start + BATCH]
                    answers = self._together(inference, [window[at] for at in chosen], most, beams)
                    found |= zip(chosen, answers, strict=True)
            yield from (found[at] for at in range(len(window)))

    def _together(self, inference: Inference, given: Sequence[str], most: int, beams: int) -> list[Answer]:
        began = time.perf_counter()
        rows = [self.loaded.input_ids(text)[0] for text in given]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.loaded.model.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "task": self.task.state}
        tokens = inference.generate(inputs, most, beams=beams)
        texts = self.loaded.tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
        seconds = (time.perf_counter() - began) / len(given)
        return [Answer(one, text.strip(), seconds) for one, text in zip(given, texts, strict=True)]
