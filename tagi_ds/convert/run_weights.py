"""A run's model as an outline without memory, and its weights as a stream from the files in which they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tagi_ds.build import build_scratch, build_tagi, study_backbone
from tagi_ds.config import RunConfig
from tagi_ds.engine.trained import TrainedParameters
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.model.adapter import find_sites
from tagi_ds.model.backbone import empty_backbone
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.model.weights import WeightFiles
from tagi_ds.teachers.parameter_store import ParameterStore

HYPERNETWORK_STAGES = ("pretrain", "finetune")
SEQ2SEQ_STAGES = ("backbone", "meta_train")
_LORA = "base_model.model.{}.lora_{}.default.weight"
"""PEFT's name of a trained factor, by the linear's name and A or B."""


class RunWeights:
    """The weights of the model that a checkpoint belongs to.

    Args:
        config, stage: of the run.
        tokenizer: of the run; its size is a new backbone's vocabulary.
        checkpoint: one of its checkpoints.

    Attributes:
        model: on the meta device, but for what of a hypernetwork never trains.

    Raises:
        UserError: the checkpoint is damaged, or another model's.
    """

    def __init__(self, config: RunConfig, stage: str, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
        self._config, self._tagi = config, stage in HYPERNETWORK_STAGES
        self._new = stage == "backbone" or (stage == "meta_train" and config.model.initial == "scratch")
        self._lora = stage == "meta_train" and config.model.meta_lora
        self._checkpoint, self._trained = checkpoint, TrainedParameters(checkpoint)
        self.model = self._outline(tokenizer)
        self._check_trained(checkpoint)

    def tensors(self, with_backbone: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), each read when it is asked for, and once, under the first of its names.

        What trained is float32; what did not is as its file has it.

        Args:
            with_backbone: also what of the backbone did not train.
        """
        stored: Mapping[str, Tensor] = {} if self._new else WeightFiles(study_backbone(self._config))
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        for parameter, aliases in names.items():
            if aliases[0] in self._trained.shapes:
                yield aliases[0], self._trained[aliases[0]]
            elif not parameter.is_meta:
                yield aliases[0], parameter
            elif with_backbone:
                yield aliases[0], self._stored(stored, aliases)

    def _stored(self, stored: Mapping[str, Tensor], aliases: list[str]) -> Tensor:
        """A tensor of the backbone's folder, which has it under one of its names; with its LoRA, if it has one."""
        candidates = [alias.removeprefix("backbone.") if self._tagi else alias for alias in aliases]
        weight = stored[next((name for name in candidates if name in stored), candidates[0])]
        a, b = (_LORA.format(aliases[0].removesuffix(".weight"), side) for side in "AB")
        if not (self._lora and a in self._trained.shapes):
            return weight
        return merge(weight, self._trained[a], self._trained[b], self._config.model.alpha / self._config.model.rank)

    def _outline(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        config, settings = self._config, self._config.model
        if self._tagi:
            return self._with_its_a()
        if self._new:
            with torch.device("meta"):
                return build_scratch(config, tokenizer)
        dropout: dict[str, Any] = {} if settings.dropout is None else {"dropout_rate": settings.dropout}
        return empty_backbone(study_backbone(config), **dropout)

    def _with_its_a(self) -> PreTrainedModel:
        """A TAGI model with the frozen A of the run, if it has one, wherever the run had it from."""
        settings = self._config.model
        alone = dataclasses.replace(self._config, model=dataclasses.replace(settings, initial=None))
        ways: list[Callable[[], TagiForConditionalGeneration]] = [lambda: build_tagi(alone, held=_frozen_hypernetwork)]
        if settings.a == "shared" and settings.initial is not None:
            ways.append(lambda: build_tagi(self._config, held=_frozen_hypernetwork))
        if settings.a == "shared" and self._config.loss.alignment:
            ways.append(lambda: build_tagi(alone, shared_a=_teachers_a(self._config), held=_frozen_hypernetwork))
        recorded = read_json(self._checkpoint / "state.json")["run"]["extra"].get("shared_a")
        for build in ways:
            model = build()
            if model.shared_a_mark == recorded:
                return model
        raise UserError(
            f"{self._checkpoint} was trained under a frozen A (model.a shared) that is not to be had any more",
            "put the teachers' store and the model.initial back with which the run began",
        )

    def _check_trained(self, checkpoint: Path) -> None:
        """The checkpoint must hold exactly what trains."""
        if self._lora:
            expected = self._lora_shapes()
        else:
            own = dict(self.model.named_parameters())
            expected = {name: tuple(p.shape) for name, p in own.items() if p.requires_grad or not self._tagi}
        found = self._trained.shapes
        differing = sorted(expected.keys() ^ found.keys()) or sorted(
            name for name, shape in expected.items() if shape != found[name]
        )
        if differing:
            named = ", ".join(differing[:4]) + (", ..." if differing[4:] else "")
            raise UserError(
                f"{checkpoint} is of another model: {named} differ",
                "name a checkpoint of that very run, or leave --convert.checkpoint out",
            )

    def _lora_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        rank = self._config.model.rank
        for site in find_sites(self.model, self._config.model.sites):
            shapes[_LORA.format(site.name, "A")] = (rank, site.d_in)
            shapes[_LORA.format(site.name, "B")] = (site.d_out, rank)
        return shapes


def merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling · B·A in float32, as PEFT merges.

    Args:
        weight: (d_out, d_in) of any floating-point type.
        a, b: (r, d_in) and (d_out, r).
        scaling: LoRA's alpha / r.
    """
    return weight.float() + (b.float() @ a.float()) * scaling


def _frozen_hypernetwork(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.hypernetwork.parameters() if not parameter.requires_grad]


def _teachers_a(config: RunConfig) -> dict[str, Tensor]:
    return ParameterStore(
        Path(config.loss.parameter_store or Path(config.study_dir) / "train_teachers" / "store")
    ).common_a()
