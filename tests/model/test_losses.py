"""The losses' closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tagi_ds.data.examples import Batch
from tagi_ds.losses import (
    StoredDistributions,
    alignment_weight,
    factor_mse,
    kl_full,
    kl_stored,
    label_loss,
    product_mse,
)
from tagi_ds.model import LowRank, TagiForConditionalGeneration
from tests.conftest import model_inputs

N, T, V = 2, 4, 11
LABELS = torch.tensor([[3, 4, 1, -100], [5, 1, -100, -100]])
REAL = LABELS != -100


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(N, T, V, generator=torch.Generator().manual_seed(seed))


def stored(teacher: Tensor, k: int, temperature: float = 1.0) -> StoredDistributions:
    log_p = (teacher / temperature).log_softmax(-1)
    values, ids = log_p.topk(k, -1)
    tail = (1 - values.exp().sum(-1)).clamp(min=0) if k < V else torch.zeros(N, T)
    return StoredDistributions(ids, values, tail, torch.ones(N, dtype=torch.bool))


def by_hand(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1)[REAL].sum()


def test_label_loss_sums_over_target_tokens() -> None:
    x = logits(0)
    expected = -sum(x[n, t].log_softmax(-1)[LABELS[n, t]] for n in range(N) for t in range(T) if REAL[n, t])
    torch.testing.assert_close(label_loss(x, LABELS), torch.as_tensor(expected))


def test_kl_is_zero_between_equals_and_the_sum_by_hand_otherwise() -> None:
    student, teacher = logits(1), logits(2)
    assert abs(kl_full(teacher, teacher, LABELS)) < 1e-6
    torch.testing.assert_close(kl_full(student, teacher, LABELS), by_hand(student, teacher))
    assert kl_full(student, teacher, LABELS) > 0.1
    # KL(teacher || student), not the other way round: a mix-up would give the second figure.
    assert abs(by_hand(student, teacher) - by_hand(teacher, student)) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_store_of_the_whole_vocabulary_is_exact(temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    exact = kl_full(student, teacher, LABELS, temperature)
    torch.testing.assert_close(
        kl_stored(student, stored(teacher, V, temperature), LABELS, temperature), exact, atol=1e-6, rtol=1e-6
    )
    part = kl_stored(student, stored(teacher, 3, temperature), LABELS, temperature)
    assert 0 < part < exact
    assert abs(kl_stored(teacher, stored(teacher, 3, temperature), LABELS, temperature)) < 1e-5


def test_the_temperature_softens_both_sides_and_keeps_the_gradients_size() -> None:
    student, teacher = logits(1), logits(2)
    torch.testing.assert_close(
        kl_full(student, teacher, LABELS, 3.0), 9.0 * by_hand(student / 3.0, teacher / 3.0), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("form", ["full", "stored"])
def test_padding_does_not_count(form: str) -> None:
    def value(student: Tensor, teacher: Tensor) -> Tensor:
        if form == "full":
            return kl_full(student, teacher, LABELS)
        return kl_stored(student, stored(teacher, 3), LABELS)

    student, teacher = logits(1), logits(2)
    noise = 5 * logits(3) * ~REAL[..., None]
    assert torch.equal(value(student, teacher), value(student + noise, teacher - noise))
    assert not torch.equal(value(student, teacher), value(student + logits(3), teacher))


def test_examples_that_the_store_lacks_do_not_count_and_give_no_gradient() -> None:
    student, teacher = logits(1).requires_grad_(), stored(logits(2), 3)
    value = kl_stored(student, teacher._replace(present=torch.tensor([False, True])), LABELS)
    value.backward()
    assert student.grad is not None
    assert not student.grad[0].any()
    assert student.grad[1, :2].any()
    assert student.grad.isfinite().all()


def test_kls_gradient_reaches_the_generator(tiny_tagi: TagiForConditionalGeneration, tiny_batch: Batch) -> None:
    student = tiny_tagi(**model_inputs(tiny_batch)).logits
    teacher = student.detach().roll(1, -1)
    kl_full(student, teacher, tiny_batch.labels).backward()
    for name, parameter in tiny_tagi.hypernetwork.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in tiny_tagi.backbone.parameters())


U, R, D_IN, D_OUT = 3, 4, 9, 7


def factors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {site: LowRank(draw(U, R, D_IN), draw(U, D_OUT, R)) for site in ("one", "two")}


def regauged(adapters: dict[str, LowRank]) -> dict[str, LowRank]:
    m = torch.randn(R, R, generator=torch.Generator().manual_seed(8)) + 3 * torch.eye(R)
    return {site: LowRank(m @ a, b @ m.inverse()) for site, (a, b) in adapters.items()}


@pytest.mark.parametrize("form", [factor_mse, product_mse])
def test_alignment_is_zero_for_the_true_teacher(form: object) -> None:
    assert (form(factors(0), factors(0), 2.0, 2.0) < 1e-5).all()  # type: ignore[operator]
    assert (form(factors(0), factors(1), 2.0, 2.0) > 0.1).all()  # type: ignore[operator]


@pytest.mark.parametrize("form", [factor_mse, product_mse])
def test_both_scalings_are_folded_in(form: object) -> None:
    """scaling 2 with B is the update of scaling 0.5 with 4 B."""
    teacher = {site: LowRank(a, 4 * b) for site, (a, b) in factors(0).items()}
    assert (form(factors(0), teacher, 2.0, 0.5) < 1e-5).all()  # type: ignore[operator]
    assert (form(factors(0), teacher, 2.0, 2.0) > 0.1).all()  # type: ignore[operator]


def test_only_the_product_is_free_of_the_gauge() -> None:
    teacher, student = factors(0), factors(1)
    assert (product_mse(regauged(teacher), teacher, 1.0, 1.0) < 1e-4).all()
    torch.testing.assert_close(
        product_mse(regauged(student), regauged(teacher), 1.0, 1.0), product_mse(student, teacher, 1.0, 1.0)
    )
    assert (factor_mse(regauged(teacher), teacher, 1.0, 1.0) > 0.1).all()


def test_the_product_form_is_the_dense_error() -> None:
    student, teacher, scaling, teacher_scaling = factors(0), factors(1), 1.5, 0.5
    square = {"one": 40.0, "two": 90.0}
    expected = torch.zeros(U)
    for site in student:
        dense = scaling * student[site].b @ student[site].a - teacher_scaling * teacher[site].b @ teacher[site].a
        expected += dense.square().sum((1, 2)) / square[site] / len(student)
    torch.testing.assert_close(product_mse(student, teacher, scaling, teacher_scaling, square), expected)


def test_the_factor_form_is_the_mean_over_all_entries() -> None:
    student, teacher = factors(0), factors(1)
    entries = [
        torch.cat([(student[s].a - teacher[s].a).flatten(1), (2 * student[s].b - 3 * teacher[s].b).flatten(1)], 1)
        for s in student
    ]
    torch.testing.assert_close(factor_mse(student, teacher, 2.0, 3.0), torch.cat(entries, 1).square().mean(1))


def test_the_sigmoid_weight_carries_no_gradient() -> None:
    error = torch.tensor([0.0, 2.0], requires_grad=True)
    weight = alignment_weight(error, "sigmoid")
    torch.testing.assert_close(weight, torch.tensor([0.5, 0.880797]))
    assert not weight.requires_grad
    assert alignment_weight(error, 0.2).tolist() == pytest.approx([0.2, 0.2])
