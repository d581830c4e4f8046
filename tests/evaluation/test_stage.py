"""The stage: rows of every method and control, what is added to a results file, and which models are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.engine.distributed import current
from tagi_ds.errors import UserError
from tagi_ds.evaluation.__main__ import main
from tagi_ds.evaluation.results import gather_results
from tagi_ds.files import read_json, write_json
from tagi_ds.launch import Stage
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone
from tagi_ds.stages import evaluate as stage
from tagi_ds.stages import evaluated_models
from tests.teachers.conftest import make_tasks, write_sni

_CONTROLS = (" (random instruction)", " (shuffled instruction)")


@pytest.fixture(scope="module")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sni(tmp_path_factory.mktemp("sni") / "data", make_tasks(4, 8))
    names = (folder / "splits" / "default" / "train_tasks.txt").read_text().split()
    (folder / "splits" / "default" / "train_tasks.txt").write_text(names[0])
    (folder / "splits" / "default" / "test_tasks.txt").write_text("\n".join(names[1:]))
    return folder


@pytest.fixture
def config(sni: Path, tiny_folder: Path, tmp_path: Path) -> RunConfig:
    config = RunConfig(study_dir=str(tmp_path / "study"), seed=3)
    config.model.backbone, config.model.rank, config.model.bottleneck = str(tiny_folder), 2, 8
    config.data.sni_dir, config.data.prompt, config.data.validation_tasks = str(sni), "plain", 0
    config.data.max_source_tokens, config.data.max_target_tokens = 32, 4
    config.data.max_instances = 2
    config.evaluation.max_instances, config.evaluation.batch_examples = 5, 4
    return config


def _save(model: TagiForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _run(config: RunConfig) -> dict[str, Any]:
    return stage.run(Stage("evaluate", config, current(), Path(config.study_dir) / "evaluate"))


def test_every_method_has_its_rows_and_its_file(
    config: RunConfig,
    tiny_tagi: TagiForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.evaluation.methods = {"plain": str(tiny_folder), "tagi": _save(tiny_tagi, tiny_tokenizer, tmp_path / "m")}
    config.evaluation.controls = ["random", "shuffled"]
    config.data.positives = 2
    summary = _run(config)
    rows = [f"{method}{row}" for method in ("plain", "tagi") for row in ("", *_CONTROLS)]
    assert list(summary["metrics"]) == rows
    folder = Path(config.study_dir) / "evaluate"
    assert set(gather_results(Path(config.study_dir))["methods"]) == set(rows)
    written = {row: read_json(folder / row / "results.json") for row in rows}
    for row, results in written.items():
        assert (results["method"], results["split"], results["setting"]) == (row, "default", "Def")
        assert results["instruction"] == next((name for name in ("random", "shuffled") if name in row), "own")
        assert results["examples"] == 15
        assert list(results["intervals"]["test"]) == ["exact_match", "rouge_l"]
        assert results["leaks"]["test"]["instruction"]["shared"] == 0
        assert "left_out" not in results
        lines = (folder / row / "leaderboard" / "test.jsonl").read_text().splitlines()
        # data.max_instances, which draws training instances, has no say in which are tested.
        assert [json.loads(line)["id"] for line in lines] == [f"task{t}-{at}" for t in (1, 2, 3) for at in range(5)]
    for method in ("plain", "tagi"):
        own = written[method]
        for name, suffix in zip(("random", "shuffled"), _CONTROLS, strict=True):
            told = own["controls"][name]["test"]["rouge_l"]
            assert told["score"] == written[f"{method}{suffix}"]["metrics"]["test"]["rouge_l"]
            assert told["difference"] == pytest.approx(own["metrics"]["test"]["rouge_l"] - told["score"])
            assert 0 < told["p_value"] <= 1
    assert "flops" not in written["plain"], "a plain model costs what concatenation costs"
    assert written["tagi"]["flops"]["test"]["examples"] == 5
    assert (written["plain"]["form"], written["tagi"]["form"]) == ("concatenated", "hypernetwork")
    assert [row for row in rows if (folder / row / "adapters_map.json").exists()] == ["tagi"]
    assert "relative to the concatenated instruction" in capsys.readouterr().out
    paths = [str(folder / method / "results.json") for method in ("tagi", "plain")]
    assert main(["compare", *paths, "--output", str(tmp_path / "compared.json")]) == 0
    compared = read_json(tmp_path / "compared.json")["test"]["rouge_l"]
    assert compared["first"] == written["tagi"]["metrics"]["test"]["rouge_l"]
    assert compared["tasks"] == 3
    assert "sign-flip" in compared["test"]


def test_the_setting_is_what_the_prompt_shows() -> None:
    shown = DataConfig(positives=2, negatives=1, explanations=True)
    assert stage.setting_name(shown) == "Def + 2 Pos + 1 Neg + Expl"
    assert stage.setting_name(DataConfig(positives=2)) == "Def + 2 Pos"
    assert stage.setting_name(DataConfig(explanations=True)) == "Def"
    assert stage.setting_name(replace(shown, prompt="plain")) == "Def"


def test_run_again_it_leaves_the_same_bytes(
    config: RunConfig,
    sni: Path,
    tiny_tagi: TagiForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    config.data.sni_dir, config.data.malformed = str(shutil.copytree(sni, tmp_path / "sni")), "skip"
    french, broken, poor = (tmp_path / f"sni/tasks/{name}.json" for name in ("french", "broken", "task1"))
    french.write_text(json.dumps(read_json(poor) | {"Output_language": ["French"]}))
    broken.write_text("{")
    poor.write_text(json.dumps(read_json(poor) | {"Instances": [{}, *read_json(poor)["Instances"]]}))
    with (tmp_path / "sni/splits/default/test_tasks.txt").open("a") as split:
        split.write("\nfrench\nbroken")
    config.evaluation.methods = {"tagi": _save(tiny_tagi, tiny_tokenizer, tmp_path / "m")}
    config.evaluation.controls, config.evaluation.max_instances = ["shuffled"], 2
    _run(config)
    file = Path(config.study_dir) / "evaluate" / "tagi" / "results.json"
    first = file.read_bytes()
    assert json.loads(first)["left_out"] == {
        "test": {"malformed": {"task1": 1, "broken": 1}, "gone": ["broken"], "other_languages": ["french"]}
    }
    _run(config)
    assert file.read_bytes() == first, "answers and costs are taken over"
    shutil.rmtree(file.parent)
    _run(config)
    again, before = read_json(file), json.loads(first)
    assert again.pop("cost")
    assert before.pop("cost")
    assert again == before


def test_all_methods_and_later_starts_answer_in_one_precision(
    config: RunConfig,
    tiny_tagi: TagiForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tagi = _save(tiny_tagi, tiny_tokenizer, tmp_path / "m")
    config.evaluation.methods = {"plain": str(tiny_folder), "tagi": tagi, "untrained": stage.UNTRAINED}
    config.evaluation.max_instances = 2
    folder, loaded = Path(config.study_dir) / "evaluate", []
    load = stage.load_method

    def noting(*given: Any) -> Any:
        model, identity = load(*given)
        loaded.append({parameter.dtype for parameter in model.parameters()})
        return model, identity

    def answers() -> tuple[set[str], set[str]]:
        """Of all methods the precision, and the keys of the answers."""
        results = [read_json(folder / method / "results.json") for method in config.evaluation.methods or {}]
        lines = [line for file in folder.glob("*/predictions/*.jsonl") for line in file.read_text().splitlines()]
        return {each["precision"] for each in results}, {json.loads(line)["key"] for line in lines}

    monkeypatch.setattr(stage, "load_method", noting)
    monkeypatch.setattr(evaluated_models, "native_precision", lambda device: "bf16")
    _run(config)
    (precisions, narrow), bf16 = answers(), [{torch.bfloat16}] * 3
    assert (precisions, loaded) == ({"bf16"}, bf16)
    # Another machine goes on in what the first one chose; a method that is done is not done again.
    monkeypatch.undo()
    monkeypatch.setattr(stage, "load_method", noting)
    (folder / "tagi" / "results.json").unlink()
    _run(config)
    assert (loaded, answers()) == ([*bf16, {torch.bfloat16}], ({"bf16"}, narrow))
    # In another precision nothing of it is taken over.
    config.evaluation.precision = "fp32"
    _run(config)
    precisions, wide = answers()
    assert (precisions, loaded[4:]) == ({"fp32"}, [{torch.float32}] * 3)
    assert not wide & narrow
    cost = read_json(folder / "tagi" / "results.json")["flops"]["test"]["operations"]
    assert cost["compiled"] < cost["concatenated"]


def test_a_model_that_no_gpu_takes_is_refused_before_it_is_loaded(
    config: RunConfig, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.evaluation.methods, config.evaluation.precision = {"plain": str(tiny_folder)}, "bf16"
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 10**9))
    monkeypatch.setattr(stage, "load_method", lambda *_: pytest.fail("it is loaded"))
    ranks = replace(current(), device=torch.device("cuda", 0))
    with pytest.raises(
        UserError, match=r"^plain \(.*own_head\) has 0\.0 GB of weights in bf16, and 0\.0 of 1\.0 GB are"
    ):
        stage.run(Stage("evaluate", config, ranks, Path(config.study_dir) / "evaluate"))


def test_a_model_of_another_backbone_is_refused(
    config: RunConfig,
    tiny_tagi: TagiForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tied_folder: Path,
    tmp_path: Path,
) -> None:
    config.evaluation.methods = {"tagi": _save(tiny_tagi, tiny_tokenizer, tmp_path / "m")}
    config.model.backbone = str(tied_folder)
    with pytest.raises(UserError, match=r"tagi \(.*\) was trained on another backbone than .*tied") as caught:
        _run(config)
    assert "--model.backbone" in caught.value.mend


def test_a_model_of_another_kind_is_refused(config: RunConfig, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_folder, folder)
    settings = read_json(folder / "config.json")
    config.evaluation.methods = {"other": str(folder)}
    write_json(folder / "config.json", settings | {"model_type": "gpt2"})
    with pytest.raises(UserError, match="'gpt2' are not supported"):
        _run(config)


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(
    config: RunConfig, tiny_folder: Path, tmp_path: Path
) -> None:
    model = load_backbone(tiny_folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    config.evaluation.methods = {"small": str(tmp_path / "small")}
    with pytest.raises(UserError, match=r"small \(.*\) knows 100 pieces, but the study's tokenizer has \d+"):
        _run(config)


def test_results_of_other_tasks_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, group: str, tasks: dict[str, int]) -> str:
        per_task = {task: {"rouge_l": 50.0, "examples": examples} for task, examples in tasks.items()}
        results = {"metrics": {group: {"rouge_l": 50.0}}, "per_task": {group: per_task}}
        write_json(tmp_path / name, results)
        return str(tmp_path / name)

    first = write("a.json", "test", {"x": 5, "y": 5})
    for second, said in (
        (write("b.json", "test", {"x": 5}), "only"),
        (write("c.json", "test", {"x": 5, "y": 6}), "y has 5 examples"),
        (write("d.json", "seen", {"x": 5, "y": 5}), "has the groups test"),
    ):
        assert main(["compare", first, second]) == 2
        assert said in capsys.readouterr().err
    write_json(tmp_path / "e.json", {"methods": {}})
    assert main(["compare", first, str(tmp_path / "e.json")]) == 2
    assert "no results file" in capsys.readouterr().err
