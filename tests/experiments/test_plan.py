"""A study's file and its plan: refusals, layers, what is shared, and what a field changes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tagi_ds.config import STAGES, EvaluationConfig, ModelConfig, RunConfig
from tagi_ds.data.examples import Demonstration, Task
from tagi_ds.data.program_plan import plan_benchmark
from tagi_ds.data.program_tasks import task_json
from tagi_ds.data.prompts import input_text, instruction_text
from tagi_ds.errors import UserError
from tagi_ds.experiments.definition import Point, Study, leaves
from tagi_ds.experiments.nodes import Cell, Node, Plan
from tagi_ds.experiments.planning import plan_study
from tagi_ds.experiments.relevance import matters, relevant_fields, unknown_names
from tagi_ds.experiments.study_file import read_study
from tagi_ds.experiments.tuning import first_trials, tuning_rounds
from tagi_ds.methods import APPROACHES, METHODS
from tagi_ds.recipe import field_types, parse
from tests.experiments.studies import VARIANTS, study_of, tree_of
from tests.shipped import STUDIES


def stages_of(plan: Plan, names: tuple[str, ...]) -> list[str]:
    return [plan.nodes[name].stage for name in names]


def cell_of(plan: Plan, variant: str, seed: int = 0) -> Cell:
    (cell,) = (cell for cell in plan.cells if (cell.variant, cell.seed) == (variant, seed))
    return cell


def trained(plan: Plan, variant: str) -> Node:
    name = cell_of(plan, variant).trained
    assert name is not None
    return plan.nodes[name]


def every_trial(study: Study) -> dict[str, tuple[Point, ...]]:
    return {} if study.tuning is None else first_trials(study.tuning, study.tuning.methods)


MAIN: dict[str, Any] = {"seeds": [0], "reference": "tagi", "variants": {"tagi": {"method": "tagi"}}}


def part(**variants: Any) -> dict[str, Any]:
    return {"main": {**MAIN, "variants": {**MAIN["variants"], **variants}}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"partz": {}}, r"'partz' is unknown \(did you mean parts\?\)"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml is missing"),
        ({"parts": {}}, "parts is empty"),
        ({"ranks": 0}, "ranks is 0"),
        ({"ranks": True}, "ranks = True is not a whole number"),
        ({"lengths": {"own": [1, 2]}}, "lengths.own"),
        ({"parts": {"main": {**MAIN, "remarks": "x"}}}, "remarks = 'x' is not a l"),
        ({"parts": {"main": {**MAIN, "lengths": {"own": [1, 0, 2]}}}}, "main.lengths.own is 0"),
        ({"averages": {"unseen": ["unseen"]}}, "at least two groups"),
        ({"speed": {"flops_per_s": 0}}, "flops_per_s"),
        ({"set": {"modle": {}}}, r"'modle' is unknown \(did you mean model\?\)"),
        ({"set": {"model": {"rnak": 3}}}, r"'model.rnak' is unknown \(did you mean model.rank\?\)"),
        ({"set": {"stages": {"finetun": {}}}}, r"set.stages: 'finetun' is unknown \(did you mean finetune\?\)"),
        ({"set": {"stages": {"finetune": {"loss": {"kll": 1}}}}}, r"stages.finetune: 'loss.kll' is unknown"),
        ({"parts": part(other={"method": "hnit"})}, r"other.method: 'hnit' is unknown \(did you mean hint\?\)"),
        ({"parts": part(other={"metod": "hint"})}, r"'metod' is unknown \(did you mean method\?\)"),
        ({"parts": part(other={})}, "other: method is missing"),
        ({"parts": part(other={"method": "tagi", "without": ["finetune"]})}, "'finetune' is unknown"),
        ({"parts": part(other={"method": "tagi", "compute_of": "tagi"})}, "only meta-training"),
        ({"parts": part(other={"method": "meta_training", "compute_of": "hint"})}, "'hint' is unknown"),
        ({"parts": part(other={"method": "hint", "logit_teacher_of": "tagi"})}, "only TAGI learns from distributions"),
        ({"parts": part(other={"method": "tagi", "logit_teacher_of": "tagi"})}, "logit_teacher_of: 'tagi' is unknown"),
        ({"parts": {"main": {"seeds": [0, 0], "reference": "tagi", "variants": VARIANTS}}}, "seeds"),
        ({"parts": {"main": {"seeds": [0], "reference": "tagy", "variants": VARIANTS}}}, "did you mean tagi"),
        ({"parts": {"a b": {"seeds": [0], "reference": "tagi", "variants": VARIANTS}}}, "is no name"),
        ({"tuning": {"seeds": [0], "methods": ["untrained"], "grid": {}}}, "'untrained' is unknown"),
        ({"tuning": {"seeds": [0], "methods": ["tagi"], "grid": {"optimizer.rate": [1]}}}, "'optimizer.rate' is unkn"),
        ({"tuning": {"seeds": [0], "methods": ["tagi"], "grid": {"model.rank": 3}}}, "not a list of values"),
        (
            {"tuning": {"seeds": [0], "methods": ["tagi"], "grid": {"model.rank": [3]}, "start": {"model.rank": 4}}},
            "no value of a grid",
        ),
    ],
)
def test_mistakes_in_a_study_name_file_place_and_the_nearest(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as refused:
        study_of(tmp_path, **change)
    assert "study.yaml" in str(refused.value)


def test_values_that_do_not_fit_name_the_variant(tmp_path: Path) -> None:
    study = study_of(tmp_path, parts=part(other={"method": "tagi", "set": {"model": {"rank": 0}}}))
    with pytest.raises(UserError, match=r"variants\.other: model\.rank is 0"):
        plan_study(study, ["main"])


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree_of(tmp_path)) + "ranks: 1\nranks: 2\n", encoding="utf-8")
    with pytest.raises(UserError, match="`ranks` twice"):
        read_study(path)


def test_a_stages_entry_wins_over_its_layers_common_part() -> None:
    tree = {"seed": 1, "engine": {"steps": 5}, "stages": {"finetune": {"engine": {"steps": 7}, "loss": {"kl": 2}}}}
    assert leaves(tree, "finetune") == {"seed": 1, "engine.steps": 7, "loss.kl": 2}
    assert leaves(tree, "pretrain") == {"seed": 1, "engine.steps": 5}


def test_what_methods_share_is_planned_once_and_each_takes_its_own_way(tmp_path: Path) -> None:
    plan = plan_study(study_of(tmp_path), ["main"])
    assert len(plan.cells) == 8
    assert [cell.seed for cell in plan.cells] == [0] * 4 + [1] * 4, "whole comparisons first"
    counts = {stage: stages_of(plan, tuple(plan.nodes)).count(stage) for stage in ("benchmark", *STAGES)}
    assert counts == {
        "benchmark": 1,
        "backbone": 2,
        "train_teachers": 2,
        "store_logits": 2,
        "pretrain": 4,
        "finetune": 4,
        "meta_train": 2,
        "convert": 4,
        "evaluate": 8,
    }
    assert sorted(stages_of(plan, cell_of(plan, "tagi").training)) == sorted(
        ["backbone", "pretrain", "store_logits", "train_teachers", "finetune"]
    )
    assert stages_of(plan, cell_of(plan, "hint").training) == ["backbone", "pretrain", "finetune"]
    assert stages_of(plan, cell_of(plan, "meta_training").training) == ["backbone", "meta_train"]
    assert stages_of(plan, cell_of(plan, "no_finetuning").training) == ["backbone"]
    order = list(plan.nodes)
    assert all(order.index(need) < order.index(node.name) for node in plan.nodes.values() for need in node.needs)


def test_methods_are_what_the_papers_table_says(tmp_path: Path) -> None:
    """Every method with a hypernetwork, by the configuration that its launches resolve to."""
    variants = {name: {"method": name} for name in APPROACHES}
    plan = plan_study(study_of(tmp_path, parts=part(**variants)), ["main"])
    for name, method in METHODS.items():
        node = trained(plan, name)
        assert node.config is not None
        assert node.stage == "finetune"
        assert node.config.model.method == name
        assert (node.config.loss.kl > 0, node.config.loss.alignment != 0) == (method.distillation, method.distillation)
        stages = [plan.nodes[need].stage for need in node.needs]
        assert ("pretrain" in stages) == method.pretraining
        assert ("store_logits" in stages, "train_teachers" in stages) == (method.distillation, method.distillation)
    whole, lora = trained(plan, "meta_training").config, trained(plan, "meta_lora").config
    assert whole is not None
    assert lora is not None
    assert (whole.model.meta_lora, lora.model.meta_lora) == (False, True)
    assert (whole.model.initial, lora.model.initial) == (None, None), "both from the study's backbone"


def test_what_a_command_says_is_what_was_planned(tmp_path: Path) -> None:
    """The command of every node parses to the configuration that the node was planned with."""
    plan = plan_study(study_of(tmp_path), ["main"])
    benchmark = next(iter(plan.nodes.values()))
    for node in plan.nodes.values():
        if node.config is not None:
            # Else a launcher would write the default recipe's benchmark for itself.
            assert node.config.data.sni_dir == str(benchmark.run_dir)
            assert node.config.data.c4_dir == str(benchmark.run_dir / "c4" / "en")
            assert parse(node.stage, list(node.arguments)).config == node.config, node.name
            assert node.config.output_dir == str(node.run_dir)


def test_ablations_leave_out_what_they_say(tmp_path: Path) -> None:
    def finetune(**fields: Any) -> dict[str, Any]:
        return {"method": "tagi", "set": {"stages": {"finetune": fields}}}

    alone: dict[str, Any] = {"model": {"sites": []}}
    plan = plan_study(
        study_of(
            tmp_path,
            parts=part(
                no_pretraining={"method": "tagi", "without": ["pretrain"]},
                no_kl=finetune(loss={"kl": 0}),
                no_alignment=finetune(loss={"alignment": 0}),
                no_hypernetwork={
                    "method": "tagi",
                    "set": {"stages": {"pretrain": alone, "finetune": {**alone, "loss": {"alignment": 0}}}},
                },
                fewer={"method": "tagi", "set": {"data": {"max_tasks": 100}}},
                rank={"method": "tagi", "set": {"model": {"rank": 8, "alpha": 8}}},
            ),
        ),
        ["main"],
    )
    full = set(cell_of(plan, "tagi").training)

    def new(variant: str) -> list[str]:
        return sorted(stages_of(plan, tuple(set(cell_of(plan, variant).training) - full)))

    assert "pretrain" not in stages_of(plan, cell_of(plan, "no_pretraining").training)
    assert "store_logits" not in stages_of(plan, cell_of(plan, "no_kl").training)
    assert "train_teachers" not in stages_of(plan, cell_of(plan, "no_alignment").training)
    assert [new(v) for v in ("no_pretraining", "no_kl", "no_alignment")] == [["finetune"]] * 3
    assert new("no_hypernetwork") == ["finetune", "pretrain"]
    assert new("fewer") == ["backbone", "finetune", "pretrain", "store_logits", "train_teachers"]
    assert new("rank") == ["finetune", "pretrain", "train_teachers"], "not the backbone, nor its distributions"


def test_identities_hang_on_what_matters_alone(tmp_path: Path) -> None:
    def names(**fields: Any) -> dict[str, str]:
        plan = plan_study(study_of(tmp_path, parts=part(), set=fields), ["main"])
        return {node.stage: node.name for node in plan.nodes.values()}

    base = names()
    circumstances = names(engine={"log_every": 7, "keep_checkpoints": 1}, data={"workers": 1})
    assert circumstances == base
    (tmp_path / "elsewhere").mkdir()
    moved = plan_study(study_of(tmp_path / "elsewhere", parts=part(), set={}), ["main"])
    assert set(moved.nodes) == set(base.values()), "a study can be moved"
    optimizer = names(optimizer={"weight_decay": 0.5})
    changed = {stage for stage in base if base[stage] != optimizer[stage]}
    # All behind a changed backbone change with it.
    assert changed == set(base) - {"benchmark"}
    evaluation = names(evaluation={"beams": 2})
    assert {stage for stage in base if base[stage] != evaluation[stage]} == {"evaluate"}
    teachers = names(stages={"train_teachers": {"teachers": {"learning_rate": 0.5}}})
    assert {stage for stage in base if base[stage] != teachers[stage]} == {
        *("train_teachers", "finetune", "convert", "evaluate")
    }


def test_a_field_at_its_default_is_no_part_of_an_identity() -> None:
    """So a field that is new to the configuration leaves what was trained before as it is."""
    assert relevant_fields(RunConfig(), "finetune") == {}
    changed = RunConfig(seed=2, model=ModelConfig(rank=3), evaluation=EvaluationConfig(beams=2))
    assert relevant_fields(changed, "finetune") == {"seed": 2, "model.rank": 3}
    assert relevant_fields(changed, "evaluate") == {"seed": 2, "model.rank": 3, "evaluation.beams": 2}


def test_the_tables_of_relevance_name_fields_that_there_are() -> None:
    assert unknown_names(field_types()) == set()
    assert matters("optimizer.learning_rate", "finetune")
    assert not matters("optimizer.learning_rate", "train_teachers")
    assert matters("model.dropout", "backbone")
    assert not matters("model.rank", "backbone")


def test_tuning_plans_the_same_grid_for_each_and_its_outcome_is_a_layer(tmp_path: Path) -> None:
    grid = {"optimizer.learning_rate": [1e-3, 3e-3], "optimizer.weight_decay": [0.0, 0.1]}
    tuning = {"seeds": [0, 1], "methods": ["hint", "meta_training"], "grid": grid}
    fixed = {"method": "hint", "set": {"optimizer": {"learning_rate": 0.5}}}
    study = study_of(tmp_path, tuning=tuning, parts=part(hint={"method": "hint"}, fixed=fixed))
    trials = plan_study(study, [], every_trial(study))
    assert len(trials.trials) == 2 * 4 * 2
    assert len({trial.point for trial in trials.trials if trial.method == "hint"}) == 4
    assert stages_of(trials, tuple(trials.nodes)).count("pretrain") == 2, "one a seed: only the last stage is tuned"
    assert not trials.cells
    chosen = {"hint": {"optimizer.learning_rate": 1e-3, "optimizer.weight_decay": 0.1}}
    plan = plan_study(study, ["main"], tuned=chosen)
    hint, other, tagi = (trained(plan, variant).config for variant in ("hint", "fixed", "tagi"))
    assert hint is not None
    assert other is not None
    assert tagi is not None
    assert (hint.optimizer.learning_rate, hint.optimizer.weight_decay) == (1e-3, 0.1)
    assert other.optimizer.learning_rate == 0.5, "a variant's own fields win"
    assert tagi.optimizer.learning_rate == 3e-3
    assert trained(plan, "hint").name in trials.nodes, "it was trained for the grid already"


def test_a_part_lends_its_variants_to_the_tuning(tmp_path: Path) -> None:
    grid = {"optimizer.learning_rate": [1e-3, 2e-3]}
    open_backbone = {"stages": {"finetune": {"model": {"also_train": "all"}}}}
    variants = {
        "hint": {"method": "hint"},
        "meta_training": {"method": "meta_training"},
        "tagi": {"method": "tagi", "logit_teacher_of": "meta_training"},
        "tagi_open": {"method": "tagi", "set": open_backbone},
        "tagi_other": {"method": "tagi", "set": {"model": {"rank": 2, "alpha": 2}}},
        "equal": {"method": "meta_training", "compute_of": "tagi"},
    }
    tuning = {"part": "main", "seeds": [0], "methods": ["hint", "tagi", "tagi_open"], "grid": grid}
    study = study_of(tmp_path, tuning=tuning, parts=part(**variants))
    trials = plan_study(study, [], every_trial(study))
    assert [trial.method for trial in trials.trials] == ["hint", "hint", "tagi", "tagi", "tagi_open", "tagi_open"]
    taught, other = (
        trials.nodes[next(t.trained for t in trials.trials if t.method == m)] for m in ("tagi", "tagi_open")
    )
    assert "meta_train" in stages_of(trials, trials.closure([taught.name]))
    assert "meta_train" not in stages_of(trials, trials.closure([other.name]))
    assert other.config is not None
    assert other.config.model.also_train == "all"
    chosen = {"hint": {}, "tagi": {"optimizer.learning_rate": 1e-3}, "tagi_open": {"optimizer.learning_rate": 2e-3}}
    plan = plan_study(study, ["main"], tuned=chosen)
    rates = {}
    for name in ("tagi", "tagi_open", "tagi_other"):
        config = trained(plan, name).config
        assert config is not None
        rates[name] = config.optimizer.learning_rate
    assert rates == {"tagi": 1e-3, "tagi_open": 2e-3, "tagi_other": 1e-3}, "one's own, else the method's"
    for wrong, message in (({"part": "man"}, "did you mean main"), ({"methods": ["equl"]}, "did you mean equal")):
        with pytest.raises(UserError, match=message):
            study_of(tmp_path, tuning={**tuning, **wrong}, parts=part(**variants))


def test_what_is_given_the_compute_of_others_is_tuned_after_them(tmp_path: Path) -> None:
    grid = {"optimizer.learning_rate": [1e-3, 2e-3]}
    scratch = {"model": {"initial": "scratch"}}
    variants = {
        "open": {"method": "tagi", "set": {"stages": {"finetune": {"model": {"also_train": "all"}}}}},
        "less": {"method": "tagi", "tuned_as": "open", "without": ["pretrain"]},
        "equal": {"method": "meta_training", "compute_of": "open", "set": scratch},
    }
    tuning = {"part": "main", "seeds": [0], "methods": ["equal", "tagi", "open"], "grid": grid}
    study = study_of(tmp_path, tuning=tuning, parts=part(**variants))
    assert tuning_rounds(study) == [("tagi", "open"), ("equal",)]
    chosen: dict[str, dict[str, Any]] = {"tagi": {}, "open": {"optimizer.learning_rate": 2e-3}}
    late = plan_study(study, [], {"equal": every_trial(study)["equal"]}, chosen)
    plan = plan_study(study, ["main"], tuned={**chosen, "equal": {"optimizer.learning_rate": 1e-3}})
    equal, less = trained(plan, "equal"), trained(plan, "less")
    assert set(equal.price_of) == set(cell_of(plan, "open").training)
    assert equal.name in {trial.trained for trial in late.trials}, "it was trained for the grid already"
    assert len({late.nodes[trial.trained].price_of for trial in late.trials}) == 1
    assert less.config is not None
    assert less.config.optimizer.learning_rate == 2e-3
    wrong = {**variants, "less": {**variants["less"], "tuned_as": "opn"}}
    with pytest.raises(UserError, match=r"less.tuned_as: 'opn' is unknown \(did you mean open\?\)"):
        study_of(tmp_path, tuning=tuning, parts=part(**wrong))


def test_a_recipe_with_a_backbone_and_data_trains_neither(tmp_path: Path) -> None:
    fields = {"model": {"backbone": "models/t5"}, "data": {"sni_dir": "sni", "c4_dir": "c4"}}
    plan = plan_study(study_of(tmp_path, benchmark_seed=None, set=fields), ["main"])
    assert not {"benchmark", "backbone"} & set(stages_of(plan, tuple(plan.nodes)))
    evaluated = plan.nodes[cell_of(plan, "no_finetuning").evaluated]
    assert evaluated.config is not None
    assert evaluated.config.evaluation.methods == {"no_finetuning": "models/t5"}
    equal = {"method": "meta_training", "compute_of": "tagi"}
    study = study_of(tmp_path, benchmark_seed=None, set=fields, parts=part(equal=equal))
    with pytest.raises(UserError, match="compute_of needs a backbone that the study trains"):
        plan_study(study, ["main"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_can_be_planned(path: Path) -> None:
    study = read_study(path)
    # Other seeds' launches are the same.
    parts = {name: dataclasses.replace(part, seeds=part.seeds[:1]) for name, part in study.parts.items()}
    tuning = None if study.tuning is None else dataclasses.replace(study.tuning, seeds=(0,))
    study = dataclasses.replace(study, parts=parts, tuning=tuning)
    trained_methods = {name for name, approach in APPROACHES.items() if approach.trained_in}
    if tuning is None:
        assert path.stem == "study_small", "it shows that the way works, and compares nothing"
    else:
        assert set(tuning.methods) >= trained_methods, "all are tuned, on one grid"
    assert {variant.method for variant in study.parts["main"].variants.values()} >= trained_methods
    plan = plan_study(study, list(study.parts), every_trial(study))
    assert {cell.part for cell in plan.cells} == set(study.parts)
    # Within a part all trainings of a method's last stage take equally many steps over equally large batches.
    for name in study.parts:
        cells = [cell for cell in plan.cells if cell.part == name and cell.trained is not None]
        runs = [plan.nodes[cell.trained] for cell in cells if cell.trained is not None]
        sizes = {
            (run.config.engine.steps, run.config.data.tasks_per_batch, run.config.data.examples_per_task)
            for run in runs
            if run.config is not None and not run.price_of
        }
        assert len(sizes) == 1, name


def test_the_miniature_records_the_benchmarks_own_lengths() -> None:
    """Means over the unseen test tasks, in tokens: words, marks and an end token."""
    study = read_study(next(path for path in STUDIES if path.stem == "study_mini"))
    groups = plan_benchmark(study.benchmark_seed or 0).groups
    tasks = [task_json(task) for group in ("unseen_arguments", "unseen_compositions") for task in groups[group]]
    assert len(groups["unseen_arguments"]) >= 40
    assert len(groups["unseen_compositions"]) >= 100

    def tokens(texts: Iterable[str]) -> int:
        counts = [len(re.findall(r"\w+|[^\w\s]", text)) + 1 for text in texts]
        return round(sum(counts) / len(counts))

    instances = [instance for task in tasks for instance in task["Instances"]]
    inputs, outputs = [each["input"] for each in instances], [each["output"][0] for each in instances]
    definitions = [task["Definition"][0] for task in tasks]
    assert next(iter(study.lengths.values())) == (tokens(definitions), tokens(inputs), tokens(outputs))

    part = study.parts["examples"]
    fields = next(iter(part.variants.values())).fields["data"]
    config = dataclasses.replace(RunConfig().data, **fields)
    examples = [[Demonstration(each["input"], each["output"]) for each in task["Positive Examples"]] for task in tasks]
    shown = [Task("", text, "", (), positives=tuple(some)) for text, some in zip(definitions, examples, strict=True)]
    instructions = tokens(instruction_text(task, 0, config) for task in shown)
    wrapped = tokens(input_text(text, config) for text in inputs)
    assert list(part.lengths.values()) == [(instructions, wrapped, tokens(outputs))]


def test_a_variant_learns_from_the_model_of_another(tmp_path: Path) -> None:
    taught = {"method": "tagi", "logit_teacher_of": "meta"}
    plan = plan_study(study_of(tmp_path, parts=part(taught=taught, meta={"method": "meta_training"})), ["main"])
    meta, student = trained(plan, "meta"), trained(plan, "taught")
    assert student.config is not None
    store = next(plan.nodes[name] for name in student.needs if plan.nodes[name].stage == "store_logits")
    assert store.config is not None
    assert {store.config.teachers.logit_teacher, student.config.teachers.logit_teacher} == {str(meta.model)}
    assert meta.name in store.needs
    # Its compute is counted, and the plain variant has a store of its own.
    assert meta.name in cell_of(plan, "taught").training
    assert meta.name not in cell_of(plan, "tagi").training
    assert store.name not in trained(plan, "tagi").needs
