from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig, RunConfig
from tagi_ds.data import catalogue
from tagi_ds.data.collate import Collator, Form, TaskChunk
from tagi_ds.data.examples import Example, Extent, Task, extent_of
from tagi_ds.data.extents import SAMPLED, Extents
from tagi_ds.data.mixture import TaskMixture
from tagi_ds.objectives import batch_counts

EXAMPLES = (
    Example("1", "lamp", ("box", "bells")),
    Example("2", "naïve ☃", ("",), rendered="say naïve ☃ now"),
    Example("3", "", ("bell " * 50,), choices=("a", "b")),
)


def test_extents_are_bytes_of_utf_8() -> None:
    assert [extent_of(EXAMPLES, at) for at in range(3)] == [Extent(4, 0, 4), Extent(10, 18, 0), Extent(0, 0, 250)]


@pytest.fixture
def sni(real_data: Path, tmp_path: Path) -> list[Task]:
    config = RunConfig(study_dir=str(tmp_path))
    config.data.sni_dir, config.data.max_instances = str(real_data / "sni"), 30
    catalogue.prepare_index(config)
    train, _ = catalogue.training_split(config.data, 0)
    return train


def test_an_index_knows_its_extents_without_reading_the_examples(sni: list[Task]) -> None:
    for task in sni:
        for at in (0, 7, len(task.examples) - 1):
            assert extent_of(task.examples, at) == extent_of([task.examples[at]], 0)


@pytest.mark.parametrize("form", ["hypernetwork", "concatenated", "input_only"])
def test_estimates_follow_the_batches(tokenizer: PreTrainedTokenizerBase, form: Form) -> None:
    """Within a task tokens go with bytes, so that a constant rate is exact; limits are kept."""
    examples = tuple(Example(str(n), "lamp " * n + "box", ("bell " * (n % 3) + "box",)) for n in range(1, 41))
    task = Task("t", "turn the lamp around", "c", examples, paraphrases=("say lamp",))
    config = DataConfig(max_source_tokens=80, max_target_tokens=9)
    collator = Collator(tokenizer, config, form)
    extents = Extents(collator)
    for rows in ([0], [5, 2], [39]):
        count, instruction, given, target = extents(task, 1, rows)
        assert count == len(rows)
        assert instruction == (len(collator.instruction_ids(task, 1)) if form == "hypernetwork" else 0)
        batch = collator([TaskChunk(task, 1, (examples[row],), (0,)) for row in rows])
        assert given == pytest.approx(int(batch.attention_mask.sum(1).max()), rel=0.15, abs=3)
        assert given <= 80
        assert target == pytest.approx(int((batch.labels != -100).sum(1).max()), abs=3)
        assert target <= 9


def test_a_rendered_prompt_is_the_whole_input(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = tuple(Example(str(n), "lamp", ("box",), rendered="turn the lamp around " * n) for n in range(1, 9))
    task = Task("t", "say lamp " * 20, "c", examples, collection="p3")
    collator = Collator(tokenizer, DataConfig(), "concatenated")
    for row in range(8):
        _, _, given, _ = Extents(collator)(task, 0, [row])
        assert given == pytest.approx(len(collator.encode(examples[row].rendered or "", "input")), abs=2)


@pytest.mark.parametrize("form", ["hypernetwork", "concatenated"])
def test_real_tasks_are_padded_less_and_what_a_rank_does_not_have_is_not_encoded(
    sni: list[Task], tokenizer: PreTrainedTokenizerBase, form: Form
) -> None:
    sni = sni[:30]
    shares = {}
    for dealing in ("order", "length"):
        collator = Collator(tokenizer, DataConfig(max_source_tokens=4096), form)
        mixture = TaskMixture(sni, collator, 0, 32, 1, 1, 2, 4, dealing=dealing)  # type: ignore[arg-type]
        dealt = [batch for _ in range(4) for batch in mixture.next_step()]
        own = sum(len(batch.example_ids) for batch in dealt)
        # Beside its own, a rank reads a few examples of every task, once.
        assert len(collator._encoders["input"]._kept) <= own + (SAMPLED + 1) * len(sni)
        counts = [batch_counts(batch) for batch in dealt]
        padding = sum(count["per_example/input_padding"] for count in counts)
        shares[dealing] = padding / (padding + sum(count["per_example/input_tokens"] for count in counts))
    assert shares["length"] < 0.7 * shares["order"]
