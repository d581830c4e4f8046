"""The answering launcher: answers, times, tasks kept for later, and its errors."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tagi_ds import answering
from tagi_ds.answering import Answerer
from tagi_ds.config import DataConfig
from tagi_ds.convert.model_folder import write_prompt
from tests.conftest import MakeTagi
from tests.distributed import ROOT

INSTRUCTION = "say the lamp again"
ANSWER = r"^(.*?) -> (.*?)   \(\d+ ms\)$"


@pytest.fixture
def model_folder(make_tagi: MakeTagi, tiny_tokenizer: object, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_tagi().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    write_prompt(folder, DataConfig(prompt="tk_instruct", max_target_tokens=5))
    return folder


@pytest.fixture
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("answer", ROOT / "launchers" / "answer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launchers" / "answer.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_it_answers_arguments_a_file_and_what_is_typed(
    model_folder: Path,
    launcher: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, inputs = tmp_path / "task.safetensors", tmp_path / "inputs.txt"
    inputs.write_text("chair\n\nbell box\n")
    model = ["--model", str(model_folder)]
    first = answer(
        *model, "--instruction", INSTRUCTION, "--input", "lamp", "--file", str(inputs), "--save_task", str(task)
    )
    assert first.returncode == 0, first.stderr
    assert re.search(r"task compiled in \d+ ms", first.stdout)
    found = re.findall(ANSWER, first.stdout, re.MULTILINE)
    assert [given for given, _ in found] == ["lamp", "chair", "bell box"]
    assert first.stderr == ""
    # The same from the compiled task, read line by line from a pipe.
    monkeypatch.setattr("sys.stdin", io.StringIO("lamp\n\nchair\nbell box\n"))
    assert launcher.main([*model, "--task", str(task)]) == 0
    typed = capsys.readouterr().out
    assert "task read in" in typed
    assert re.findall(ANSWER, typed, re.MULTILINE) == found


def test_it_reads_texts_in_the_wording_of_the_training(model_folder: Path) -> None:
    answerer = Answerer.open(model_folder, INSTRUCTION, None)
    assert answerer.task.instruction == f"Definition: {INSTRUCTION}.\n\n"
    ids = answerer.loaded.input_ids("lamp")
    wording = answerer.loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert wording.startswith("Now complete the following example")
    assert ids[0, -1] == 1
    long, short = answerer.answer("lamp"), answerer.answer("lamp", max_new_tokens=1)
    assert len(long.text) >= len(short.text)
    assert long.seconds > 0
    generated = answerer.loaded.model.generate(ids, task=answerer.task, max_new_tokens=5)
    assert long.text == answerer.loaded.tokenizer.decode(generated[0], skip_special_tokens=True).strip()


def test_many_inputs_are_answered_together_in_their_order(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "BATCH", 4)
    monkeypatch.setattr(answering, "WINDOW", 6)
    answerer = Answerer.open(model_folder, INSTRUCTION, None)
    texts = [" ".join(["lamp", "chair", "bell box", "say"][: 1 + at % 4] * (1 + at % 3)) for at in range(11)]
    rows: list[int] = []
    answerer.loaded.model.backbone.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = list(answerer.answer_all(texts))
    assert rows == [4, 2, 4, 1]
    assert [one.given for one in found] == texts
    assert [one.text for one in found] == [answerer.answer(text).text for text in texts]
    assert len({one.text for one in found}) > 1
    assert [one.text for one in answerer.answer_all(texts[:3], beams=3)] == [
        answerer.answer(text, beams=3).text for text in texts[:3]
    ]
    assert list(answerer.answer_all([])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--instruction", "x", "--model", "nowhere"],
            r"error: the model folder nowhere is missing\n  mend: .*make quick",
        ),
        (["--instruction", " ", "--model", "MODEL", "--input", "a"], "error: the instruction is empty"),
        (["--task", "absent.safetensors", "--model", "MODEL"], r"absent\.safetensors is missing"),
        (["--instruction", "x", "--model", "PLAIN"], r"config\.json describes a t5 model, not a TAGI model"),
        (["--instruction", "x", "--model", "MODEL", "--file", "absent.txt"], r"cannot read the inputs in absent\.txt"),
        ([], "one of the arguments --instruction --task is required"),
    ],
)
def test_its_errors_name_place_and_mend(
    arguments: list[str],
    message: str,
    model_folder: Path,
    tiny_folder: Path,
    launcher: ModuleType,
    capsys: pytest.CaptureFixture,
) -> None:
    places = {"MODEL": str(model_folder), "PLAIN": str(tiny_folder)}
    try:
        status = launcher.main([places.get(text, text) for text in arguments])
    except SystemExit as leaving:  # argparse's own
        status = int(leaving.code or 0)
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
