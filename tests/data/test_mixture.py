from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import Collator, TaskChunk
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.mixture import TaskMixture, evaluation_batches, reference_of
from tagi_ds.errors import UserError

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=6)
UNUSED: Any = None
"""The collator of a mixture whose chunks are looked at, not its batches."""


def make_tasks(sizes: list[int]) -> list[Task]:
    return [
        Task(
            f"t{t}",
            f"say lamp {t}",
            "c",
            tuple(Example(f"{t}.{i}", f"box {t} {i}", (f"bell {i}", f"chair {i}")) for i in range(size)),
            paraphrases=(f"say bell {t}",),
            collection="p3" if t == len(sizes) - 1 else "sni",
        )
        for t, size in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    return Collator(tokenizer, DataConfig(prompt="plain", max_source_tokens=64, max_target_tokens=32))


def rows(batches: list[Batch]) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    found = []
    for batch in batches:
        assert batch.instruction_ids is not None
        for n, identity in enumerate(batch.example_ids):
            u = int(batch.task_index[n])
            parts = [batch.instruction_ids[u], batch.input_ids[n]]
            texts = [tuple(x for x in part.tolist() if x > 0) for part in parts]
            labels = tuple(x for x in batch.labels[n].tolist() if x > 0)
            found.append((identity, batch.tasks[u], texts[0], texts[1], labels))
    return found


@given(SIZES, st.integers(1, 4), st.integers(0, 99), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_example_exactly_once_an_epoch(
    collator: Collator, sizes: list[int], per_task: int, seed: int, per_batch: int
) -> None:
    mixture = TaskMixture(make_tasks(sizes), collator, seed, per_batch, per_task)
    epochs = 2
    steps = -(-epochs * mixture.chunks // per_batch)
    chunks = [chunk for step in range(steps) for chunk in mixture.global_batch(step)]
    everything = {f"{t}.{i}" for t, size in enumerate(sizes) for i in range(size)}
    for epoch in range(epochs):
        part = chunks[epoch * mixture.chunks : (epoch + 1) * mixture.chunks]
        counts = Counter(e.id for chunk in part for e in chunk.examples)
        assert counts == dict.fromkeys(everything, 1)
        assert all(len(chunk.examples) <= per_task for chunk in part)


@given(SIZES, st.integers(1, 3), st.integers(0, 99), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_the_global_batch_does_not_depend_on_ranks_or_accumulation(
    collator: Collator, sizes: list[int], per_task: int, seed: int, world_size: int, accumulation: int, share: int
) -> None:
    per_batch = world_size * accumulation * share
    tasks = make_tasks(sizes)
    alone = TaskMixture(tasks, collator, seed, per_batch, per_task)
    ranks = [
        TaskMixture(tasks, collator, seed, per_batch, per_task, rank, world_size, accumulation)
        for rank in range(world_size)
    ]
    for _ in range(3):
        dealt = [rank.next_step() for rank in ranks]
        assert all(len(micro) == accumulation for micro in dealt)
        assert sorted(rows([batch for micro in dealt for batch in micro])) == sorted(rows(alone.next_step()))


def long_tailed(sizes: list[int]) -> list[Task]:
    return [
        Task(task.name, task.definition, "c", tuple(replace(e, input="box " * (1 + 2**n)) for n, e in enumerate(given)))
        for task, given in ((task, task.examples) for task in make_tasks(sizes))
    ]


@given(SIZES, st.integers(1, 2), st.integers(0, 99), st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 2)]))
@settings(max_examples=20, deadline=None)
def test_dealing_changes_who_has_a_chunk_and_nothing_else(
    collator: Collator, sizes: list[int], per_task: int, seed: int, shape: tuple[int, int]
) -> None:
    world_size, accumulation = shape
    per_batch = 3 * world_size * accumulation
    tasks = long_tailed(sizes)
    found: dict[str, list[list[Batch]]] = {}
    for dealing in ("order", "length"):
        ranks = [
            TaskMixture(tasks, collator, seed, per_batch, per_task, r, world_size, accumulation, dealing=dealing)  # type: ignore[arg-type]
            for r in range(world_size)
        ]
        found[dealing] = [[batch for rank in ranks for batch in rank.next_step()] for _ in range(2)]
        assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1
    for step, (plain, by_length) in enumerate(zip(found["order"], found["length"], strict=True)):
        assert sorted(rows(by_length)) == sorted(rows(plain))
        expected = TaskMixture(tasks, UNUSED, seed, per_batch, per_task).global_batch(step)
        in_order = [example.id for chunk in expected for example in chunk.examples]
        assert [name for batch in plain for name in batch.example_ids] == in_order


@given(SIZES, st.integers(0, 99), st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_resuming_gives_the_very_next_batch(collator: Collator, sizes: list[int], seed: int, steps: int) -> None:
    tasks = make_tasks(sizes)
    unbroken = TaskMixture(tasks, collator, seed, 2, 2)
    for _ in range(steps):
        unbroken.next_step()
    resumed = [TaskMixture(tasks, collator, seed, 2, 2, rank, 2) for rank in range(2)]
    state = unbroken.state_dict()
    for rank in resumed:
        rank.load_state_dict(state)
    for _ in range(2):
        expected = sorted(rows(unbroken.next_step()))
        assert sorted(rows([batch for rank in resumed for batch in rank.next_step()])) == expected
    assert resumed[0].epoch == unbroken.epoch > 0
    assert resumed[0].step == steps + 2


def test_chunks_of_a_task_share_an_instruction(collator: Collator) -> None:
    task = Task("only", "say lamp", "c", tuple(Example(str(i), f"box {i}", ("bell",)) for i in range(6)))
    (batch,) = TaskMixture([task], collator, 0, 3, 2).next_step()
    assert len(batch.example_ids) == 6
    assert batch.tasks == ["only"]


def test_order_and_wording_follow_the_seed(collator: Collator) -> None:
    tasks = make_tasks([7] * 6)

    def epoch_of(seed: int) -> list[tuple[str, int, tuple[str, ...]]]:
        return [
            (chunk.task.name, chunk.paraphrase, tuple(e.id for e in chunk.examples))
            for chunk in TaskMixture(tasks, collator, seed, 42).global_batch(0)
        ]

    assert epoch_of(0) == epoch_of(0) != epoch_of(1)
    assert {paraphrase for _, paraphrase, _ in epoch_of(0)} == {0, 1}
    references = {e.id: reference_of(e, 0) for t in tasks for e in t.examples}
    assert set(references.values()) == {0, 1}
    # Another epoch brings another order but the same target, which the stored logits belong to.
    mixture = TaskMixture(tasks, collator, 0, 42)
    first, second = mixture.global_batch(0), mixture.global_batch(1)
    assert [c.examples for c in first] != [c.examples for c in second]
    for chunk in first + second:
        assert [references[e.id] for e in chunk.examples] == list(chunk.references)


def test_what_cannot_be_dealt_or_resumed_is_refused(collator: Collator) -> None:
    tasks = make_tasks([3, 3])
    with pytest.raises(UserError, match=r"data\.tasks_per_batch = 6 .* 2 ranks x engine\.accumulation = 2"):
        TaskMixture(tasks, collator, 0, 6, 1, 0, 2, 2)
    with pytest.raises(UserError, match="nothing to train on"):
        TaskMixture([], collator, 0, 6)
    state = TaskMixture(tasks, collator, 0, 6).state_dict()
    for other, field in (
        (TaskMixture(make_tasks([3, 2]), collator, 0, 6), "data"),
        (TaskMixture(tasks[::-1], collator, 0, 6), "data"),
        (TaskMixture(tasks, collator, 1, 6), "seed"),
        (TaskMixture(tasks, collator, 0, 6, 2), "examples_per_task"),
        (TaskMixture(tasks, collator, 0, 6, sampling="uniform"), "sampling"),
        (TaskMixture(tasks, collator, 0, 6, task_cap=2), "task_cap"),
        (TaskMixture(tasks, collator, 0, 6, weights={"sni": 2.0, "p3": 1.0}), "weights"),
    ):
        with pytest.raises(UserError, match=f"taken with {field} = "):
            other.load_state_dict(state)


def described(chunks: list[TaskChunk]) -> list[tuple[str, int, tuple[str, ...], tuple[int, ...]]]:
    return [(c.task.name, c.paraphrase, tuple(e.id for e in c.examples), c.references) for c in chunks]


def test_the_order_by_size_is_the_recorded_one() -> None:
    """Curves and stores of earlier runs rest on it."""
    digest = hashlib.sha256()
    for sizes, seed, per_batch, per_task in (([7, 3, 1, 12], 0, 3, 2), ([100] * 5, 42, 16, 1), ([5, 6], 7, 4, 4)):
        mixture = TaskMixture(make_tasks(sizes), UNUSED, seed, per_batch, per_task)
        for step in range(40):
            for name, paraphrase, ids, references in described(mixture.global_batch(step)):
                digest.update(repr((name, paraphrase, list(ids), references)).encode())
    assert digest.hexdigest() == "0b6a3b0cfd2ebcf01198d119cd3f91fe318371d88cee435c72d957b133335760"


SAMPLINGS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"task_cap": st.one_of(st.none(), st.integers(1, 9))}),
    st.fixed_dictionaries({"sampling": st.sampled_from(["uniform", "category"])}),
    st.fixed_dictionaries(
        {
            "sampling": st.sampled_from(["size", "uniform", "category"]),
            "weights": st.fixed_dictionaries({"sni": st.floats(0.1, 5), "p3": st.floats(0.1, 5)}),
        }
    ),
)


@given(SIZES, st.integers(1, 4), st.integers(0, 99), SAMPLINGS)
@settings(max_examples=60, deadline=None)
def test_no_example_comes_again_before_all_others_of_its_task(
    sizes: list[int], per_task: int, seed: int, sampling: dict[str, Any]
) -> None:
    mixture = TaskMixture(make_tasks([*sizes, 3]), UNUSED, seed, 1, per_task, **sampling)
    seen: dict[str, list[str]] = {}
    for step in range(6 * mixture.chunks):
        (chunk,) = mixture.global_batch(step)
        seen.setdefault(chunk.task.name, []).extend(e.id for e in chunk.examples)
    for task in mixture._tasks:
        ids, size = seen.get(task.name, []), len(task.examples)
        for begin in range(0, len(ids), size):
            assert len(set(ids[begin : begin + size])) == len(ids[begin : begin + size])


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_capped_task_gives_its_cap_every_epoch(size: int, cap: int, seed: int) -> None:
    mixture = TaskMixture(make_tasks([size, 4]), UNUSED, seed, 1, task_cap=cap)
    assert mixture.chunks == min(size, cap) + min(4, cap)
    for epoch in range(4):
        chunks = [mixture.global_batch(epoch * mixture.chunks + n)[0] for n in range(mixture.chunks)]
        assert Counter(c.task.name for c in chunks) == {"t0": min(size, cap), "t1": min(4, cap)}


@given(
    SIZES,
    st.integers(1, 3),
    st.integers(0, 99),
    SAMPLINGS,
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1)]), st.integers(1, 3)), max_size=4
    ),
)
@settings(max_examples=60, deadline=None)
def test_resumed_again_and_again_on_other_ranks_and_batch_sizes_the_rest_is_what_was_left(
    collator: Collator,
    sizes: list[int],
    per_task: int,
    seed: int,
    sampling: dict[str, Any],
    stretches: list[tuple[int, tuple[int, int], int]],
) -> None:
    """Each stretch: steps, (world size, accumulation), chunks a micro-batch."""
    tasks = make_tasks([*sizes, 2])
    unbroken = TaskMixture(tasks, UNUSED, seed, 1, per_task, **sampling)
    state: dict[str, Any] | None = None
    position = 0
    for steps, (world_size, accumulation), share in stretches:
        per_batch = world_size * accumulation * share
        ranks = [
            TaskMixture(tasks, collator, seed, per_batch, per_task, rank, world_size, accumulation, **sampling)
            for rank in range(world_size)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            found = [identity for rank in ranks for batch in rank.next_step() for identity in batch.example_ids]
            expected = [unbroken.global_batch(at)[0] for at in range(position, position + per_batch)]
            assert sorted(found) == sorted(e.id for chunk in expected for e in chunk.examples)
            position += per_batch
        states = [rank.state_dict() for rank in ranks]
        assert states == [states[0]] * world_size
        assert ranks[0].epoch == position / unbroken.chunks
        state = states[0]


@given(SIZES, st.integers(0, 99), st.integers(1, 3), st.integers(0, 5), SAMPLINGS)
@settings(max_examples=10, deadline=None)
def test_workers_change_nothing(
    collator: Collator, sizes: list[int], seed: int, workers: int, steps: int, sampling: dict[str, Any]
) -> None:
    tasks = make_tasks([*sizes, 2])
    alone = TaskMixture(tasks, collator, seed, 4, 1, 1, 2, **sampling)
    helped = TaskMixture(tasks, collator, seed, 4, 1, 1, 2, workers=workers, **sampling)
    other = TaskMixture(tasks, collator, seed, 4, 1, 1, 2, workers=1 + workers % 2, **sampling)
    try:
        for _ in range(steps):
            assert rows(helped.next_step()) == rows(alone.next_step())
        # What was prepared beyond the consumed steps is no part of the state.
        assert helped.state_dict() == alone.state_dict()
        other.next_step()
        other.load_state_dict(helped.state_dict())
        for _ in range(3):
            assert rows(other.next_step()) == rows(alone.next_step())
    finally:
        helped.close()
        other.close()


def test_batches_are_finished_where_they_are_made(collator: Collator) -> None:
    def finish(batch: Batch) -> Batch:
        batch.teacher["made_in"] = os.getpid()
        return batch

    mixture = TaskMixture(make_tasks([3]), collator, 0, 2, workers=1, finish=finish)
    try:
        (batch,) = mixture.next_step()
        assert batch.teacher["made_in"] != os.getpid()
    finally:
        mixture.close()


class Numbers(Sequence[Example]):
    """Examples that are made when they are asked for, as those of an index are."""

    def __init__(self, task: int, size: int) -> None:
        self.task, self.size = task, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return Example(f"{self.task}.{index}", "lamp", ("bell",))


def test_memory_and_start_do_not_grow_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagi_ds.data.mixture.fingerprint", lambda tasks: "")
    tasks = [Task(f"t{t}", "say lamp", "c", Numbers(t, 500_000)) for t in range(2000)]
    tracemalloc.start()
    try:
        for sampling in ({}, {"task_cap": 1000}, {"task_cap": 10_000}, {"sampling": "uniform"}):
            mixture = TaskMixture(tasks, UNUSED, 0, 16, **sampling)
            chunks = [chunk for step in (0, 1, 10**6) for chunk in mixture.global_batch(step)]
            assert len({e.id for chunk in chunks for e in chunk.examples}) == 48
            held, peak = tracemalloc.get_traced_memory()
            assert held < 60e6
            assert peak < 250e6
    finally:
        tracemalloc.stop()


def test_long_orders_are_permutations_too(collator: Collator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagi_ds.data.mixture.HELD_EXAMPLES", 2)
    monkeypatch.setattr("tagi_ds.data.mixture.LONGEST_ORDER", 4)
    test_every_example_exactly_once_an_epoch.hypothesis.inner_test(collator, [7, 2, 5], 2, 3, 4)  # type: ignore[attr-defined]


@given(SIZES, st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_evaluation_covers_everything_once(
    collator: Collator, sizes: list[int], batch_examples: int, world_size: int
) -> None:
    tasks = make_tasks(sizes)
    shares = [evaluation_batches(tasks, collator, batch_examples, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    found = [identity for share in shares for batch in share for identity in batch.example_ids]
    assert found == [e.id for t in tasks for e in t.examples]
    for batch in (batch for share in shares for batch in share):
        assert 1 <= len(batch.labels) <= batch_examples
        assert (batch.target_tokens == 0) == (not batch.example_ids)
        assert len(set(batch.tasks)) == len(batch.tasks)


def test_nothing_to_evaluate(collator: Collator) -> None:
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluation_batches([], collator, 4)


def test_what_could_not_be_read_is_told_once_with_the_first_batch(collator: Collator) -> None:
    tasks = make_tasks([4, 4])
    ranks = [TaskMixture(tasks, collator, 0, 4, 1, rank, 2, left_out=6) for rank in range(2)]
    counts = [[batch.counts.get("malformed", 0) for batch in rank.next_step()] for _ in range(3) for rank in ranks]
    assert counts == [[6], [0], [0], [0], [0], [0]]
    resumed = TaskMixture(tasks, collator, 0, 4, left_out=6)
    resumed.load_state_dict(ranks[0].state_dict())
    assert not resumed.next_step()[0].counts.get("malformed")
