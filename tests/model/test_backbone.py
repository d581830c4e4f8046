"""Loading a backbone with its own head: the trap of tied embeddings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError
from tagi_ds.model.backbone import content_hash, has_own_head, load_backbone, resolve_folder
from tests.conftest import MakeTagi, model_inputs
from tests.distributed import run_ranks
from tests.plain_loss import label_loss


def test_the_head_is_the_checkpoints_own(tiny_folder: Path, tied_folder: Path) -> None:
    assert has_own_head(tiny_folder)
    assert not has_own_head(tied_folder)
    saved, own = load_file(tiny_folder / "model.safetensors"), load_backbone(tiny_folder)
    assert torch.equal(own.lm_head.weight, saved["lm_head.weight"])
    assert not torch.equal(own.lm_head.weight, own.shared.weight)
    for stack in (own.encoder, own.decoder):
        assert stack.embed_tokens.weight is own.shared.weight
    tied = load_backbone(tied_folder)
    assert tied.lm_head.weight is tied.shared.weight


@pytest.mark.parametrize("own_head", [True, False])
def test_the_loss_is_the_plain_computations(
    own_head: bool, tiny_folder: Path, tied_folder: Path, tiny_batch: Batch
) -> None:
    """From the decoder's last state and the file's own matrix, by hand; only a tied head has scaled inputs."""
    folder = tiny_folder if own_head else tied_folder
    model, saved = load_backbone(folder).eval(), load_file(folder / "model.safetensors")
    with torch.no_grad():
        output = model(
            input_ids=tiny_batch.input_ids,
            attention_mask=tiny_batch.attention_mask,
            labels=tiny_batch.labels,
            output_hidden_states=True,
        )
        hidden = output.decoder_hidden_states[-1]
        head = saved["lm_head.weight"] if own_head else saved["shared.weight"] * 32**-0.5
        expected = label_loss(hidden @ head.T, tiny_batch.labels)
    torch.testing.assert_close(label_loss(output.logits, tiny_batch.labels), expected)


def test_under_zero3_the_head_stays_apart(make_tagi: MakeTagi, tiny_folder: Path, tiny_batch: Batch) -> None:
    batch = model_inputs(tiny_batch)
    model = make_tagi(stirred=False)
    with torch.no_grad():
        expected = label_loss(model(**batch).logits, tiny_batch.labels).item()
        model.backbone.lm_head.weight = model.backbone.shared.weight
        trapped = label_loss(model(**batch).logits, tiny_batch.labels).item()
    assert abs(trapped - expected) > 1.0
    plain = json.dumps({name: tensor.tolist() for name, tensor in batch.items()})
    results = run_ranks("tests.model.own_head_ranks", 2, [str(tiny_folder), plain])
    found = json.loads(results.outputs[0].split("RESULT", 1)[1])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["gap"] > 0.1


def test_what_is_no_backbone_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds no weights"):
        load_backbone(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="type 'bert' are not supported"):
        load_backbone(tmp_path)


def test_the_content_hash_is_the_weights(tiny_folder: Path, tied_folder: Path) -> None:
    assert content_hash(tiny_folder) != content_hash(tied_folder)
    assert len(content_hash(tiny_folder)) == 64
