"""The model's identities: its start, grouping, padding, saving, checkpointing, what trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone, parameters_to_train
from tagi_ds.reading import TargetReader
from tests.conftest import MakeTagi, model_inputs
from tests.plain_loss import label_loss

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@torch.no_grad()
def logits_of(model: TagiForConditionalGeneration, batch: Batch) -> torch.Tensor:
    return model(**model_inputs(batch)).logits


def single(batch: Batch, row: int) -> Batch:
    """One example of a batch alone, without any padding."""
    assert batch.instruction_ids is not None
    assert batch.instruction_attention_mask is not None
    assert batch.task_index is not None
    task = int(batch.task_index[row])
    length, words = int(batch.attention_mask[row].sum()), int(batch.instruction_attention_mask[task].sum())
    return Batch(
        input_ids=batch.input_ids[row : row + 1, :length],
        attention_mask=batch.attention_mask[row : row + 1, :length],
        labels=batch.labels[row : row + 1],
        instruction_ids=batch.instruction_ids[task : task + 1, :words],
        instruction_attention_mask=batch.instruction_attention_mask[task : task + 1, :words],
        task_index=torch.tensor([0]),
    )


@pytest.mark.parametrize("head", ["tiny_folder", "tied_folder"])
def test_it_starts_as_its_backbone(
    head: str, make_tagi: MakeTagi, tiny_batch: Batch, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(head)
    model, plain = make_tagi(folder=folder, stirred=False, concatenate=False), load_backbone(folder).eval()
    with torch.no_grad():
        inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
        expected = plain(**inputs, labels=tiny_batch.labels, use_cache=False).logits
    assert torch.equal(logits_of(model, tiny_batch), expected)


def test_with_concatenation_it_starts_as_the_backbone_given_instruction_and_input(
    make_tagi: MakeTagi, tiny_backbone: PreTrainedModel, tiny_batch: Batch
) -> None:
    model, encoder = make_tagi(stirred=False), tiny_backbone.encoder
    with torch.no_grad():
        mask_i = tiny_batch.instruction_attention_mask
        encoded_i = encoder(input_ids=tiny_batch.instruction_ids, attention_mask=mask_i).last_hidden_state
        encoded_f = encoder(input_ids=tiny_batch.input_ids, attention_mask=tiny_batch.attention_mask).last_hidden_state
        index = tiny_batch.task_index
        expected = tiny_backbone(
            encoder_outputs=BaseModelOutput(last_hidden_state=torch.cat([encoded_i[index], encoded_f], 1)),
            attention_mask=torch.cat([mask_i[index], tiny_batch.attention_mask], 1),
            labels=tiny_batch.labels,
            use_cache=False,
        ).logits
    assert torch.equal(logits_of(model, tiny_batch), expected)


SETTINGS: list[dict[str, object]] = [
    {},
    {"pooling": "mean", "head": "slot"},
    {"fusion_norm": "post", "sites": ["q", "v", "wo"]},
    {"fusion": False, "a": "shared"},
    {"sites": []},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "tagi")
def test_a_grouped_padded_batch_is_its_examples_one_by_one(
    settings: dict[str, object], make_tagi: MakeTagi, tiny_batch: Batch
) -> None:
    """Covers padding too: alone, neither the instruction nor the input of an example has any."""
    model = make_tagi(**settings)
    together = logits_of(model, tiny_batch)
    assert not torch.allclose(together[0], together[2], atol=1e-2)
    for row in range(len(together)):
        torch.testing.assert_close(together[row : row + 1], logits_of(model, single(tiny_batch, row)), **CLOSE)


@pytest.mark.parametrize("kind", ["input", "instruction"])
def test_a_wrong_mask_is_noticed(kind: str, tiny_tagi: TagiForConditionalGeneration, tiny_batch: Batch) -> None:
    """The identity above rests on the masks: a model that read the padding would give other logits."""
    right = logits_of(tiny_tagi, tiny_batch)
    if kind == "input":
        tiny_batch.attention_mask = torch.ones_like(tiny_batch.attention_mask)
    else:
        assert tiny_batch.instruction_attention_mask is not None
        tiny_batch.instruction_attention_mask = torch.ones_like(tiny_batch.instruction_attention_mask)
    assert (logits_of(tiny_tagi, tiny_batch) - right).abs().max() > 1e-3


@pytest.mark.parametrize("head", ["tiny_folder", "tied_folder"])
def test_saved_and_loaded_it_is_the_same_to_the_bit(
    head: str, make_tagi: MakeTagi, tiny_batch: Batch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = make_tagi(folder=request.getfixturevalue(head))
    model.save_pretrained(tmp_path)
    loaded = TagiForConditionalGeneration.from_pretrained(tmp_path).eval()
    for parameter in loaded.parameters():
        # Weights mapped from a file lie at other alignments, for which the CPU's kernels round differently.
        parameter.data = parameter.data.clone()
    assert torch.equal(logits_of(model, tiny_batch), logits_of(loaded, tiny_batch))
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    assert all(p.requires_grad for p in loaded.hypernetwork.parameters())
    own_head = head == "tiny_folder"
    assert torch.equal(loaded.backbone.lm_head.weight, loaded.backbone.shared.weight) is not own_head


def test_gradient_checkpointing_with_two_micro_batches_in_flight(make_tagi: MakeTagi, tiny_batch: Batch) -> None:
    """Two forwards before two backwards: recomputation must meet each micro-batch's own adapters."""
    gradients = []
    other = single(tiny_batch, 3)
    for checkpointing in (False, True):
        model = make_tagi().train()
        if checkpointing:
            model.backbone.gradient_checkpointing_enable()
        losses = [label_loss(model(**model_inputs(b)).logits, b.labels) for b in (tiny_batch, other)]
        for loss in losses:
            loss.backward()
        gradients.append({name: p.grad for name, p in model.hypernetwork.named_parameters()})
    assert any(g.abs().max() > 1e-3 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_labels_give_the_loss_that_t5_gives(
    make_tagi: MakeTagi, tiny_backbone: PreTrainedModel, tiny_batch: Batch
) -> None:
    """What transformers' Trainer minimises; a reader's figures stand in its place."""
    inputs = {"input_ids": tiny_batch.input_ids, "attention_mask": tiny_batch.attention_mask}
    expected = tiny_backbone(**inputs, labels=tiny_batch.labels).loss
    start = make_tagi(stirred=False, concatenate=False)(**model_inputs(tiny_batch)).loss
    assert torch.equal(start, expected)
    model = make_tagi()
    output = model(**model_inputs(tiny_batch))
    counted = (tiny_batch.labels != -100).sum()
    torch.testing.assert_close(output.loss, label_loss(output.logits, tiny_batch.labels) / counted)
    output.loss.backward()
    assert all(p.grad is not None for p in model.hypernetwork.parameters())
    given = model_inputs(tiny_batch)
    labels = given.pop("labels")
    assert model(**given, decoder_input_ids=model.backbone._shift_right(labels)).loss is None
    assert model(**given, labels=labels, read=TargetReader(labels)).loss is None


def test_training_leaves_the_backbone_as_it_is(make_tagi: MakeTagi, tiny_batch: Batch) -> None:
    model = make_tagi(stirred=False).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(20):
        loss = label_loss(model(**model_inputs(tiny_batch)).logits, tiny_batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, before[name]), name
    moved = [n for n in before if n.startswith("hypernetwork.") and not torch.equal(model.state_dict()[n], before[n])]
    assert len(moved) == sum(n.startswith("hypernetwork.") for n in before)


def test_without_sites_fusion_alone_is_the_model(make_tagi: MakeTagi, tiny_batch: Batch, tmp_path: Path) -> None:
    """The ablation without a hypernetwork: no adapters, the decoder's blocks only pass the state on."""
    model = make_tagi(sites=[], stirred=False).train()
    start = logits_of(model, tiny_batch)
    assert all(name.startswith("fusion.") for name, _ in model.hypernetwork.named_parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    output = model(**model_inputs(tiny_batch))
    assert output.state is not None
    assert output.state.adapters == {}
    label_loss(output.logits, tiny_batch.labels).backward()
    optimizer.step()
    moved = logits_of(model, tiny_batch)
    assert not torch.equal(moved, start)
    model.save_pretrained(tmp_path)
    loaded = TagiForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.sites == []
    assert torch.equal(logits_of(loaded, tiny_batch), moved)


def test_what_else_trains_goes_by_the_kind_of_module(tiny_backbone: PreTrainedModel) -> None:
    """A module named like a norm is none; one with another name is."""
    tiny_backbone.layer_norm_like = torch.nn.Linear(2, 2)
    tiny_backbone.scale = type(tiny_backbone.encoder.final_layer_norm)(4)
    ids = {id(p): name for name, p in tiny_backbone.named_parameters()}

    def names(group: str) -> set[str]:
        return {ids[id(p)] for p in parameters_to_train(tiny_backbone, group)}

    assert names("nothing") == set()
    assert names("all") == set(ids.values())
    norms, embeddings = names("norms"), names("embeddings")
    assert "scale.weight" in norms
    assert not any("layer_norm_like" in name for name in norms)
    assert len(norms) == 1 + 2 * 2 + 2 * 3 + 2
    assert "shared.weight" in embeddings
    assert sum("relative_attention_bias" in name for name in embeddings) == 2
    assert "lm_head.weight" not in embeddings
    assert names("norms_embeddings") == norms | embeddings


def test_a_variant_trains_norms_too(make_tagi: MakeTagi) -> None:
    trained = {n for n, p in make_tagi(also_train="norms").named_parameters() if p.requires_grad}
    assert any("layer_norm" in name for name in trained)
    assert not any(name.startswith("backbone") and "layer_norm" not in name for name in trained)


def test_a_shared_a_is_the_teachers_and_stays(make_tagi: MakeTagi, tiny_batch: Batch) -> None:
    model = make_tagi(a="shared")
    common = {site.name: torch.randn(4, site.d_in) for site in model.site_table}
    model.hypernetwork.set_shared_a(common)
    state = model.compile_instructions(tiny_batch.instruction_ids, tiny_batch.instruction_attention_mask)
    for site, (a, b) in state.adapters.items():
        assert torch.equal(a, common[site].expand(3, -1, -1))
        assert not torch.equal(b[0], b[1])
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("a_base"))
    with pytest.raises(UserError, match="train the teachers with this model's rank"):
        model.hypernetwork.set_shared_a({name: a[:2] for name, a in common.items()})
