"""Both stages on a small data folder: what they write, killed and resumed, on one rank and on two."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tagi_ds.build import open_distillation
from tagi_ds.config import LossConfig
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.collate import Collator
from tagi_ds.data.mixture import TaskMixture
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.divergence import kl
from tagi_ds.engine.exhaustion import MemoryExhaustedError
from tagi_ds.errors import UserError
from tagi_ds.model.backbone import content_hash, load_backbone, recompute_blocks
from tagi_ds.stages import train_teachers
from tagi_ds.teachers import report
from tagi_ds.teachers.__main__ import main
from tagi_ds.teachers.bank import TeacherBank
from tagi_ds.teachers.binding import data_binding, input_binding
from tagi_ds.teachers.distillation import Distillation
from tagi_ds.teachers.logit_store import LogitStore
from tagi_ds.teachers.logit_teacher import ReadingCollator, TeacherReader
from tagi_ds.teachers.parameter_store import ParameterStore
from tagi_ds.teachers.plan import make_plan
from tests.distributed import run_ranks
from tests.teachers.conftest import Done
from tests.teachers.stage_process import KILLED, SCRIPT, STAGES, contents, make_config, run_stage


def test_the_stores_fit_a_run_of_the_same_study(done: Done, tiny_folder: Path) -> None:
    config, _ = done
    tokenizer = load_tokenizer(tiny_folder)
    tasks, _ = training_split(config.data, config.seed)
    data = data_binding(config.data, tasks, tokenizer)
    logits = LogitStore(Path(config.study_dir) / "store_logits" / "store", {**data, "seed": config.seed})
    folder = Path(config.study_dir) / "train_teachers" / "store"
    inputs = input_binding(config.data, tasks, tokenizer)
    parameters = ParameterStore(folder, {**inputs, "backbone": content_hash(tiny_folder), "unit": "task"})
    distillation = Distillation(logits, parameters, LossConfig(kl=1.0, alignment="sigmoid"))
    source = TaskMixture(tasks, Collator(tokenizer, config.data, "hypernetwork", "task"), config.seed, len(tasks))
    examples = [example.id for task in tasks for example in task.examples]
    distillation.require(examples, [task.name for task in tasks])
    assert len(logits) == len(examples)
    for _ in range(3):
        (batch,) = source.next_step()
        assert distillation.attach(batch).teacher["distributions"].present.all()
    with pytest.raises(UserError, match="differing: unit"):
        ParameterStore(folder, {**inputs, "unit": "category"})


def test_teachers_of_bare_inputs_serve_every_wording_of_the_instructions(
    done: Done, sni: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Def + 2 Pos after Def: the store fits, and the stage would make the same one, work list and all."""
    reworded = tmp_path / "reworded"
    shutil.copytree(sni, reworded)
    shot = {"input": "say lamp", "output": "lamp", "explanation": "so it says"}
    for path in (reworded / "tasks").iterdir():
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "Definition": ["repeat it"], "Positive Examples": [shot]}))

    study = Path(done[0].study_dir)
    first, other = make_config(study, sni, tiny_folder), make_config(study, reworded, tiny_folder)
    other.data.positives, other.data.negatives, other.data.explanations = 2, 1, True
    plans = [make_plan(config) for config in (first, other)]
    assert plans[0].settings == plans[1].settings
    assert plans[0].groups.keys() == plans[1].groups.keys()
    other.loss.alignment = 1.0
    tasks, _ = training_split(other.data, other.seed)
    assert all(task.positives and task.definition == "repeat it" for task in tasks)
    assert open_distillation(other, tasks, load_tokenizer(tiny_folder)).parameters is not None
    other.data.max_source_tokens = 16
    assert make_plan(other).settings != plans[0].settings
    with pytest.raises(UserError, match=r"differing: max_source_tokens \(store: 32, run: 16\)"):
        open_distillation(other, tasks, load_tokenizer(tiny_folder))
    answers = [replace(task, examples=[replace(e, references=("box",)) for e in task.examples]) for task in tasks]
    other.data.max_source_tokens = 32
    with pytest.raises(UserError, match="differing: inputs"):
        open_distillation(other, answers, load_tokenizer(tiny_folder))


def test_the_stored_logits_are_the_teachers_own(done: Done, tiny_folder: Path) -> None:
    config, _ = done
    tokenizer, teacher = load_tokenizer(tiny_folder), load_backbone(tiny_folder).eval()
    tasks, _ = training_split(config.data, config.seed)
    store = LogitStore(Path(config.study_dir) / "store_logits" / "store")
    (batch,) = TaskMixture(tasks, Collator(tokenizer, config.data, "concatenated"), config.seed, 4).next_step()
    stored = store.read(batch.example_ids, batch.labels)
    with torch.no_grad():
        logits = teacher(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
        ).logits
    best = logits.log_softmax(-1).max(-1)
    real = batch.labels != -100
    assert torch.equal(stored.ids[..., 0][real], best.indices[real])
    assert torch.allclose(stored.log_probs[..., 0][real], best.values[real], atol=4e-3)
    assert abs(float(kl(logits, stored, batch.labels))) < 1e-3 * int(real.sum())


@pytest.mark.parametrize("method", ["topk", "sampled"])
def test_demonstrations_and_draws_are_stored_as_the_online_teacher_says(
    method: Literal["topk", "sampled"], sni: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """The store of a fusion-in-decoder teacher, and the same teacher in the step, through the run's own doors."""
    config = make_config(tmp_path, sni, tiny_folder)
    config.teachers.method, config.teachers.demonstrations, config.teachers.store_dtype = method, 2, "float32"
    config.teachers.temperature, config.loss.kl = 2.0, 1.0
    assert run_stage("store_logits", config)["examples"] == 5 * 12
    tokenizer = load_tokenizer(tiny_folder)
    tasks, _ = training_split(config.data, config.seed)
    store = open_distillation(config, tasks, tokenizer).logits
    config.loss.logits = "online"
    online = open_distillation(config, tasks, tokenizer).online
    assert store is not None
    assert online is not None
    reader = TeacherReader(tokenizer, config.data, 2, config.seed)
    (batch,) = TaskMixture(tasks, ReadingCollator(reader, tokenizer, config.data), config.seed, 4).next_step()
    stored, logits = store.read(batch.example_ids, batch.labels), online(batch.teacher["reading"], batch.labels).logits
    expected = (logits / 2.0).log_softmax(-1).gather(-1, stored.ids.clamp(min=0))
    known = stored.ids >= 0
    assert known.any(-1)[batch.labels != -100].all()
    torch.testing.assert_close(stored.log_probs[known], expected[known], atol=1e-5, rtol=1e-5)
    config.loss.logits = "store"
    config.teachers.demonstrations, config.teachers.temperature = 1, 1.0
    with pytest.raises(UserError, match=r"differing: temperature \(store: 2.0, run: 1.0\), demonstrations"):
        open_distillation(config, tasks, tokenizer)


def test_a_run_that_names_another_teacher_or_size_is_refused(done: Done, tiny_folder: Path, tied_folder: Path) -> None:
    """What a run names it must get; the backbone was the teacher here, by default."""
    config = make_config(Path(done[0].study_dir), Path(str(done[0].data.sni_dir)), tiny_folder)
    config.loss.kl = 1.0
    tasks, _ = training_split(config.data, config.seed)
    tokenizer = load_tokenizer(tiny_folder)
    for named, differing in (
        (None, None),
        (str(tiny_folder), None),
        (str(tied_folder), r"differing: teacher \("),
        ("allenai/tk", r"differing: logit_teacher \(store: None, run: allenai/tk\)"),
    ):
        config.teachers.logit_teacher = named
        if differing is None:
            assert open_distillation(config, tasks, tokenizer).logits is not None
            continue
        with pytest.raises(UserError, match=differing):
            open_distillation(config, tasks, tokenizer)
    config.teachers.logit_teacher, config.teachers.top_k = None, 5
    with pytest.raises(UserError, match=r"differing: top_k \(store: 12, run: 5\)"):
        open_distillation(config, tasks, tokenizer)


def test_the_summary_is_that_of_the_table(done: Done) -> None:
    config, summaries = done
    summary = summaries["train_teachers"]
    table = json.loads((Path(config.study_dir) / "train_teachers" / "teachers.json").read_text())
    assert summary["teachers"] == len(table) == config.teachers.max_units
    assert summary["steps"] == sum(row["taken"] for row in table.values())
    assert summary["examples"] == config.teachers.examples * summary["steps"]
    assert summary["better"] == sum(report.is_aligned(row, config.teachers) for row in table.values()) > 0
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["flops"] > 0 < summaries["store_logits"]["flops"]
    assert summaries["store_logits"]["examples"] == 5 * 12


def test_memory_is_bounded_by_the_settings_that_the_advice_names(
    sni: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, sni, tiny_folder)
    config.teachers.max_units, config.teachers.steps = 2, 1
    sizes, encoded, forward = [], [], TeacherBank.forward

    def out_of_memory_above(most: int, bank: TeacherBank, ids: torch.Tensor, *rest: Any) -> Any:
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        sizes.append(len(ids))
        return forward(bank, ids, *rest)

    def recompute(backbone: torch.nn.Module) -> None:
        recompute_blocks(backbone)
        encoded.append(backbone)

    monkeypatch.setattr(TeacherBank, "forward", lambda bank, *given: out_of_memory_above(3, bank, *given))
    monkeypatch.setattr(train_teachers, "recompute_blocks", recompute)
    with pytest.raises(MemoryExhaustedError, match="train_teachers: out of memory") as caught:
        run_stage("train_teachers", config)
    advice = ("teachers.batched below 2", "engine.accumulation above 1", "engine.activation_checkpointing true")
    assert all(words in caught.value.mend for words in advice)
    assert "zero3" not in caught.value.mend
    assert not encoded
    config.engine.accumulation, config.engine.activation_checkpointing = 3, True
    assert run_stage("train_teachers", config)["teachers"] == 2
    assert max(sizes) == 3
    assert len(encoded) == 1


@pytest.mark.parametrize(
    "gain, exact, steps, aligned",
    [(0.5, 0.0, 4, True), (0.5, -0.1, 4, False), (0.1, 0.0, 4, False), (0.5, 0.0, 0, True), (0.0, 0.0, 0, False)],
)
def test_only_teachers_that_are_better_are_imitated(gain: float, exact: float, steps: int, aligned: bool) -> None:
    config = make_config(Path("."), Path("."), Path(".")).teachers
    config.min_gain = 0.2
    figures = {"loss_before": 2.0, "loss_after": 2.0 - gain, "exact_before": 0.5, "exact_after": 0.5 + exact}
    assert report.is_aligned({**figures, "steps": steps}, config) is aligned


def test_killed_while_writing_and_run_again_it_ends_with_the_same_bytes(
    done: Done, sni: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Of the logit store; teachers that are killed are taken over by other jobs, in test_jobs.py."""
    killed = run_ranks(SCRIPT, 1, ["store_logits", str(tmp_path), str(sni), str(tiny_folder), "5"], check=False)
    assert killed.statuses == [KILLED]
    store = tmp_path / "store_logits" / "store"
    assert list(store.glob(".*.part"))
    assert not (store / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in store.glob("shard-*")}
    run_stage("store_logits", make_config(tmp_path, sni, tiny_folder))
    assert contents(tmp_path / "store_logits") == contents(Path(done[0].study_dir) / "store_logits")
    assert len(kept) == 2
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items()), "whole shards are computed once"


def test_two_ranks_write_the_bytes_of_one(done: Done, sni: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run_ranks(SCRIPT, 2, [",".join(STAGES), str(tmp_path), str(sni), str(tiny_folder)])
    for stage in STAGES:
        assert contents(tmp_path / stage) == contents(Path(done[0].study_dir) / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_and_damaged_files_are_computed_again(
    stage: str, sni: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, sni, tiny_folder)
    config.teachers.max_units = config.teachers.batched
    run_stage(stage, config)
    before = contents(tmp_path / stage)
    path = max((tmp_path / stage / "store").glob("*-*"))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) * 3 // 4] ^= 1
    path.write_bytes(damaged)
    run_stage(stage, config)
    assert contents(tmp_path / stage) == before
    config.teachers.learning_rate, config.teachers.temperature = 1e-3, 2.0
    run_stage(stage, config)
    after = contents(tmp_path / stage)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert {f"store/{path.name}", "store/manifest.json"} <= changed
    assert main(["verify", str(tmp_path / stage / "store")]) == 0


def test_a_teacher_of_another_vocabulary_is_refused(
    sni: Path, tiny_folder: Path, tied_folder: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, sni, tiny_folder)
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((tied_folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**content, "vocab_size": 200}))
    config.teachers.logit_teacher = str(other)
    with pytest.raises(UserError, match="both predict 200 tokens only; the tokenizer has"):
        run_stage("store_logits", config)


def test_rows_behind_the_backbones_vocabulary_are_not_stored(
    sni: Path, tiny_folder: Path, tied_folder: Path, tmp_path: Path
) -> None:
    """Published models of one tokenizer differ in the rows behind its last token."""
    config = make_config(tmp_path, sni, tiny_folder)
    other, tokenizer = tmp_path / "other", load_tokenizer(tiny_folder)
    teacher = load_backbone(tied_folder)
    teacher.resize_token_embeddings(400)
    with torch.no_grad():
        # One of each pair is above every other logit, so that the store would hold it if it were not cut away.
        teacher.get_input_embeddings().weight[330:] = 50 * torch.cat([torch.eye(32), -torch.eye(32), torch.eye(6, 32)])
    teacher.save_pretrained(other)
    tokenizer.save_pretrained(other)
    config.teachers.logit_teacher = str(other)
    assert run_stage("store_logits", config)["examples"] == 5 * 12
    store = LogitStore(Path(config.study_dir) / "store_logits" / "store")
    tasks, _ = training_split(config.data, config.seed)
    (batch,) = TaskMixture(tasks, Collator(tokenizer, config.data, "concatenated"), config.seed, 4).next_step()
    stored = store.read(batch.example_ids, batch.labels)
    real = batch.labels != -100
    assert int(stored.ids[real].max()) < 330
    mass = stored.log_probs[real].exp().sum(-1) + stored.tail[real]
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-2)
