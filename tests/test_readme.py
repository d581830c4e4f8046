"""The README tells the truth: what it names is there, its commands parse, its Python runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerBase

from launchers import answer, monitor, prepare, report, submit
from tagi_ds import recipe
from tagi_ds.config import STAGES, DataConfig
from tagi_ds.convert.model_folder import write_prompt
from tagi_ds.data import __main__ as data_command
from tagi_ds.data import program_tasks
from tagi_ds.errors import UserError
from tagi_ds.evaluation import __main__ as evaluation_command
from tagi_ds.experiments import command as study_command
from tagi_ds.launch import REAL_DATA
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.plan import command as plan_command
from tagi_ds.prepare.plan import read_plan
from tagi_ds.teachers import __main__ as teachers_command
from tests.distributed import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()]
NAMED = sorted(set(re.findall(r"(?:launchers|tagi_ds|docs|ds_configs|tests)/[\w/.]*", TEXT)) | {"LICENSE", "Makefile"})


def test_it_shows_every_launcher_and_recipe() -> None:
    shown = "\n".join(COMMANDS)
    assert [path.name for path in (ROOT / "launchers").glob("*.py") if f"launchers/{path.name}" not in shown] == []
    recipes = (ROOT / "launchers" / "recipes").glob("*.yaml")
    assert [path.name for path in recipes if f"launchers/recipes/{path.name}" not in TEXT] == []


@pytest.mark.parametrize("name", NAMED)
def test_what_it_names_is_there(name: str) -> None:
    assert (ROOT / name.rstrip(".")).exists()


def test_it_quotes_the_studys_main_table() -> None:
    main = json.loads((ROOT / "docs" / "study.json").read_text(encoding="utf-8"))["parts"]["main"]
    for name, scores in main["methods"].items():
        about, unseen = main["about"][name], scores["unseen"]
        low, high = unseen["interval"]
        cells = [f"{scores[group]['mean']:.1f}" for group in ("seen", "unseen_arguments", "unseen_compositions")]
        cells += [f"{unseen['mean']:.1f} ({low:.1f} to {high:.1f})"]
        cells += [f"{about['relative_inference'][at]:.2f}" for at in main["lengths"]]
        cells += [f"{about['flops']['all'] / 1e12:.1f}"]
        assert f"| {about['title']} | {' | '.join(cells)} |\n" in TEXT


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "deepspeed":
        accelerators, rest = (words[2], words[3:]) if words[1] == "--num_accelerators" else ("1", words[1:])
        assert accelerators in ("1", "2")
        _check_stage(rest[0], rest[1:])
    elif words[:2] == ["python", "launchers/answer.py"]:
        assert answer._parser().parse_args(words[2:]).input
    elif words[:2] == ["python", "launchers/quickstart.py"]:
        assert recipe.parse("backbone", words[2:], ROOT / "launchers/recipes/quickstart.yaml").scale == 0.02
    elif words[:3] == ["python", "-m", "tagi_ds.data.program_tasks"]:
        given = []
        monkeypatch.setattr(program_tasks, "generate", lambda *a: given.append(a) or SimpleNamespace(groups={}))
        monkeypatch.setattr(sys, "argv", words[2:])
        program_tasks.main()
        assert given == [(Path(words[3]), 1)]
    elif words[:4] == ["python", "-m", "tagi_ds.data", "inspect"]:
        # It would fetch the recipe's tokenizer.
        assert recipe.parse("finetune", words[4:]).config.data.sni_dir
    elif words[:4] == ["python", "-m", "tagi_ds.data", "validate"]:
        assert data_command.main(words[3:]) == 2
        assert "is missing" in capsys.readouterr().err
    elif words[:2] == ["python", "launchers/prepare.py"]:
        options, rest = prepare.parser().parse_known_args(words[2:])
        assert "finetune" in read_plan(rest, corpus=options.c4_shards != 0).configs
    elif words[:2] == ["python", "launchers/submit.py"]:
        _check_submission(words[2:], capsys)
    elif words[:2] == ["python", "launchers/report.py"]:
        monkeypatch.chdir(tmp_path)
        assert report.main(words[2:]) == 2
        assert "nothing in runs/sni_base is evaluated yet" in capsys.readouterr().err
    elif words[0] == "sbatch":
        script = next(word for word in words if word.endswith(".sbatch"))
        assert Path(script).is_file()
        _check_stage(f"launchers/{Path(script).stem}.py", ["--config", *words[words.index(script) + 1 :]])
    elif words[:2] == ["python", "launchers/monitor.py"]:
        assert monitor.parser().parse_args(words[2:]).study_dir == monitor.DEFAULT_STUDY
    elif words[:2] == ["python", "launchers/study.py"]:
        options, fields = study_command.parser().parse_known_args(words[2:])
        named = study_command.named_study(options, fields)
        assert study_command.asked_parts(named, options.part)
    elif words[:2] == ["python", "launchers/plan.py"]:
        plan_command.run(words[2:], ROOT / "launchers/recipes/quickstart.yaml")
    elif words[:3] == ["python", "-m", "tagi_ds.evaluation"]:
        assert evaluation_command.main(words[3:]) == 2, "there are neither predictions nor results here"
    elif words[:3] == ["python", "-m", "tagi_ds.teachers"]:
        monkeypatch.chdir(tmp_path)
        refused = {"verify": 1, "import": 2}[words[3]]
        assert teachers_command.main(words[3:]) == refused, "there are neither stores nor adapters here"
    else:
        assert words[0] == "make"
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if not REAL_DATA[stage].startswith("(")])
def test_the_commands_that_launchers_print_for_real_data_parse(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _check_stage(f"launchers/{stage}.py", shlex.split(REAL_DATA[stage]))


def _check_stage(launcher: str, arguments: list[str]) -> None:
    stage = Path(launcher).stem
    assert (ROOT / launcher).is_file()
    assert stage in STAGES
    parsed = recipe.parse(stage, arguments, ROOT / "launchers/recipes/quickstart.yaml")
    assert parsed.recipe_path is not None
    assert parsed.is_default == ("--config" not in arguments)


def _check_submission(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] in ("status", "logs", "cancel"):
        assert submit.main(words) == 2
        assert "no jobs were submitted for runs/sni_base" in capsys.readouterr().err
        return
    assert submit.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("#!/usr/bin/env bash") == 7


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(UserError, match=r"--data\.sni_folder"):
        _check_stage("launchers/finetune.py", ["--data.sni_folder", "natural-instructions"])


def test_its_python_runs(
    tiny_tagi: TagiForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts, ids = [block for language, block in BLOCKS if language == "python"]
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/quickstart/convert/model")
    tiny_tagi.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_prompt(folder, DataConfig(max_target_tokens=5))
    exec(compile(texts, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 2
    names: dict = {}
    exec(compile(ids, "README.md", "exec"), names)
    assert len(names["answers"]) == 2
    assert names["task"].instruction == "move the colour to the front"
    assert Path("colour_to_front.safetensors").is_file()
    assert capsys.readouterr().out.startswith("[")


def test_it_has_a_place_for_the_results() -> None:
    assert TEXT.index("<!-- results -->") < TEXT.index("<!-- /results -->")
