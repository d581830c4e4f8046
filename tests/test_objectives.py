"""Objectives on a tiny TAGI model: the total is that of its parts, however the global batch is dealt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tagi_ds.config import LossConfig
from tagi_ds.data.examples import Batch
from tagi_ds.divergence import StoredDistributions, kl
from tagi_ds.engine.objective import Term, add_counts, divisor, loss_share
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.adapter import LowRank
from tagi_ds.model.head import Figures, ReadingHead
from tagi_ds.objectives import SequenceObjective, TagiObjective, batch_counts, shift_right
from tagi_ds.reading import TargetReader
from tests.conftest import VOCABULARY, MakeTagi, model_inputs, padded

TASKS, PER_TASK, K = 8, 2, 12
TEACHER_SCALING, TEMPERATURE = 0.5, 2.0
UNTAUGHT = 2
"""The task without a parameter teacher; its first example has no distribution either."""


def make_teachers(model: TagiForConditionalGeneration) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(21)
    factors = {
        site.name: LowRank(
            torch.randn(TASKS, 4, site.d_in, generator=generator) * site.d_in**-0.5,
            torch.randn(TASKS, site.d_out, 4, generator=generator) * 0.2,
        )
        for site in model.site_table
    }
    for a, b in factors.values():
        a[UNTAUGHT], b[UNTAUGHT] = 0.0, 0.0
    return factors


@pytest.fixture
def model(make_tagi: MakeTagi) -> TagiForConditionalGeneration:
    return make_tagi()


@pytest.fixture
def whole(model: TagiForConditionalGeneration) -> Batch:
    """Sixteen examples of eight tasks, all kinds of lengths, with both kinds of teachers."""
    generator = torch.Generator().manual_seed(20)
    rows = TASKS * PER_TASK
    input_ids, attention_mask = padded([4 + i % 5 for i in range(rows)], generator)
    instruction_ids, instruction_attention_mask = padded([5 + i for i in range(TASKS)], generator)
    labels, real = padded([2 + i % 6 for i in range(rows)], generator)
    logits = torch.randn(rows, labels.shape[1], VOCABULARY, generator=generator)
    log_probs, ids = (logits / TEMPERATURE).log_softmax(-1).topk(K)
    present = torch.ones(rows, dtype=torch.bool)
    present[UNTAUGHT * PER_TASK] = False
    distributions = StoredDistributions(ids, log_probs.exp(), log_probs, 1 - log_probs.exp().sum(-1), present)
    taught = torch.ones(TASKS, dtype=torch.bool)
    taught[UNTAUGHT] = False
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels.masked_fill(real == 0, -100),
        instruction_ids=instruction_ids,
        instruction_attention_mask=instruction_attention_mask,
        task_index=torch.arange(TASKS).repeat_interleave(PER_TASK),
        example_ids=[str(i) for i in range(rows)],
        teacher={"distributions": distributions, "adapters": (make_teachers(model), taught)},
    )


def part_of(batch: Batch, first: int, count: int) -> Batch:
    """The examples of `count` tasks, as a micro-batch of theirs."""
    tasks, rows = slice(first, first + count), slice(first * PER_TASK, (first + count) * PER_TASK)
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    factors, taught = batch.teacher["adapters"]
    mine = {site: LowRank(a[tasks], b[tasks]) for site, (a, b) in factors.items()} if taught[tasks].any() else {}
    return Batch(
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        labels=batch.labels[rows],
        instruction_ids=batch.instruction_ids[tasks],
        instruction_attention_mask=batch.instruction_attention_mask[tasks],
        task_index=torch.arange(count).repeat_interleave(PER_TASK),
        teacher={
            "distributions": StoredDistributions(*(tensor[rows] for tensor in batch.teacher["distributions"])),
            "adapters": (mine, taught[tasks]),
        },
    )


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    for number in range(parts):
        yield part_of(batch, number * TASKS // parts, TASKS // parts)


@dataclass
class Outcome:
    """Loss, logged terms and gradients of a global batch."""

    loss: float
    terms: dict[str, float]
    gradients: dict[str, Tensor]


def step(model: TagiForConditionalGeneration, objective: TagiObjective, batches: list[Batch]) -> Outcome:
    """What ranks or micro-batches do together: shares under common totals, summed."""
    totals = add_counts(objective, batches)
    model.zero_grad()
    loss, terms = 0.0, {}
    for batch in batches:
        found = objective(model, batch.to(torch.device("cpu")))
        share = loss_share(found, totals)
        share.backward()
        loss += share.item()
        for name, term in found.items():
            terms[name] = terms.get(name, 0.0) + term.value.item() / divisor(term, totals)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(loss, terms, gradients)


def objective_of(**settings: object) -> TagiObjective:
    config = LossConfig(**{"kl": 5.0, "alignment": "sigmoid", **settings})
    return TagiObjective(config, 2.0, TEMPERATURE, TEACHER_SCALING, dict.fromkeys(SITE_NAMES, 0.3))


SITE_NAMES = [
    f"{stack}.block.{block}.layer.{layer}.{kind}.{site}"
    for stack, layer, kind in (
        ("encoder", 0, "SelfAttention"),
        ("decoder", 0, "SelfAttention"),
        ("decoder", 1, "EncDecAttention"),
    )
    for block in range(2)
    for site in ("q", "v")
]


def expected_alignment(model: TagiForConditionalGeneration, whole: Batch, form: str) -> Tensor:
    """(tasks,) errors computed from whole matrices, in float64."""
    with torch.no_grad():
        adapters = model(**model_inputs(whole)).state.adapters
    teachers, _ = whole.teacher["adapters"]
    errors = []
    for task in range(TASKS):
        squares, entries = [], 0
        for site in SITE_NAMES:
            a, b = (factor[task].double() for factor in adapters[site])
            other_a, other_b = (factor[task].double() for factor in teachers[site])
            b, other_b = model.config.scaling * b, TEACHER_SCALING * other_b
            if form == "product":
                squares.append(float((b @ a - other_b @ other_a).square().sum()) / 0.3)
            else:
                squares.append(float((a - other_a).square().sum() + (b - other_b).square().sum()))
                entries += a.numel() + b.numel()
        errors.append(sum(squares) / (entries or len(SITE_NAMES)))
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("form", ["product", "mse"])
@pytest.mark.parametrize("alignment", ["sigmoid", 0.5])
def test_the_loss_is_that_of_its_parts(
    form: str, alignment: str | float, model: TagiForConditionalGeneration, whole: Batch
) -> None:
    outcome = step(model, objective_of(label=0.7, alignment=alignment, alignment_form=form), [whole])
    with torch.no_grad():
        logits = model(**model_inputs(whole)).logits
    real = whole.labels != -100
    picked = logits.double().log_softmax(-1).gather(-1, whole.labels.clamp(min=0)[..., None])[..., 0]
    label = -picked[real].mean().item()
    distributions = whole.teacher["distributions"]
    # Over all target tokens and all examples: what has no teacher counts zero.
    divergence = kl(logits, distributions, whole.labels, TEMPERATURE).item() / int(real.sum())
    errors = expected_alignment(model, whole, form)
    weights = errors.sigmoid() if alignment == "sigmoid" else torch.full_like(errors, alignment)
    counted = torch.arange(TASKS) != UNTAUGHT
    aligned = (weights * errors)[counted].sum().item() / TASKS
    assert outcome.terms["label"] == pytest.approx(label, rel=1e-5)
    assert outcome.terms["kl"] == pytest.approx(divergence, rel=1e-5)
    assert outcome.terms["alignment"] == pytest.approx(aligned, rel=1e-5)
    assert outcome.terms["mse"] == pytest.approx(errors[counted].mean().item(), rel=1e-5)
    assert outcome.loss == pytest.approx(0.7 * label + 5.0 * divergence + aligned, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("form", ["product", "mse"])
def test_the_loss_does_not_depend_on_how_the_batch_is_dealt(
    form: str, parts: int, model: TagiForConditionalGeneration, whole: Batch
) -> None:
    objective = objective_of(alignment_form=form)
    one, dealt = step(model, objective, [whole]), step(model, objective, list(split(whole, parts)))
    assert dealt.loss == pytest.approx(one.loss, rel=1e-5)
    assert dealt.terms == pytest.approx(one.terms, rel=1e-5)
    assert dealt.gradients.keys() == one.gradients.keys()
    for name, gradient in one.gradients.items():
        size = gradient.abs().max().clamp(min=1e-6)
        assert (dealt.gradients[name] - gradient).abs().max() <= 2e-5 * size, name


def test_the_alignment_reaches_the_generator_and_not_the_untaught_task(
    model: TagiForConditionalGeneration, whole: Batch
) -> None:
    objective = objective_of(label=0.0, kl=0.0)
    alone = part_of(whole, UNTAUGHT, 1)
    silent = step(model, objective, [alone])
    assert (silent.loss, silent.terms["alignment"], silent.terms["mse"]) == (0.0, 0.0, 0.0)
    assert all(not gradient.any() for gradient in silent.gradients.values())
    heard = step(model, objective, [whole])
    reached = {name for name, gradient in heard.gradients.items() if gradient.any()}
    assert any("b_head" in name for name in reached)
    assert all(name.startswith("hypernetwork.generator") for name in reached)


def test_a_batch_without_any_teacher_learns_from_its_labels(model: TagiForConditionalGeneration, whole: Batch) -> None:
    absent = part_of(whole, UNTAUGHT, 1)
    distributions = absent.teacher["distributions"]
    absent.teacher["distributions"] = distributions._replace(present=torch.zeros(PER_TASK, dtype=torch.bool))
    with_terms = step(model, objective_of(), [absent])
    labels_alone = step(model, objective_of(kl=0.0, alignment=0.0), [absent])
    assert with_terms.loss == pytest.approx(labels_alone.loss, rel=1e-6)
    assert {"kl", "alignment", "mse"} <= with_terms.terms.keys() - labels_alone.terms.keys()
    for name, gradient in labels_alone.gradients.items():
        assert torch.allclose(with_terms.gradients[name], gradient, atol=1e-7)


def test_a_weight_of_zero_is_only_logged(model: TagiForConditionalGeneration, whole: Batch) -> None:
    outcome = step(model, objective_of(label=0.0, alignment=0.0), [whole])
    assert outcome.loss == pytest.approx(5.0 * outcome.terms["kl"], rel=1e-6)
    full = step(model, objective_of(), [whole])
    assert outcome.terms["label"] == pytest.approx(full.terms["label"], rel=1e-6)
    assert "alignment" not in outcome.terms


def test_names_of_terms_and_counts_do_not_depend_on_the_batch(
    model: TagiForConditionalGeneration, whole: Batch
) -> None:
    objective = objective_of()
    parts = list(split(whole, TASKS))
    assert len({tuple(objective.counts(part)) for part in parts}) == 1
    with torch.no_grad():
        named = [objective(model, part) for part in parts]
    assert len({tuple((name, term.per, term.weight) for name, term in terms.items()) for terms in named}) == 1


def test_lengths_and_padding_are_counted_by_kind(whole: Batch) -> None:
    counts = batch_counts(whole)
    assert whole.instruction_attention_mask is not None
    masks = {"instruction": whole.instruction_attention_mask, "input": whole.attention_mask}
    for kind, mask in {**masks, "target": whole.labels != -100}.items():
        for prefix in ("per_example/", "data/total_"):
            tokens, padding = counts[f"{prefix}{kind}_tokens"], counts[f"{prefix}{kind}_padding"]
            assert tokens == float(mask.sum())
            assert tokens + padding == mask.numel()
    assert batch_counts(replace(whole, instruction_attention_mask=None))["per_example/instruction_padding"] == 0.0


def test_figures_beside_the_loss_count_what_is_right(whole: Batch) -> None:
    """A model that predicts the labels, but for one token of the first example and all of the second."""
    logits = torch.nn.functional.one_hot(whole.labels.clamp(min=0), VOCABULARY).float() * 9.0
    logits[0, 0], logits[1] = 0.0, 0.0
    logits[0, 0, 2], logits[1, :, 2] = 1.0, 1.0

    head = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False)
    torch.nn.init.eye_(head.weight)
    ReadingHead.instead_of(head)
    seen: dict[str, Tensor] = {}

    def model(read: TargetReader, **inputs: Tensor) -> Figures:
        seen.update(inputs)
        figures: Figures = head(logits, read)
        return figures

    objective = SequenceObjective()
    terms: dict[str, Term] = objective(model, whole)
    totals = add_counts(objective, [whole])
    wrong = 1 + int((whole.labels[1] != -100).sum())
    tokens = int((whole.labels != -100).sum())
    assert terms["token_accuracy"].value.item() / divisor(terms["token_accuracy"], totals) == pytest.approx(
        (tokens - wrong) / tokens
    )
    assert terms["exact"].value.item() / divisor(terms["exact"], totals) == pytest.approx(14 / 16)
    assert loss_share({"exact": terms["exact"], "label": terms["label"]}, totals) == terms["label"].value / tokens
    assert torch.equal(seen["decoder_input_ids"], shift_right(whole))


def test_decoder_inputs_are_the_labels_one_later(tiny_batch: Batch, model: TagiForConditionalGeneration) -> None:
    shifted = shift_right(tiny_batch)
    assert torch.equal(shifted, model.backbone._shift_right(tiny_batch.labels))
    assert not shifted[:, 0].any()
