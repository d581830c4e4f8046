"""Recipes and the command line: layers, types, and errors that name their place."""

import re
from pathlib import Path

import pytest
import yaml

from tagi_ds import recipe_rules
from tagi_ds.config import STAGES, RunConfig
from tagi_ds.engine.deepspeed_config import DEFAULTS
from tagi_ds.errors import UserError
from tagi_ds.recipe import field_types, parse, resolve, to_dict
from tagi_ds.recipe_tree import read_merged
from tests.shipped import RECIPES, shipped_settings

RECIPE = """
study_dir: studies/a
seed: 3
data: {tasks_per_batch: 4, max_source_tokens: 64}
optimizer:
  learning_rate: 1e-4
  betas: [0.9, 0.98]
engine: {steps: 100, checkpoint_every: 10}
evaluation:
  groups: {seen: seen_tasks}
stages:
  finetune:
    loss: {kl: 5, alignment: sigmoid}
    engine: {steps: 200}
    evaluation:
      groups: {unseen: unseen_tasks}
  pretrain:
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def _refusal(stage: str, argv: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        parse(stage, argv)
    return str(refused.value)


def test_without_a_recipe_the_fields_keep_their_defaults() -> None:
    parsed = parse("finetune", [])
    assert parsed.is_default
    assert parsed.recipe_path is None
    assert parsed.config == resolve(RunConfig(), "finetune")


def test_layers_are_laid_over_each_other(recipe: Path) -> None:
    finetune = parse("finetune", ["--config", str(recipe), "--engine.checkpoint_every", "7", "--loss.kl=2"])
    config = finetune.config
    assert (finetune.recipe_path, finetune.is_default) == (recipe, False)
    assert (config.engine.steps, config.engine.checkpoint_every, config.loss.kl) == (200, 7, 2.0)
    assert (config.loss.alignment, config.seed, config.data.tasks_per_batch) == ("sigmoid", 3, 4)
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.betas == (0.9, 0.98)
    assert config.evaluation.groups == {"unseen": "unseen_tasks"}, "a table that is a value is replaced, not merged"
    pretrain = parse("pretrain", ["--config", str(recipe)]).config
    assert (pretrain.engine.steps, pretrain.loss.kl, pretrain.evaluation.groups) == (100, 0.0, {"seen": "seen_tasks"})
    assert (pretrain.output_dir, config.output_dir) == ("studies/a/pretrain", "studies/a/finetune")


def test_the_default_recipe_is_read_and_said_to_be_the_default(recipe: Path) -> None:
    parsed = parse("pretrain", [], default_recipe=recipe)
    assert (parsed.is_default, parsed.recipe_path, parsed.config.seed) == (True, recipe, 3)


def test_lists_tables_and_nulls_on_the_command_line() -> None:
    argv = ["--model.sites", "[q, wo]", "--evaluation.groups", '{"a": "b"}', "--model.dropout", "null"]
    config = parse("evaluate", [*argv, "--model.fusion", "false", "--output_dir", "2024"]).config
    assert config.model.sites == ["q", "wo"]
    assert config.evaluation.groups == {"a": "b"}
    assert config.model.dropout is None
    assert config.model.fusion is False
    assert config.output_dir == "2024"


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_the_launchers_local_rank_is_ignored(flag: list[str]) -> None:
    assert parse("finetune", [*flag, "--seed", "4"]).config == parse("finetune", ["--seed", "4", *flag]).config


def test_scale_multiplies_steps_once() -> None:
    argv = ["--scale", "0.02", "--engine.steps", "1000", "--teachers.steps", "10", "--engine.checkpoint_every", "100"]
    config = parse("finetune", argv).config
    assert (config.engine.steps, config.teachers.steps, config.engine.checkpoint_every) == (20, 1, 2)
    assert config.engine.evaluate_every == 0, "what is switched off stays off"
    assert resolve(config, "finetune") == config


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--engine.stepz", "3"], ["--engine.stepz", "did you mean --engine.steps"]),
        (["--steps", "3"], ["--steps", "--teachers.steps", "--engine.steps"]),
        (["--engine", "{steps: 3}"], ["--engine"]),
        (["--engine.steps", "many"], ["--engine.steps", "'many'", "a whole number"]),
        (["--engine.steps", "1.5"], ["--engine.steps", "a whole number"]),
        (["--engine.steps", "null"], ["--engine.steps", "a whole number"]),
        (["--engine.steps"], ["--engine.steps has no value"]),
        (["--seed", "--engine.steps", "3"], ["--seed has no value"]),
        (["--model.method", "tagy"], ["--model.method", "tagi, hint, hypertuning, hypter"]),
        (["--optimizer.betas", "[0.9]"], ["--optimizer.betas"]),
        (["--model.fusion", "perhaps"], ["--model.fusion", "true or false"]),
        (["recipe.yaml"], ["`recipe.yaml`"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "missing", "--config"]),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], expected: list[str]) -> None:
    text = _refusal("finetune", argv)
    assert "mend:" in text
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engine: {stepz: 3}", ["engine.stepz", "did you mean engine.steps"]),
        ("engin: {steps: 3}", ["engin", "did you mean engine"]),
        ("stages: {pretrain: {engine: {stepz: 3}}}", ["stages.pretrain.engine.stepz", "stages.pretrain.engine.steps"]),
        ("stages: {finetun: {}}", ["stages.finetun", "did you mean finetune"]),
        ("stages: [finetune]", ["`stages` is not a table"]),
        ("stages: {finetune: 3}", ["stages.finetune is not a table"]),
        ("stages: {evaluate: {engine: {steps: soon}}}", ["stages.evaluate.engine.steps", "'soon'", "a whole number"]),
        ("engine: 3", ["engine = 3 is not a table"]),
        ("engine: {steps: true}", ["engine.steps", "True", "a whole number"]),
        ("seed:", ["seed", "None", "a whole number"]),
        ("data: {sni_dir: 3}", ["data.sni_dir", "text or null"]),
        ("engine:\n  steps: 3\n  steps: 4", ["`steps` twice", "line 3"]),
        ("engine: {steps: 3}\nengine: {log_every: 4}", ["`engine` twice", "line 2"]),
        ("engine: [", ["not a valid recipe", "line"]),
        ("- engine", ["no table of sections"]),
    ],
)
def test_mistakes_in_a_recipe_name_the_file_and_the_key(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    refusal = _refusal("finetune", ["--config", str(path)])
    assert "mend:" in refusal
    for part in (str(path), *expected):
        assert part in refusal


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in _refusal("finetune", ["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model.rank", "0"], "model.rank is 0"),
        (["--teachers.temperature", "0"], "teachers.temperature"),
        (["--optimizer.learning_rate", "nan"], "optimizer.learning_rate"),
        (["--scale", "-1"], "scale"),
        (["--loss.kl", "-1"], "loss.kl"),
        (["--loss.alignment", "-1"], "loss.alignment"),
        (["--model.dropout", "1"], "model.dropout"),
        (["--optimizer.warmup", "2"], "optimizer.warmup"),
        (["--optimizer.betas", "[0.9, 1.0]"], "optimizer.betas"),
        (["--model.sites", "[q, x]"], "model.sites"),
        (["--model.sites", "[q, q]"], "model.sites"),
        (["--model.sites", "[]", "--model.method", "hint"], "model.sites"),
        (["--model.sites", "[]", "--loss.alignment", "sigmoid"], "loss.alignment"),
        (["--data.document_tokens", "20"], "data.min_part_tokens"),
        (["--data.prompt", "plain", "--data.positives", "2"], "set data.prompt tk_instruct"),
        (["--data.split", "xlingual"], "set data.english_only false"),
        (["--optimizer.name", "adafactor"], "engine.strategy single"),
        (["--engine.stages", "0"], "engine.stages is 0"),
        (["--engine.stages", "2"], "which has no stages"),
        (["--engine.strategy", "pipeline", "--model.also_train", "norms"], "encoded without gradients"),
        (["--engine.strategy", "pipeline", "--optimizer.name", "adafactor"], "engine.strategy single"),
        (["--engine.deepspeed", "nowhere.json"], "nowhere.json"),
        (["--evaluation.groups", '{"a/b": "c"}'], "a/b"),
        (["--evaluation.groups", "{}"], "evaluation.groups"),
        (["--loss.label", "0"], "nothing would be learned"),
        (["--model.a", "shared", "--loss.alignment", "sigmoid", "--loss.alignment_form", "mse"], "teachers.train_a"),
    ],
)
def test_values_that_make_no_sense(argv: list[str], expected: str) -> None:
    assert expected in _refusal("finetune", argv)


@pytest.mark.parametrize("stage", ["backbone", "meta_train"])
def test_an_ordinary_model_has_no_stages(stage: str) -> None:
    assert f"engine.strategy pipeline in {stage}" in _refusal(stage, ["--engine.strategy", "pipeline"])


def test_values_that_do_make_sense() -> None:
    cross_lingual = parse("finetune", ["--data.split", "xlingual", "--data.english_only", "false"]).config
    assert cross_lingual.data.split == "xlingual"
    config = parse("finetune", ["--optimizer.name", "adafactor", "--engine.strategy", "single"]).config
    assert config.optimizer.name == "adafactor"
    assert parse("finetune", ["--loss.label", "0", "--loss.kl", "5"]).config.loss.label == 0
    assert "stages.finetune.loss" in _refusal("pretrain", ["--loss.kl", "5"])


def test_a_saved_configuration_is_a_recipe(tmp_path: Path) -> None:
    config = parse("finetune", ["--scale", "0.5", "--optimizer.betas", "[0.8, 0.9]", "--evaluation.groups", "{a: b}"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**to_dict(config.config), "run": {"stage": "finetune"}}), encoding="utf-8")
    assert parse("finetune", ["--config", str(path)]).config == config.config


def test_help_prints_every_field_with_docstring_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("finetune", ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [key for key in field_types() if f"--{key} " not in text] == []
    assert "Rank r of every generated LoRA. (type: int, default: 32)" in text
    assert "sigmoid(stop_gradient(MSE))" in text
    assert "CONFIG" not in text


def test_every_field_has_a_rule_or_a_type_that_is_one() -> None:
    """A new number must be given bounds in the rules, or be named here as free."""
    bounded = {*recipe_rules._POSITIVE, *recipe_rules._NOT_NEGATIVE, *recipe_rules._SHARES}
    free = {"scale", "optimizer.warmup", "optimizer.betas", "loss.alignment", "teachers.min_gain", "data.weights"}
    numbers = {key for key, kind in field_types().items() if {"int", "float"} & set(_words(kind))}
    assert numbers == bounded | free


def _words(kind: object) -> list[str]:
    return re.findall(r"[a-z0-9_]+", str(kind))


# Recipes that build on others.


def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / "own.yaml"


def test_a_recipe_is_laid_over_the_one_it_builds_on(tmp_path: Path) -> None:
    own = _write(
        tmp_path,
        first="seed: 1\nengine: {steps: 10, log_every: 2}\nstages: {finetune: {engine: {steps: 20}}, pretrain: }",
        base="base: first.yaml\nseed: 2\nevaluation: {groups: {a: b}}\nstages: {finetune: {loss: {kl: 3}}}",
        own="base: base.yaml\nengine: {steps: 30}\nevaluation: {groups: {c: d}}\n"
        "stages: {finetune: {loss: {label: 2}}}",
    )
    finetune, pretrain = (parse(stage, ["--config", str(own)]).config for stage in ("finetune", "pretrain"))
    assert (finetune.seed, finetune.engine.log_every, finetune.evaluation.groups) == (2, 2, {"c": "d"})
    # A stage's entry wins over every common part, also over a later recipe's.
    assert (finetune.engine.steps, pretrain.engine.steps) == (20, 30)
    assert (finetune.loss.kl, finetune.loss.label, pretrain.loss.kl) == (3.0, 2.0, 0.0)
    merged = _write(tmp_path, own=yaml.safe_dump(read_merged(own)))
    for stage, config in (("finetune", finetune), ("pretrain", pretrain)):
        assert parse(stage, ["--config", str(merged)]).config == config
    assert "base" not in merged.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("base: nowhere.yaml", ["own.yaml builds on", "nowhere.yaml", "missing"]),
        ("base: [base.yaml]", ["own.yaml", "no path"]),
        ("base: own.yaml", ["own.yaml", "which builds on it"]),
        ("base: round.yaml", ["round.yaml builds on", "own.yaml", "which builds on it"]),
        ("base: wrong.yaml", ["wrong.yaml", "engine.stepz", "did you mean engine.steps"]),
        ("base: empty.yaml\nbase: empty.yaml", ["`base` twice"]),
    ],
)
def test_mistakes_in_building_on_another_name_the_file(tmp_path: Path, own: str, expected: list[str]) -> None:
    path = _write(tmp_path, round="base: own.yaml", wrong="engine: {stepz: 1}", empty="", own=own)
    refusal = _refusal("finetune", ["--config", str(path)])
    for part in ("mend:", *expected):
        assert part in refusal


# The recipes that are shipped.


def _shipped(name: str, stage: str) -> RunConfig:
    (path,) = (path for path in RECIPES if path.stem == name)
    return parse(stage, ["--config", str(path)]).config


SIZES = {"base": (16, 1e-4), "xl": (8, 5e-5), "xxl": (2, 5e-5)}
"""Size -> the paper's batch x accumulation, and finetuning's rate."""
PAPER = [(data, size) for data in ("sni", "p3") for size in SIZES]


@pytest.mark.parametrize(("data", "size"), PAPER)
def test_recipes_of_published_backbones_have_the_papers_hyperparameters(data: str, size: str) -> None:
    name, (batch, rate) = f"{data}_{size}", SIZES[size]
    finetune = _shipped(name, "finetune")
    assert finetune.model.backbone == f"google/t5-{size}-lm-adapt"
    assert (finetune.model.method, finetune.model.rank, finetune.model.sites) == ("tagi", 32, ["q", "v"])
    assert finetune.data.tasks_per_batch * finetune.data.examples_per_task == batch
    assert (finetune.optimizer.name, finetune.optimizer.learning_rate, finetune.optimizer.warmup) == (
        "adamw",
        rate,
        0.02,
    )
    assert (finetune.engine.steps, finetune.engine.precision) == (20_000, "bf16")
    lengths = (finetune.data.max_source_tokens, finetune.data.max_target_tokens)
    assert lengths == {"sni": (1024, 128), "p3": (512, 64)}[data]
    assert (finetune.loss.label, finetune.loss.kl) == (1.0, 5.0)
    # "No parameter alignment" at 11B.
    assert finetune.loss.alignment == (0.0 if size == "xxl" else "sigmoid")
    assert (finetune.data.max_instances, finetune.data.p3_max_examples, finetune.data.english_only) == (100, 1000, True)


@pytest.mark.parametrize(("data", "size"), PAPER)
def test_teachers_and_pretraining_have_the_papers_hyperparameters(data: str, size: str) -> None:
    name = f"{data}_{size}"
    pretrain = _shipped(name, "pretrain")
    assert (pretrain.engine.steps, pretrain.data.tasks_per_batch, pretrain.data.document_tokens) == (50_000, 8, 1024)
    assert pretrain.optimizer.learning_rate == 1e-3
    teachers = _shipped(name, "train_teachers")
    assert teachers.teachers.unit == {"sni": "category", "p3": "source"}[data]
    settings = (teachers.teachers.examples, teachers.teachers.steps, teachers.teachers.learning_rate)
    assert settings == (16, 10_000, 1e-4)
    assert (teachers.model.rank, teachers.model.sites) == (32, ["q", "v"])
    logits = _shipped(name, "store_logits").teachers
    assert logits.logit_teacher is not None
    assert {"sni": "tk-instruct", "p3": "fid-icl"}[data] in logits.logit_teacher
    # Finetuning binds the store to what it was made with.
    asked = _shipped(name, "finetune").teachers
    assert asked.demonstrations == logits.demonstrations == {"sni": 0, "p3": 16}[data]


@pytest.mark.parametrize("name", ["sni_xxl_pipeline", "sni_xxl_multinode"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_other_layouts_of_a_size_learn_the_same(name: str, stage: str) -> None:
    own, plain = _shipped(name, stage), _shipped("sni_xxl", stage)
    assert (own.model, own.loss, own.optimizer, own.teachers) == (
        plain.model,
        plain.loss,
        plain.optimizer,
        plain.teachers,
    )
    batches = own.data.tasks_per_batch, plain.data.tasks_per_batch
    if name == "sni_xxl_pipeline" or stage == "pretrain":
        assert batches[0] * own.engine.steps == batches[1] * plain.engine.steps
    if name == "sni_xxl_pipeline":
        assert batches[0] == own.engine.accumulation, "one pipeline of micro-batches of one example"


def test_every_deepspeed_json_is_used_by_a_recipe() -> None:
    assert {path.name for path in DEFAULTS.glob("*.json")} == set(shipped_settings())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_for_every_stage(path: Path, stage: str) -> None:
    parsed = parse(stage, ["--config", str(path)])
    assert parsed.config.output_dir == str(Path(parsed.config.study_dir) / stage)
