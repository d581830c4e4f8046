"""A checkpoint becomes a folder that answers the same, in a process that knows nothing of the run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tagi_ds import recipe
from tagi_ds.convert.hugging_face import export_model
from tagi_ds.convert.model_folder import load_model_folder, read_prompt, text_task
from tagi_ds.data.examples import Batch
from tagi_ds.errors import UserError
from tagi_ds.model.backbone import content_hash
from tests.conftest import model_inputs
from tests.convert.runs import train_run

FRESH = """
import sys, torch
import tagi_ds.answering
from safetensors.torch import load_file, save_file
from tagi_ds.model import TagiForConditionalGeneration
torch.set_num_threads(1)
folder, batch, out = sys.argv[1:]
model = TagiForConditionalGeneration.from_pretrained(folder).eval()
for parameter in model.parameters():
    parameter.data = parameter.data.clone()
with torch.no_grad():
    logits = model(**load_file(batch)).logits
# Answering starts fast: neither is needed.
assert not {"deepspeed", "peft"} & set(sys.modules), set(sys.modules)
save_file({"logits": logits}, out)
"""


def realign(model: torch.nn.Module) -> None:
    """Weights mapped from a file lie at other alignments, for which the CPU's kernels round differently."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def other_hash(checkpoint: Path) -> None:
    """Rewrites a checkpoint's record of its backbone, and the manifest with it."""
    from tagi_ds.engine.manifest import seal

    state = json.loads((checkpoint / "state.json").read_text())
    state["run"]["extra"]["backbone_hash"] = "0" * 64
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)


def test_a_finetuned_model_comes_back_bit_for_bit_in_a_fresh_process(
    tiny_folder: Path, tiny_batch: Batch, tmp_path: Path
) -> None:
    trained, _ = train_run("finetune", tiny_folder, tmp_path / "run", tiny_batch)
    folder = export_model(tmp_path / "run", None, tmp_path / "model")
    with torch.no_grad():
        expected = trained(**model_inputs(tiny_batch)).logits
    save_file(model_inputs(tiny_batch), tmp_path / "batch.safetensors")
    arguments = [str(folder), str(tmp_path / "batch.safetensors"), str(tmp_path / "logits.safetensors")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, timeout=120)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert read_prompt(folder).prompt == "plain"
    card = (folder / "README.md").read_text()
    assert "3 of 3" in card
    assert "a LoRA adapter for the frozen backbone, which then answers bare inputs. The folder holds both.\n" in card
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 6
    assert AutoTokenizer.from_pretrained(folder)("say")["input_ids"][-1] == 1


@pytest.mark.parametrize("stage", ["meta_train", "backbone"])
@pytest.mark.parametrize("head", ["tiny_folder", "tied_folder"])
def test_an_ordinary_model_is_read_by_transformers_alone(
    stage: str, head: str, tiny_batch: Batch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    trained, _ = train_run(stage, request.getfixturevalue(head), tmp_path / "run", tiny_batch)
    folder = export_model(tmp_path / "run", None, tmp_path / "model")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    realign(loaded)
    inputs = {name: getattr(tiny_batch, name) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trained(**inputs).logits)


def test_also_trained_parts_of_the_backbone_are_exported(tiny_folder: Path, tiny_batch: Batch, tmp_path: Path) -> None:
    trained, _ = train_run("pretrain", tiny_folder, tmp_path / "run", tiny_batch, "--model.also_train", "norms")
    loaded = load_model_folder(export_model(tmp_path / "run", None, tmp_path / "model")).model
    original = load_file(tiny_folder / "model.safetensors")["encoder.final_layer_norm.weight"]
    name = "backbone.encoder.final_layer_norm.weight"
    assert torch.equal(loaded.state_dict()[name], trained.state_dict()[name])
    assert not torch.equal(loaded.state_dict()[name], original)


def _another_model(run: Path, tmp_path: Path, tiny_folder: Path, batch: Batch) -> Path:
    train_run("finetune", tiny_folder, tmp_path / "other", batch, "--model.rank", "2")
    return tmp_path / "other" / "checkpoints" / "step_3"


def _damaged(run: Path, *_: object) -> Path:
    weights = run / "checkpoints" / "step_3" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return weights.parent


def _another_backbone(run: Path, *_: object) -> Path:
    other_hash(run / "checkpoints" / "step_3")
    return run / "checkpoints" / "step_3"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_another_model, r"other/checkpoints/step_3 is of another model: hypernetwork.*differ"),
        (_damaged, r"step_3 is damaged: weights\.safetensors is not as it was written"),
        (_another_backbone, r"the backbone in .*own_head is not the one that .*run was trained on"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    spoil: Callable[..., Path], message: str, tiny_folder: Path, tiny_batch: Batch, tmp_path: Path
) -> None:
    train_run("finetune", tiny_folder, tmp_path / "run", tiny_batch)
    checkpoint = spoil(tmp_path / "run", tmp_path, tiny_folder, tiny_batch)
    with pytest.raises(UserError, match=message):
        export_model(tmp_path / "run", checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_no_training_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run folder: config\.yaml is missing"):
        export_model(tmp_path, None, tmp_path / "model")
    (tmp_path / "config.yaml").write_text("run: {stage: evaluate}\n")
    with pytest.raises(UserError, match="stage evaluate, which trains no model"):
        export_model(tmp_path, None, tmp_path / "model")


def test_what_is_no_tagi_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model_folder(tmp_path)
    with pytest.raises(UserError, match="describes a t5 model"):
        load_model_folder(tiny_folder)
    with pytest.raises(UserError, match="instruction is empty"):
        text_task("  \n")


def test_a_damaged_model_folder_is_refused(tiny_folder: Path, tiny_batch: Batch, tmp_path: Path) -> None:
    train_run("pretrain", tiny_folder, tmp_path / "run", tiny_batch)
    folder = export_model(tmp_path / "run", None, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the model in"):
        load_model_folder(tmp_path / "cut")
    (folder / "tagi_prompt.json").unlink()
    with pytest.raises(UserError, match=r"tagi_prompt\.json is missing"):
        load_model_folder(folder)


def test_the_card_has_data_figures_and_command(tiny_folder: Path, tiny_batch: Batch, tmp_path: Path) -> None:
    settings = ("--study_dir", str(tmp_path), "--data.sni_dir", "some/tasks", "--engine.log_every", "1")
    train_run("finetune", tiny_folder, tmp_path / "finetune", tiny_batch, *settings)
    folder = export_model(tmp_path / "finetune", None, tmp_path / "model")
    card = (folder / "README.md").read_text()
    logged = [json.loads(line) for line in (tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert f"| loss/label | {logged[-1]['loss/label']:.4g} |" in card
    for words in ("`some/tasks`", "--num_accelerators 1 launchers/finetune.py --config run.yaml", "single"):
        assert words in card
    again = recipe.parse("finetune", ["--config", str(folder / "run.yaml")]).config
    assert again.data.sni_dir == "some/tasks"
    # Scores of these very weights are told, those of others are not.
    for name, model in (("tagi", content_hash(folder)), ("other", "0" * 64)):
        path = tmp_path / "evaluate" / name / "results.json"
        path.parent.mkdir(parents=True)
        scores = {"exact_match": 12.34 if name == "tagi" else 56.78, "by_task": {"a": 1.0}}
        path.write_text(json.dumps({"split": "default", "model": model, "metrics": {"test": scores}}))
    card = (export_model(tmp_path / "finetune", None, tmp_path / "model") / "README.md").read_text()
    assert "| test, exact_match | 12.3 |" in card
    assert "56.8" not in card
