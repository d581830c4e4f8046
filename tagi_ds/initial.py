"""The hypernetwork with which a run begins, where it is an earlier run's (`model.initial`).

Two things of a model are not in what a run trains, and have to agree between the runs: the backbone, whose weights'
hash says which it is, and with `model.a: shared` the frozen A, under which alone a trained B means what it was trained
to mean. A run that trained parts of the backbone goes on only where those parts train too: a checkpoint holds what its
own run trained, and nothing else could say what the parts have become.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tagi_ds.engine.checkpoint import best_checkpoint
from tagi_ds.engine.distributed import is_main
from tagi_ds.engine.strategy import full_shape
from tagi_ds.engine.trained import TrainedParameters
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.model.backbone import parameters_to_train
from tagi_ds.model.hypernetwork import SiteGroup
from tagi_ds.model.start import Gather
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.model.weights import WeightFiles


class Initial:
    """What an earlier run trained: a run folder (its best checkpoint) or a converted model folder.

    Every rank makes one.

    Args:
        source: the folder.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._values: TrainedParameters | WeightFiles
        if (source / "checkpoints").is_dir():
            checkpoint = best_checkpoint(source, by_all=True)
            self._values = TrainedParameters(checkpoint, checked=True)
            self._known: dict[str, Any] = read_json(checkpoint / "state.json")["run"]["extra"]
        elif (source / "model.safetensors").is_file() or list(source.glob("model-*.safetensors")):
            self._values = WeightFiles(source)
            self._known = read_json(source / "config.json")
        else:
            raise UserError(
                f"model.initial {source} is neither a run folder with checkpoints nor a model folder",
                "give the folder of the pretraining run, or of a converted model",
            )

    def load(self, model: TagiForConditionalGeneration, gather: Gather) -> None:
        """Copies what trained into a model.

        Of a model on the meta device, only what has memory is read; of one in shards, one parameter at a time.

        Raises:
            UserError: the hypernetwork is of another shape, belongs to another backbone, or comes with parts of the
                backbone that trained and do not train in this model.
        """
        stored = self._stored_names(model)
        own = dict(model.named_parameters())
        shapes = {name: self._values.shapes.get(other) for name, other in stored.items()}
        expected = {name for name, p in own.items() if name.startswith("hypernetwork.") and p.requires_grad}
        wrong = sorted(
            (expected - shapes.keys())
            | (shapes.keys() - own.keys())
            | {name for name in shapes.keys() & own.keys() if shapes[name] != full_shape(own[name])}
        )
        if wrong:
            raise UserError(
                f"model.initial {self.source} holds another model: {', '.join(wrong[:4])} differ",
                "use the model section (rank, sites, bottleneck, head, fusion) with which it was trained",
            )
        self._check_backbone(model, {id(own[name]) for name in stored if name.startswith("backbone.")})
        for name, other in stored.items():
            if not own[name].is_meta:
                with torch.no_grad(), gather([own[name]]):
                    _take(own[name], self._values, other)

    def shared_a(
        self, model: TagiForConditionalGeneration, expected: Mapping[str, Tensor], is_the_teachers: bool
    ) -> Mapping[str, Tensor]:
        """The A of every site under which the loaded B was trained.

        A run folder does not hold it: its A must be the expected one. A model folder's A is taken over where no
        teachers have one.

        Args:
            model: of the same shape.
            expected: site -> A (r, d_in), the run's own.
            is_the_teachers: whether that is the one of the teachers' store.

        Raises:
            UserError: the loaded B was trained under another A, or nothing says under which.
        """
        if isinstance(self._values, WeightFiles):
            found = _a_of(model.hypernetwork, self._values)
            if not is_the_teachers:
                return found
            mark: str | None = mark_of(found)
        else:
            mark = self._known.get("shared_a")
        if mark != mark_of(expected):
            whose = "the teachers have" if is_the_teachers else "this run has"
            known = f"was trained under another A than {whose}"
            told = known if mark is not None else "does not say under which A it was trained"
            raise UserError(
                f"model.initial {self.source} {told}: with model.a shared a B means nothing under another one",
                "use one seed and rank for pretraining and the teachers, which both then have the same A; or set "
                "model.a generated",
            )
        return expected

    def _stored_names(self, model: TagiForConditionalGeneration) -> dict[str, str]:
        """Name of a parameter that is to be loaded -> its name here."""
        if not isinstance(self._values, WeightFiles):
            return {name: name for name in self._values.shapes}
        # A converted model is whole: of its backbone, what trained counts.
        trained = {id(p) for p in parameters_to_train(model.backbone, self._known.get("also_train", "nothing"))}
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        found = {name: name for name in self._values.shapes if name.startswith("hypernetwork.")}
        for aliases in (names[key] for key in trained):
            found[aliases[0]] = next((name for name in aliases if name in self._values.shapes), aliases[0])
        return found

    def _check_backbone(self, model: TagiForConditionalGeneration, trained: set[int]) -> None:
        """Args: `trained`, ids of the parameters of the model's backbone that this has."""
        theirs, own = self._known.get("backbone_hash"), model.config.backbone_hash
        if None not in (theirs, own) and theirs != own:
            raise UserError(
                f"model.initial {self.source} was trained on another backbone: its weights are not those of "
                f"{model.config.backbone_name}",
                "name the backbone that it was trained on with --model.backbone, or start a new hypernetwork",
            )
        frozen = [n for n, p in model.named_parameters() if id(p) in trained and not p.requires_grad]
        if frozen:
            raise UserError(
                f"model.initial {self.source} trained parts of its backbone that are frozen with model.also_train "
                f"{model.config.also_train} ({frozen[0]}): they would be lost in what this run leaves",
                "set the model.also_train of that run here too, or start from a run that left its backbone as it was",
            )


def mark_of(a: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of a shared A by site, rounded to bfloat16: the same in every precision of a run and a file."""
    digest = hashlib.sha256()
    for site in sorted(a):
        rounded = a[site].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{site} {tuple(rounded.shape)}".encode())
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _a_of(hypernetwork: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Site -> A (r, d_in) among the values of a hypernetwork's parameters."""
    found: dict[str, Tensor] = {}
    for name, group in hypernetwork.named_modules():
        if isinstance(group, SiteGroup):
            found |= zip(group.names, values[f"hypernetwork.{name}.a_base"].float(), strict=True)
    return found


def _take(parameter: nn.Parameter, values: Mapping[str, Tensor], name: str) -> None:
    # Of a parameter that was in shards, rank 0's values become every rank's: the others need not read them.
    if is_main() or not hasattr(parameter, "ds_id"):
        parameter.copy_(values[name])
