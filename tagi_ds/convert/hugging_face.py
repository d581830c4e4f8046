"""From a run's checkpoint to a transformers folder: self-contained, or the hypernetwork alone.

The weights stream from their files into new ones: what trained from the checkpoint, the rest from the backbone's
folder. Nothing is built but the model's outline, so that an 11B model is converted in the memory of one file.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tagi_ds import recipe
from tagi_ds.build import load_study_tokenizer, study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.convert.model_card import RUN_FILE, CardFacts, model_card
from tagi_ds.convert.model_folder import write_prompt
from tagi_ds.convert.run_weights import HYPERNETWORK_STAGES, SEQ2SEQ_STAGES, RunWeights
from tagi_ds.convert.shards import SHARD_BYTES, ShardWriter
from tagi_ds.engine.checkpoint import best_checkpoint
from tagi_ds.engine.evaluated import state_of
from tagi_ds.errors import UserError
from tagi_ds.files import read_json, whole_folder, write_json
from tagi_ds.model.backbone import ARCHITECTURES, content_hash
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.run_folder import CONFIG_FILE
from tagi_ds.strict_yaml import read_yaml


@dataclass(frozen=True)
class Form:
    """How weights are written.

    Attributes:
        dtype: of all floating-point tensors; None: what trained in float32, what did not as its own file has it.
        shard_bytes: most bytes of a file.
        with_backbone: False: the backbone is named instead.
    """

    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES
    with_backbone: bool = True


def export_model(run_dir: Path, checkpoint: Path | None, folder: Path, form: Form | None = None) -> Path:
    """Writes the model of a training run as a folder that needs nothing else of the run.

    Stages ``pretrain`` and ``finetune`` give a TagiForConditionalGeneration with its backbone's weights inside or, as
    `form` says, named; ``backbone`` and ``meta_train`` an ordinary seq2seq model. Weights are safetensors; tokenizer,
    generation settings, prompt wording, the run's configuration and a model card lie beside them.

    Args:
        run_dir: the run's folder.
        checkpoint: one of its checkpoints; None: its best.
        folder: written whole; replaced if it exists.
        form: by default self-contained, in the types of training.

    Returns:
        `folder`.

    Raises:
        UserError: no training run, a damaged checkpoint, one of another model, or a backbone that has changed.
    """
    form = form or Form()
    config, stage = _read_run(run_dir)
    if not form.with_backbone and stage not in HYPERNETWORK_STAGES:
        problem = f"{run_dir} is of stage {stage}, which trains no hypernetwork"
        raise UserError(problem, "use --convert.to model for that run")
    checkpoint = checkpoint or best_checkpoint(run_dir)
    tokenizer = load_study_tokenizer(config)
    weights = RunWeights(config, stage, tokenizer, checkpoint)
    saved = state_of(checkpoint)
    _check_backbone(config, saved["run"]["extra"].get("backbone_hash"), run_dir)
    with whole_folder(folder) as aside:
        writer = ShardWriter(aside, form.shard_bytes, form.dtype)
        for name, tensor in weights.tensors(form.with_backbone):
            writer.add(name, tensor)
        writer.close()
        _write_settings(aside, config, weights.model, form)
        tokenizer.save_pretrained(aside)
        shutil.copyfile(run_dir / CONFIG_FILE, aside / RUN_FILE)
        # Not what is remembered of an earlier folder of that name.
        identity = content_hash.__wrapped__(aside)
        facts = CardFacts(config, stage, saved, run_dir, identity, form.with_backbone)
        (aside / "README.md").write_text(model_card(facts, folder), encoding="utf-8")
    return folder


def _read_run(run_dir: Path) -> tuple[RunConfig, str]:
    """Configuration and stage that a run folder records."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{run_dir} is no run folder: {CONFIG_FILE} is missing",
            "name the folder of a training stage with --convert.run, or train that stage first",
        )
    stage = (read_yaml(path).get("run") or {}).get("stage")
    if stage not in HYPERNETWORK_STAGES + SEQ2SEQ_STAGES:
        raise UserError(
            f"{path} is of stage {stage}, which trains no model of its own",
            f"name a run of {', '.join(SEQ2SEQ_STAGES + HYPERNETWORK_STAGES)} with --convert.run",
        )
    return recipe.parse(stage, ["--config", str(path)]).config, stage


def _check_backbone(config: RunConfig, recorded: str | None, run_dir: Path) -> None:
    """Refuses a backbone folder whose weights are not those that the run began with."""
    if recorded is None:  # the run started from random weights
        return
    folder = study_backbone(config)
    if content_hash(folder) != recorded:
        raise UserError(
            f"the backbone in {folder} is not the one that {run_dir} was trained on: its weights differ",
            "put the run's own backbone back into that folder, or train the run again",
        )


def _write_settings(folder: Path, config: RunConfig, model: Any, form: Form) -> None:
    """config.json, generation_config.json and, of a TAGI model, its wording."""
    tagi = isinstance(model, TagiForConditionalGeneration)
    model.config.dtype = form.dtype or torch.float32
    model.config.architectures = [type(model).__name__]
    if tagi:
        model.config.backbone_apart = not form.with_backbone
    model.config.save_pretrained(folder)
    settings = model.generation_config or GenerationConfig()
    settings.max_length, settings.max_new_tokens = None, config.data.max_target_tokens
    settings.save_pretrained(folder)
    if tagi:
        write_prompt(folder, config.data)
    else:
        restore_plain_config(folder)


def restore_plain_config(folder: Path) -> None:
    """Makes transformers' own classes read the folder as it was trained.

    transformers writes the name of the class that keeps the head apart, and ``tie_word_embeddings: true`` for every
    T5, from which it would read that the decoder's outputs are scaled.
    """
    path = folder / "config.json"
    settings = read_json(path)
    settings["architectures"] = [ARCHITECTURES[settings["model_type"]].__name__]
    if "scale_decoder_outputs" in settings:
        settings["tie_word_embeddings"] = settings.pop("scale_decoder_outputs")
    write_json(path, settings)
