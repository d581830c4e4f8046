from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Batch, Example, Task
from tagi_ds.data.mixture import TaskMixture, evaluation_batches, reference_of
from tagi_ds.errors import UserError

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def make_tasks(sizes: list[int]) -> list[Task]:
    return [
        Task(
            f"t{t}",
            f"say lamp {t}",
            "c",
            tuple(Example(f"{t}.{i}", f"box {t} {i}", (f"bell {i}", f"chair {i}")) for i in range(size)),
            paraphrases=(f"say bell {t}",),
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
        assert rows([batch for micro in dealt for batch in micro]) == rows(alone.next_step())


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
        expected = rows(unbroken.next_step())
        assert rows([batch for rank in resumed for batch in rank.next_step()]) == expected
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
        (TaskMixture(tasks, collator, 0, 2), "tasks_per_batch"),
        (TaskMixture(tasks, collator, 0, 6, 2), "examples_per_task"),
    ):
        with pytest.raises(UserError, match=f"taken with {field} = "):
            other.load_state_dict(state)


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
