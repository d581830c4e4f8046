"""The losses' closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tagi_ds.losses import alignment_weight, factor_mse, product_mse
from tagi_ds.model import LowRank

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
