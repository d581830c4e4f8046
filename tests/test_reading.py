"""Figures read chunk by chunk against whole logits: values, gradients of hidden states and head, and what is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tagi_ds.config import LossConfig
from tagi_ds.data.examples import Batch
from tagi_ds.divergence import Distributions, FullDistributions, StoredDistributions, kl
from tagi_ds.model import head as head_module
from tagi_ds.model.head import Figures, ReadingHead, accept_reader
from tagi_ds.objectives import SequenceObjective, TagiObjective
from tagi_ds.reading import TargetReader
from tagi_ds.teachers.logit_entries import sampled, top_k
from tests.conftest import VOCABULARY, MakeTagi
from tests.plain_loss import label_loss
from tests.test_divergence import of_entries

N, T, V, D = 4, 5, 37, 8
FORMS = ("none", "topk", "sampled", "full")
WEIGHTS = (0.7, 3.0)
Outcome = tuple[float, list[Tensor]]


@pytest.fixture(params=[1, 3 * V, 2**24], ids=["a row", "three rows", "all rows"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different numbers of rows at once."""
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", request.param)


def make_labels(seed: int, share: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N, T), generator=generator)
    return labels.masked_fill(torch.rand(N, T, generator=generator) > share, -100)


def make_teacher(form: str, labels: Tensor, temperature: float, seed: int, k: int = 6) -> Distributions | None:
    """The third example has none; that of the second has fewer tokens than the student in the `full` form."""
    logits = 2 * torch.randn(N, T, V - 2, generator=torch.Generator().manual_seed(seed))
    present = torch.arange(N) != 2
    if form == "none":
        return None
    if form == "full":
        return FullDistributions(logits, present)
    if form == "topk":
        return of_entries(top_k(logits, k, temperature))._replace(present=present)
    names = [f"example{n}" for n in range(N)]
    stored = of_entries(sampled(logits, labels.clamp(min=0), 2 * k, temperature, names, seed))
    return stored._replace(present=present)


def make_head(dtype: torch.dtype, trains: bool, scale: float = 1.0) -> ReadingHead:
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    weight = scale * torch.randn(V, D, generator=torch.Generator().manual_seed(5))
    head.weight = nn.Parameter(weight.to(dtype), requires_grad=trains)
    ReadingHead.instead_of(head)
    assert isinstance(head, ReadingHead)
    return head


def outcome(loss: Tensor, hidden: Tensor, head: ReadingHead) -> Outcome:
    asked = [hidden, *([head.weight] if head.weight.requires_grad else [])]
    return loss.item(), list(torch.autograd.grad(loss, asked))


def read(hidden: Tensor, head: ReadingHead, labels: Tensor, teacher: Any, temperature: float) -> Outcome:
    figures = head(hidden, TargetReader(labels, teacher, temperature))
    loss = WEIGHTS[0] * figures.label.sum()
    if figures.divergence is not None:
        loss = loss + WEIGHTS[1] * figures.divergence.sum()
    return outcome(loss, hidden, head)


def whole(hidden: Tensor, head: ReadingHead, labels: Tensor, teacher: Any, temperature: float) -> Outcome:
    """The same from all logits at once."""
    logits = head(hidden)
    # Not `label_loss`, which computes in float32 alone.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = wide.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -WEIGHTS[0] * picked[labels != -100].sum()
    if teacher is not None:
        loss = loss + WEIGHTS[1] * kl(logits, teacher, labels, temperature)
    return outcome(loss, hidden, head)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_loss_of_whole_logits(form: str, temperature: float, trains: bool, chunks: None) -> None:
    labels = make_labels(1)
    teacher = make_teacher(form, labels, temperature, 2)
    hidden = torch.randn(N, T, D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    head = make_head(torch.float32, trains)
    value, gradients = read(hidden, head, labels, teacher, temperature)
    expected, references = whole(hidden, head, labels, teacher, temperature)
    assert value == pytest.approx(expected, rel=1e-6)
    assert len(gradients) == 1 + trains
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))
    assert not gradients[0][labels == -100].any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    form=st.sampled_from(FORMS),
    k=st.integers(1, V - 2),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    steep=st.sampled_from([0.3, 3.0, 60.0]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    trains=st.booleans(),
)
def test_it_is_so_for_all_kinds_of_batches(
    seed: int, form: str, k: int, temperature: float, steep: float, share: float, trains: bool
) -> None:
    labels = make_labels(seed, share)
    teacher = make_teacher(form, labels, temperature, seed, k)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = make_head(torch.float64, trains, steep)
    value, gradients = read(hidden, head, labels, teacher, temperature)
    expected, references = whole(hidden, head, labels, teacher, temperature)
    # The teacher's side is float32 in both.
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-6 * steep)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("form", FORMS)
def test_every_positions_figure_has_the_gradient_that_differences_say(form: str, trains: bool) -> None:
    labels = make_labels(6)
    teacher = make_teacher(form, labels, 1.0, 7)
    hidden = torch.randn(N, T, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64).requires_grad_()
    head = make_head(torch.float64, trains)

    def figures(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found: Figures = torch.func.functional_call(head, {"weight": weight}, (hidden, reader()))
        return (found.label,) if found.divergence is None else (found.label, found.divergence)

    def reader() -> TargetReader:
        return TargetReader(labels, teacher, 1.0)

    assert torch.autograd.gradcheck(figures, (hidden, head.weight), atol=1e-6)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_as_near_to_the_truth_as_whole_logits_are(form: str, trains: bool, chunks: None) -> None:
    labels = make_labels(1, 1.0)
    teacher = make_teacher(form, labels, 1.0, 2)
    hidden = torch.randn(N, T, D, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    head, exact = make_head(torch.bfloat16, trains), make_head(torch.float64, trains)
    exact.weight.data.copy_(head.weight)
    _, gradients = read(hidden, head, labels, teacher, 1.0)
    _, plain = whole(hidden, head, labels, teacher, 1.0)
    _, truth = whole(hidden.detach().double().requires_grad_(), exact, labels, teacher, 1.0)
    for gradient, same, reference in zip(gradients, plain, truth, strict=True):
        assert gradient.dtype == torch.bfloat16
        ours, theirs = ((found.double() - reference).norm() / reference.norm() for found in (gradient, same))
        assert ours < max(2 * theirs, 2**-7)


def test_a_label_predicted_almost_surely_keeps_its_gradient_in_bf16() -> None:
    """q - 1 is taken from the others' share: 0.999 is 1 in bf16."""
    head = make_head(torch.bfloat16, False)
    labels = torch.full((1, 1), 4)
    hidden = (6 * head.weight[4] / head.weight[4].float().norm()).detach().bfloat16()[None, None].requires_grad_()
    exact = make_head(torch.float64, False)
    exact.weight.data.copy_(head.weight)
    _, (gradient,) = read(hidden, head, labels, None, 1.0)
    loss, (truth,) = whole(hidden.detach().double().requires_grad_(), exact, labels, None, 1.0)
    assert 0 < loss < 0.001
    assert (gradient.double() - truth).norm() < 2**-4 * truth.norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_any_target_is_zero_and_keeps_its_graph(form: str) -> None:
    labels = torch.full((N, T), -100)
    teacher = make_teacher(form, labels, 1.0, 2)
    for trains in (False, True):
        hidden, head = torch.randn(N, T, D).requires_grad_(), make_head(torch.float32, trains)
        value, gradients = read(hidden, head, labels, teacher, 1.0)
        assert value == 0
        assert all(not gradient.any() for gradient in gradients)
        assert [gradient.shape for gradient in gradients] == [hidden.shape, head.weight.shape][: 1 + trains]


def test_what_is_right_and_what_each_position_has(chunks: None) -> None:
    labels, hidden, head = make_labels(4), torch.randn(N, T, D), make_head(torch.float32, False)
    teacher = make_teacher("topk", labels, 1.0, 2)
    assert isinstance(teacher, StoredDistributions)
    figures, logits = head(hidden, TargetReader(labels, teacher)), head(hidden)
    real = labels != -100
    assert torch.equal(figures.right, (logits.argmax(-1) == labels) & real)
    for n in range(N):
        torch.testing.assert_close(figures.label[n].sum(), label_loss(logits[n : n + 1], labels[n : n + 1]))
        alone = StoredDistributions(*(part[n : n + 1] for part in teacher))
        torch.testing.assert_close(figures.divergence[n].sum(), kl(logits[n : n + 1], alone, labels[n : n + 1]))
    assert not figures.label[~real].any()
    assert not figures.divergence[2].any()


def test_logits_that_are_not_finite_give_a_loss_and_a_gradient_that_are_not() -> None:
    labels, head = make_labels(4), make_head(torch.float32, False)
    hidden = torch.full((N, T, D), float("nan")).requires_grad_()
    value, (gradient,) = read(hidden, head, labels, make_teacher("topk", labels, 1.0, 2), 1.0)
    assert value != value
    assert gradient[labels != -100].isnan().all()


class Largest(TorchDispatchMode):
    """The most elements that any tensor has that an operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return found


def of_tagi(make_tagi: MakeTagi, tiny_folder: Any, batch: Batch) -> tuple[Any, Any]:
    model = make_tagi()
    return model, TagiObjective(LossConfig(kl=2.0), model.config.scaling)


def of_tied(make_tagi: MakeTagi, tiny_folder: Any, batch: Batch) -> tuple[Any, Any]:
    model = make_tagi()
    model.freeze("all")
    return model, TagiObjective(LossConfig(kl=2.0), model.config.scaling)


MODELS: dict[str, Callable[..., tuple[Any, Any]]] = {"frozen": of_tagi, "trained": of_tied}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_makes_no_tensor_of_the_logits_size(
    name: str, make_tagi: MakeTagi, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, objective = MODELS[name](make_tagi, None, tiny_batch)
    positions = 40
    tiny_batch.labels = tiny_batch.labels.repeat(1, positions // tiny_batch.labels.shape[1])
    size = tiny_batch.labels.numel() * VOCABULARY
    shape = (*tiny_batch.labels.shape, 4)
    ids = torch.arange(4).expand(shape)
    present = torch.ones(len(tiny_batch.labels), dtype=torch.bool)
    weights = torch.full(shape, 0.2)
    teacher = StoredDistributions(ids, weights, weights.log(), weights[..., 0], present)
    tiny_batch.teacher["distributions"] = teacher
    found = {}
    for chunk in (8 * VOCABULARY, 2**24):
        monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
        with Largest() as largest:
            terms = objective(model, tiny_batch)
            (terms["label"].value + terms["kl"].value).backward()
        found[chunk] = largest.elements
    real = int((tiny_batch.labels != -100).sum())
    assert found[8 * VOCABULARY] < size / 2, "of the chunk's size or the weights'"
    assert found[2**24] == real * VOCABULARY < size, "a chunk of all rows; the mode sees what is made"


def plain(model: PreTrainedModel) -> nn.Module:
    accept_reader(model, model.get_output_embeddings())
    return model


def with_lora(model: PreTrainedModel) -> nn.Module:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    accept_reader(wrapped, model.get_output_embeddings())
    return wrapped


@pytest.mark.parametrize("make", [plain, with_lora])
def test_an_ordinary_model_takes_a_reader_and_gives_logits_without_one(
    make: Callable[[PreTrainedModel], nn.Module], tiny_backbone: PreTrainedModel, tiny_batch: Batch
) -> None:
    before = dict(tiny_backbone.state_dict())
    model = make(tiny_backbone).eval()
    terms = SequenceObjective()(model, tiny_batch)
    inputs: dict[str, Any] = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
    logits = model(**inputs, labels=tiny_batch.labels).logits
    assert logits.shape == (*tiny_batch.labels.shape, VOCABULARY)
    torch.testing.assert_close(terms["label"].value, label_loss(logits, tiny_batch.labels))
    assert terms["label"].value.requires_grad
    with pytest.raises(ValueError, match="input_ids"):
        model(attention_mask=tiny_batch.attention_mask, read=TargetReader(tiny_batch.labels))
    # A pass that failed leaves no reader behind.
    assert torch.equal(model(**inputs, labels=tiny_batch.labels).logits, logits)
    if make is plain:
        assert model.state_dict().keys() == before.keys()


def test_the_head_stays_the_module_it_was(tiny_backbone: PreTrainedModel) -> None:
    head, weight = tiny_backbone.lm_head, tiny_backbone.lm_head.weight
    ReadingHead.instead_of(head)
    assert tiny_backbone.lm_head is head
    assert tiny_backbone.lm_head.weight is weight
    with pytest.raises(TypeError, match="without bias"):
        ReadingHead.instead_of(nn.Linear(3, 4))
