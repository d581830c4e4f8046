"""The models that are evaluated: in which precision, whether they find room, and how each is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.build import build_tagi, study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.launch import Stage
from tagi_ds.model.backbone import content_hash, load_backbone, resolve_folder
from tagi_ds.model.precision import Precision, native_precision
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.stages.sharing import agreed

UNTRAINED = "untrained"
"""In the place of a folder: a new hypernetwork on the study's backbone."""


def agreed_precision(stage: Stage) -> Precision:
    """The run folder's: jobs on unlike machines, and later starts, answer in that of the first."""
    asked = stage.config.evaluation.precision
    if asked != "auto":
        return asked
    device = stage.ranks.device
    found: Precision = agreed(stage, "precision", lambda: {"precision": native_precision(device)})["precision"]
    if found != "fp32":
        stage.say(f"every method answers in {found} (evaluation.precision)")
    return found


def precision_key(precision: Precision) -> dict[str, str]:
    """What keys say of it: answers that were kept before there was a choice are in fp32, and stay good."""
    return {} if precision == "fp32" else {"precision": precision}


def weight_folders(config: RunConfig, source: str) -> Iterator[Path]:
    """Where a method's weights lie; those of a new hypernetwork lie nowhere yet."""
    if source == UNTRAINED:
        yield study_backbone(config)
        return
    yield Path(source)
    settings = read_json(Path(source) / "config.json")
    backbone = config.model.backbone or settings.get("backbone_name")
    if settings.get("backbone_apart") and backbone is not None:
        yield resolve_folder(backbone)


def memory_advice(config: RunConfig, precision: Precision) -> str:
    """What to change where answering runs out of memory."""
    ways = [f"lower evaluation.batch_examples below {config.evaluation.batch_examples}"]
    if precision == "fp32":
        ways.append("set evaluation.precision bf16, which takes half")
    return "; or ".join([*ways, "take GPUs with more memory: every process answers with a whole copy of the model"])


def load_method(
    config: RunConfig, source: str, method: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """A model in evaluation mode, all of it of `dtype`, and what identifies it.

    Raises:
        UserError: it is of another backbone than the study's, or does not fit the study's tokenizer.
    """
    if source == UNTRAINED:
        config.model.initial = None
        model: PreTrainedModel = build_tagi(config, dtype)
        identity = f"{UNTRAINED} {config.seed} {model.config.backbone_hash}"
    elif (settings := read_json(Path(source) / "config.json")).get("model_type") == "tagi":
        named = config.model.backbone
        # A folder of the hypernetwork alone says where its backbone lay when it was trained; the run knows better.
        elsewhere = {"backbone": named} if settings.get("backbone_apart") and named is not None else {}
        model = TagiForConditionalGeneration.from_pretrained(source, dtype=dtype, **elsewhere)
        identity = content_hash(Path(source))
        _require_backbone(config, model, method, source)
    else:
        model = load_backbone(Path(source), dtype)
        identity = content_hash(Path(source))
    embeddings: Any = model.get_input_embeddings()
    pieces = embeddings.num_embeddings
    if pieces < len(tokenizer):
        raise UserError(
            f"{method} ({source}) knows {pieces} pieces, but the study's tokenizer has {len(tokenizer)}",
            "its backbone is another one: name it as --model.backbone, or evaluate it in its own study",
        )
    return model.eval(), identity


def _require_backbone(config: RunConfig, model: Any, method: str, source: str) -> None:
    try:
        backbone = study_backbone(config)
    except UserError:
        # A model folder brings all that it needs; only a backbone that is there can be the wrong one.
        return
    if model.config.backbone_hash and model.config.backbone_hash != content_hash(backbone):
        raise UserError(
            f"{method} ({source}) was trained on another backbone than {backbone}",
            "name its own as --model.backbone, or evaluate it in its own study",
        )
