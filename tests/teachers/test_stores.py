"""Both stores by themselves: round trips, what is absent, what does not fit."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tagi_ds.config import LossConfig
from tagi_ds.data.examples import Batch
from tagi_ds.divergence import FullDistributions, kl
from tagi_ds.errors import UserError
from tagi_ds.teachers import logit_shards, logit_store, parameter_store
from tagi_ds.teachers.distillation import Distillation
from tagi_ds.teachers.logit_entries import sampled, top_k
from tagi_ds.teachers.logit_shards import Layout
from tagi_ds.teachers.logit_store import LogitStore
from tagi_ds.teachers.parameter_store import ParameterStore
from tests.teachers.conftest import BINDING, SCALING, SITES, logit_rows, random_factors

MANY_TOKENS = 2.0**-8
"""float16 keeps log-probabilities between -16 and -8 to 2^-8 and nearer ones better."""


def labels_of(rows: list[dict]) -> torch.Tensor:
    out = torch.full((len(rows), 8), -100)
    for place, row in zip(out, rows, strict=True):
        place[: len(row["labels"])] = torch.from_numpy(row["labels"].astype(np.int64))
    return out


def test_parameters_come_back_with_zeros_for_what_is_not_aligned(parameter_folder: Path) -> None:
    store = ParameterStore(parameter_folder, BINDING)
    factors, present = store.read(["two", "weak", "one", "two", "unknown"])
    assert present.tolist() == [True, False, True, True, False]
    for row, seed in ((0, 2), (1, None), (2, 1), (3, 2), (4, None)):
        for site, (a, b) in random_factors(seed or 0).items():
            assert torch.equal(factors[site].a[row], a if seed else torch.zeros_like(a))
            assert torch.equal(factors[site].b[row], b if seed else torch.zeros_like(b))
    nothing, present = store.read(["weak", "unknown"])
    assert nothing == {}
    assert present.tolist() == [False, False]


def test_the_common_a_and_the_mean_square(parameter_folder: Path) -> None:
    store = ParameterStore(parameter_folder)
    for site, a in store.common_a().items():
        assert torch.equal(a, random_factors(0)[site].a)
    for site in SITES:
        teachers = [random_factors(seed)[site] for seed in (1, 2)]
        updates = [SCALING * b.double() @ a.double() for a, b in teachers]
        expected = sum(float(update.square().sum()) for update in updates) / 2
        assert store.mean_square[site] == pytest.approx(expected, rel=1e-12)


def test_units_are_read_when_asked_for_and_only_then(parameter_folder: Path) -> None:
    path = parameter_folder / parameter_store.unit_file("two")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = ParameterStore(parameter_folder)
    assert store.read(["one"])[1].all()
    with pytest.raises(UserError, match=path.name):
        store.read(["two"])


def test_names_of_units_do_not_collide() -> None:
    names = ["a b", "a-b", "a_b", "ä-b", "x" * 80, "x" * 81, "../up"]
    files = [parameter_store.unit_file(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(Path(file).name == file and file.isascii() for file in files)


@pytest.mark.parametrize("field, value", [("backbone", "c" * 64), ("tokenizer", "u" * 64), ("inputs", "e" * 64)])
def test_a_store_of_something_else_is_refused_by_the_fields_name(
    field: str, value: str, parameter_folder: Path, logit_folder: Path
) -> None:
    with pytest.raises(UserError, match=f"differing: {field} ") as refusal:
        ParameterStore(parameter_folder, {**BINDING, field: value})
    assert str(parameter_folder) in str(refusal.value)
    assert "mend" in str(refusal.value)
    if field != "backbone":
        field = {"inputs": "dataset"}.get(field, field)
        with pytest.raises(UserError, match=f"differing: {field} "):
            LogitStore(logit_folder, {"temperature": 1.0, field: value})


def test_every_differing_field_is_named(parameter_folder: Path) -> None:
    wanted = {**BINDING, "sites": ["encoder.q"], "unit": "category"}
    with pytest.raises(UserError, match=r"differing: sites .*, unit \(store: task, run: category\)"):
        ParameterStore(parameter_folder, wanted)


def test_a_manifest_that_is_missing_foreign_or_altered_is_refused(parameter_folder: Path, logit_folder: Path) -> None:
    with pytest.raises(UserError, match="not of the kind"):
        ParameterStore(logit_folder)
    with pytest.raises(UserError, match="not of the kind"):
        LogitStore(parameter_folder)
    manifest = parameter_folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "scaling": 1.0}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        ParameterStore(parameter_folder)
    manifest.unlink()
    with pytest.raises(UserError, match=r"not a finished store: manifest\.json is missing"):
        ParameterStore(parameter_folder)


def test_the_whole_vocabulary_in_float32_is_the_online_divergence(tmp_path: Path) -> None:
    """k = V loses nothing; with float16 nothing but its rounding."""
    generator = torch.Generator().manual_seed(7)
    teacher = 4 * torch.randn(2, 4, 330, generator=generator)
    labels = torch.tensor([[3, 4, 5, 1], [6, 1, -100, -100]])
    student = 2 * torch.randn(2, 4, 330, generator=generator)
    online = FullDistributions(teacher, torch.ones(2, dtype=torch.bool))
    for dtype, tolerance in (("float32", 1e-6), ("float16", MANY_TOKENS)):
        layout, path = Layout("topk", dtype), tmp_path / dtype / "shard.arrow"
        rows = logit_shards.rows_of(["x", "y"], labels, top_k(teacher, 999, 2.0), layout)
        logit_shards.write_shard(path, rows, "", layout)
        logit_store.finish(path.parent, [path], {"binding": {}, "method": "topk", "temperature": 2.0})
        stored = LogitStore(path.parent).read(["x", "y"], labels)
        assert stored.ids.shape[-1] == 330
        assert not stored.tail.any()
        assert (stored.ids[labels == -100] == -1).all()
        at = labels[..., None] != -100
        each = (stored.divergence(student, 2.0) - online.divergence(student, 2.0))[at[..., 0]].abs()
        assert float(each.max()) < tolerance
        gradients = []
        for distributions in (stored, online):
            copy = student.clone().requires_grad_()
            kl(copy, distributions, labels, 2.0).backward()
            assert copy.grad is not None
            gradients.append(copy.grad)
        torch.testing.assert_close(gradients[0], gradients[1], atol=tolerance, rtol=0)


def test_the_tail_is_the_mass_that_is_not_listed() -> None:
    logits = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(2)).double() * 4
    ids, log_probs, tail, _ = top_k(logits, 7, 2.0)
    assert tail is not None
    probabilities = (logits / 2.0).softmax(-1)
    listed = probabilities.gather(-1, ids)
    assert torch.allclose(log_probs.exp().double(), listed, atol=1e-6)
    assert torch.allclose(tail.double(), 1 - listed.sum(-1), atol=1e-6)
    assert (listed.min(-1).values >= probabilities.scatter(-1, ids, 0.0).max(-1).values).all()


def test_a_token_takes_at_most_a_hundred_bytes(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    rows = [{**row, "example_id": f"task1234-{number:032x}"} for number, row in enumerate(logit_rows(0, 512))]
    logit_shards.write_shard(path, rows)
    manifest = logit_store.finish(tmp_path, [path], {"binding": {}, "method": "topk", "temperature": 1.0})
    assert manifest["tokens"] == sum(len(row["labels"]) for row in rows)
    assert manifest["entries_per_token"] == 12
    assert 54 <= manifest["bytes_per_token"] <= 80


@pytest.mark.parametrize("vocabulary", [330, 70_000])
def test_draws_come_back_as_shares_whatever_the_batch(vocabulary: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(3, 5, vocabulary, generator=generator)
    labels = torch.randint(3, vocabulary, (3, 5), generator=generator)
    labels[1, 2:], labels[2, 4:] = -100, -100
    names, layout, path = ["a", "b", "c"], Layout("sampled", "float32", vocabulary, 300), tmp_path / "shard.arrow"
    rows = list(logit_shards.rows_of(names, labels, sampled(logits, labels, 300, 1.0, names, 5), layout))
    alone = sampled(logits[1:2, :3], labels[1:2, :3], 300, 1.0, ["b"], 5)
    (again,) = logit_shards.rows_of(["b"], labels[1:2, :3], alone, layout)
    assert all(np.array_equal(rows[1][name], again[name]) for name in ("ids", "counts", "sizes"))
    logit_shards.write_shard(path, rows, "", layout)
    logit_store.finish(tmp_path, [path], {"binding": {}, "method": "sampled", "temperature": 1.0})
    stored = LogitStore(tmp_path).read(["c", "b", "a"], labels.flip(0))
    real = labels.flip(0) != -100
    assert torch.allclose(stored.weights.sum(-1)[real], torch.ones(int(real.sum())))
    assert not stored.weights[~real].any()
    assert not stored.tail.any()
    known = stored.ids[0, 0] >= 0
    expected = logits[2, 0].log_softmax(-1)[stored.ids[0, 0][known]]
    assert torch.allclose(stored.log_probs[0, 0][known], expected, atol=1e-5)
    shares = stored.weights[0, 0][known]
    assert torch.allclose(shares * 300, (shares * 300).round(), atol=1e-3)


def test_logits_are_read_across_shards_in_any_order(logit_folder: Path) -> None:
    rows = {row["example_id"]: row for row in logit_rows(0, 4) + logit_rows(4, 4)}
    store = LogitStore(logit_folder)
    assert len(store) == 8
    assert "ex5" in store
    names = ["ex6", "ex0", "elsewhere", "ex5"]
    labels = labels_of([rows.get(name, rows["ex1"]) for name in names])
    stored = store.read(names, labels)
    assert stored.present.tolist() == [True, True, False, True]
    for place, name in enumerate(names):
        if name in rows:
            length = len(rows[name]["labels"])
            assert np.array_equal(stored.ids[place, :length].flatten().numpy(), rows[name]["ids"])
            assert np.array_equal(stored.log_probs[place, :length].flatten().half().numpy(), rows[name]["log_probs"])
            assert np.array_equal(stored.tail[place, :length].numpy(), rows[name]["tail"])
            assert (stored.ids[place, length:] == -1).all()


@pytest.mark.parametrize("change", ["token", "longer", "shorter"])
def test_another_target_is_refused(change: str, logit_folder: Path) -> None:
    labels = labels_of(logit_rows(0, 1))
    if change == "token":
        labels[0, 2] += 1
    elif change == "longer":
        labels[0, 6] = 5
    else:
        labels = labels[:, :5]
    with pytest.raises(UserError, match="another target for example ex0"):
        LogitStore(logit_folder).read(["ex0"], labels)


def batch_of(names: list[str], units: list[str], task_index: list[int] | None = None) -> Batch:
    labels = labels_of([row for row in logit_rows(0, 4) if row["example_id"] in names] or logit_rows(0, 1))
    zeros = torch.zeros(len(labels), 8, dtype=torch.int64)
    index = None if task_index is None else torch.tensor(task_index)
    return Batch(zeros, zeros, labels, task_index=index, example_ids=names, units=units)


def test_what_the_stores_lack_is_an_error_or_learnt_from_labels(parameter_folder: Path, logit_folder: Path) -> None:
    stores = LogitStore(logit_folder), ParameterStore(parameter_folder)
    strict = Distillation(*stores, LossConfig(missing="error"))
    lenient = Distillation(*stores, LossConfig(missing="label_only"))
    whole = strict.attach(batch_of(["ex0", "ex1"], ["one", "weak", "never"], task_index=[0, 1]))
    assert whole.teacher["distributions"].present.all()
    assert whole.teacher["adapters"][1].tolist() == [True, False, False]
    assert whole.counts == {"undistilled": 0, "unaligned": 1}
    for names, units, lacking in ((["other"], ["one"], "example 'other'"), (["ex0"], ["new"], "teacher unit 'new'")):
        with pytest.raises(UserError, match=f"lacks the {lacking}"):
            strict.attach(batch_of(names, units))
        with pytest.raises(UserError, match=f"lacks the {lacking}"):
            strict.require(names, units)
        lenient.require(names, units)
    batch = lenient.attach(batch_of(["other"], ["new"]))
    attached = batch.teacher
    assert batch.counts == {"undistilled": 1, "unaligned": 1}
    half = lenient.attach(batch_of(["ex0", "ex1"], ["new", "one"], task_index=[1, 1]))
    assert half.counts == {"undistilled": 0, "unaligned": 0}
    assert not attached["distributions"].present.any()
    assert attached["adapters"][0] == {}


def test_a_batch_keeps_its_teachers_names_on_another_device(parameter_folder: Path, logit_folder: Path) -> None:
    distillation = Distillation(LogitStore(logit_folder), ParameterStore(parameter_folder), LossConfig())
    moved = distillation.attach(batch_of(["ex0"], ["one"])).to(torch.device("meta"))
    assert moved.teacher["distributions"].log_probs.is_meta
    factors, present = moved.teacher["adapters"]
    assert factors["encoder.q"].b.is_meta
    assert present.is_meta


def test_a_shard_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard-00000.arrow"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            logit_shards.write_shard(path, logit_rows(0, 4), "s")
    assert list(tmp_path.iterdir()) == []
    assert not logit_shards.is_whole(path, "s")
    logit_shards.write_shard(path, logit_rows(0, 4), "s")
    assert logit_shards.is_whole(path, "s")
    assert not logit_shards.is_whole(path, "other settings")
    content = path.read_bytes()
    logit_shards.write_shard(path, logit_rows(0, 4), "s")
    assert path.read_bytes() == content
    path.write_bytes(content[:-40])
    assert not logit_shards.is_whole(path, "s")
