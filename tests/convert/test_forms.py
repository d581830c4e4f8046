"""What a conversion may look like: cut into files, in another type, apart from the backbone, merged; and its memory."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase, T5Config

from tagi_ds.answering import Answerer
from tagi_ds.convert.hugging_face import Form, export_model
from tagi_ds.convert.merged import export_merged
from tagi_ds.convert.published import convert_backbone
from tagi_ds.convert.shards import ShardWriter
from tagi_ds.data.examples import Batch
from tagi_ds.engine.host_memory import large_blocks_returned
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.model import TagiForConditionalGeneration
from tagi_ds.model.backbone import backbone_class
from tests.conftest import MakeTagi, model_inputs
from tests.convert.runs import train_run
from tests.convert.test_model_folder import realign

INSTRUCTION = "say the lamp again"
APART = Form(with_backbone=False)
EVERY_STEP = ("--engine.log_every", "1")


def logits_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    realign(model)
    with torch.no_grad():
        return model(**model_inputs(batch)).logits  # type: ignore[no-any-return]


@pytest.fixture
def stored_in_bf16(tiny_folder: Path, tmp_path: Path) -> Path:
    return convert_backbone(tiny_folder, tmp_path / "backbone").folder


def test_weights_are_cut_into_files_and_what_did_not_train_keeps_its_type(
    stored_in_bf16: Path, tiny_batch: Batch, tmp_path: Path
) -> None:
    trained, _ = train_run("finetune", stored_in_bf16, tmp_path / "run", tiny_batch)
    folder = export_model(tmp_path / "run", None, tmp_path / "model", Form(shard_bytes=20_000))
    stored = {name: value for file in folder.glob("model-*.safetensors") for name, value in load_file(file).items()}
    assert stored.keys() == read_json(folder / "model.safetensors.index.json")["weight_map"].keys()
    for name, value in stored.items():
        assert value.dtype == (torch.float32 if name.startswith("hypernetwork.") else torch.bfloat16), name
    sizes = [file.stat().st_size for file in folder.glob("model-*.safetensors")]
    assert len(sizes) > 5
    assert max(sizes) < 25_000 or max(sizes) < 1.2 * max(value.nbytes for value in stored.values())
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    assert isinstance(loaded, TagiForConditionalGeneration)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits_of(loaded, tiny_batch), logits_of(trained, tiny_batch))
    narrow = export_model(tmp_path / "run", None, tmp_path / "narrow", Form(torch.bfloat16))
    assert {value.dtype for value in load_file(narrow / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModel.from_pretrained(narrow).dtype == torch.bfloat16


def test_a_hypernetwork_apart_finds_its_backbone_and_takes_no_other(
    tiny_folder: Path, tied_folder: Path, tiny_batch: Batch, tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_folder, backbone)
    trained, _ = train_run("pretrain", backbone, tmp_path / "run", tiny_batch, "--model.also_train", "norms")
    folder = export_model(tmp_path / "run", None, tmp_path / "apart", APART)
    card = (folder / "README.md").read_text()
    assert "a LoRA adapter for its backbone, which" in card
    assert "The folder holds what was trained and names the backbone." in card
    names = load_file(folder / "model.safetensors").keys()
    assert all(name.startswith("hypernetwork.") or "norm" in name for name in names)
    assert any(name.startswith("backbone.") for name in names)
    expected = logits_of(trained, tiny_batch)
    for loaded in (TagiForConditionalGeneration.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert torch.equal(logits_of(loaded, tiny_batch), expected)
    # In memory it is whole, and so is what it saves.
    loaded.save_pretrained(tmp_path / "whole")
    shutil.move(backbone, tmp_path / "elsewhere")
    whole = TagiForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits_of(whole, tiny_batch), expected)
    with pytest.raises(UserError, match=r"apart holds a hypernetwork alone, and its backbone .* has no config\.json"):
        TagiForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(UserError, match=r"the backbone in .*tied is not the one that .*apart was trained on"):
        Answerer.open(folder, INSTRUCTION, None, backbone=tied_folder)
    moved = Answerer.open(folder, INSTRUCTION, None, backbone=tmp_path / "elsewhere")
    assert torch.equal(logits_of(moved.loaded.model, tiny_batch), expected)
    with pytest.raises(TypeError, match="device_map"):
        TagiForConditionalGeneration.from_pretrained(folder, device_map="auto")


@pytest.mark.parametrize("form", [Form(), APART], ids=["model", "hypernetwork"])
def test_training_goes_on_from_a_converted_model(
    form: Form, tiny_folder: Path, tiny_batch: Batch, tmp_path: Path
) -> None:
    """The optimizer begins anew; weights are the run's to the last bit, and so is the first loss."""
    trained, _ = train_run("pretrain", tiny_folder, tmp_path / "run", tiny_batch, *EVERY_STEP)
    folder = export_model(tmp_path / "run", None, tmp_path / "model", form)
    more = ("--model.initial", str(folder), *EVERY_STEP)
    on, _ = train_run("finetune", tiny_folder, tmp_path / "on", tiny_batch, *more)
    losses = [
        json.loads(line)["loss/label"]
        for run in ("run", "on")
        for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        if "loss/label" in line
    ]
    with torch.no_grad():
        logits = trained(**model_inputs(tiny_batch)).logits
    next_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tiny_batch.labels.flatten()).item()
    assert len(losses) == 6
    assert losses[3] == pytest.approx(next_loss, rel=1e-6)
    assert losses[3] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(on.parameters(), trained.parameters(), strict=True))


def test_a_run_without_hypernetwork_has_none_to_set_apart(tiny_folder: Path, tiny_batch: Batch, tmp_path: Path) -> None:
    train_run("meta_train", tiny_folder, tmp_path / "run", tiny_batch)
    with pytest.raises(UserError, match="stage meta_train, which trains no hypernetwork"):
        export_model(tmp_path / "run", None, tmp_path / "model", APART)


@pytest.mark.parametrize("head", ["tiny_folder", "tied_folder"])
def test_a_merged_model_is_an_ordinary_one_with_the_models_logits(
    head: str,
    make_tagi: MakeTagi,
    tiny_batch: Batch,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model = make_tagi(folder=request.getfixturevalue(head), sites=["q", "v", "wi"], fusion=False, concatenate=False)
    task = model.compile_task(INSTRUCTION, tiny_tokenizer)
    assert export_merged(model, tiny_tokenizer, task, tmp_path / "merged", Form(shard_bytes=20_000)) is None
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert type(plain).__name__ == "T5ForConditionalGeneration"
    inputs = {name: getattr(tiny_batch, name) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        ours = model(**inputs, state=task.state).logits
        torch.testing.assert_close(plain(**inputs).logits, ours, atol=1e-5, rtol=1e-4)
        bare = AutoModelForSeq2SeqLM.from_pretrained(request.getfixturevalue(head)).eval()
        assert (bare(**inputs).logits - ours).abs().max() > 1e-2
    assert INSTRUCTION in (tmp_path / "merged" / "README.md").read_text()


def test_a_merged_model_says_where_it_is_a_part(
    tiny_tagi: TagiForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task = tiny_tagi.compile_task(INSTRUCTION, tiny_tokenizer)
    note = export_merged(tiny_tagi, tiny_tokenizer, task, tmp_path / "merged")
    assert note is not None
    for words in ("This merged model is not the whole model", "instruction fusion", "concatenation"):
        assert words in note
    assert note in (tmp_path / "merged" / "README.md").read_text()


def test_a_merged_model_holds_what_was_trained_of_its_backbone(
    make_tagi: MakeTagi, tiny_batch: Batch, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make_tagi(fusion=False, concatenate=False, also_train="norms")
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "layer_norm" in name:
                parameter.mul_(1.25)
    task = model.compile_task(INSTRUCTION, tiny_tokenizer)
    assert export_merged(model, tiny_tokenizer, task, tmp_path / "merged") is None
    assert "not the whole model" not in (tmp_path / "merged" / "README.md").read_text()
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    inputs = {name: getattr(tiny_batch, name) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, model(**inputs, state=task.state).logits)


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("form", ["bf16 safetensors", "pickles"])
def test_a_conversion_takes_the_memory_of_a_file(
    form: str,
    tiny_folder: Path,
    tiny_batch: Batch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A backbone of 14 million parameters, 28 MB, passes through files of 2 MB; as a float32 model it has 57 MB."""
    shape = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 6, "num_heads": 4}
    settings = T5Config(vocab_size=330, **shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_folder, backbone)
    settings.save_pretrained(backbone)
    with torch.device("meta"):
        outline = backbone_class("t5", True)(settings)
    tensors = {name: (0.01 * torch.randn(p.shape)).bfloat16() for name, p in outline.named_parameters()}
    (backbone / "model.safetensors").unlink()
    if form == "pickles":
        torch.save(tensors, backbone / "pytorch_model.bin")
    else:
        writer = ShardWriter(backbone)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        del writer
    del tensors
    with large_blocks_returned():
        if form != "pickles":
            trained, _ = train_run("finetune", backbone, tmp_path / "run", tiny_batch, "--engine.steps", "1")
            del trained
        gc.collect()
    before, most = anonymous_bytes(), 0
    add = ShardWriter.add

    def watched(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal most
        add(self, name, tensor)
        most = max(most, anonymous_bytes() - before)

    monkeypatch.setattr(ShardWriter, "add", watched)
    if form == "pickles":
        convert_backbone(backbone, tmp_path / "made", torch.float32, shard_bytes=2 * 10**6)
    else:
        export_model(tmp_path / "run", None, tmp_path / "made", Form(torch.float32, shard_bytes=2 * 10**6))
    assert sum(file.stat().st_size for file in (tmp_path / "made").glob("*.safetensors")) > 50 * 10**6
    # Of the heap some blocks may stay in the allocator; in one large file it takes 57 MB and more.
    assert most < 20 * 10**6
