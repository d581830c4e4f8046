"""Loading a frozen T5-family backbone with its own output head intact.

transformers 5 declares every T5 tied to its embeddings and unties only where the loaded tensors differ. Under
ZeRO-3 that comparison sees empty shards, so the separate head of T5 v1.1, LM-adapt, T0 and Flan is silently
replaced by the embeddings. Here a checkpoint that holds ``lm_head.weight`` gets a class that never ties it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MT5ForConditionalGeneration, PreTrainedModel, T5ForConditionalGeneration
from transformers.models.auto.configuration_auto import AutoConfig

from tagi_ds.errors import UserError
from tagi_ds.files import read_json, sha256_of
from tagi_ds.model.hub import snapshot

ARCHITECTURES: dict[str, type[PreTrainedModel]] = {
    "t5": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
}

_HASHED_AT_ONCE = 4
"""Files; hashing leaves the interpreter to others."""


@functools.cache
def backbone_class(model_type: str, own_head: bool) -> type[PreTrainedModel]:
    """The class of a backbone; with `own_head` its output head is never tied to the embeddings.

    Raises:
        UserError: not a T5-family model type.
    """
    if model_type not in ARCHITECTURES:
        raise UserError(f"backbones of type {model_type!r} are not supported", f"use one of {sorted(ARCHITECTURES)}")
    base = ARCHITECTURES[model_type]
    if not own_head:
        return base
    tied = {name: source for name, source in base._tied_weights_keys.items() if name != "lm_head.weight"}
    return type(f"OwnHead{base.__name__}", (base,), {"_tied_weights_keys": tied})


def resolve_folder(name: str) -> Path:
    """The local folder of a model: `name` itself, or the hub's snapshot of it, for which a process asks once.

    Raises:
        UserError: neither exists.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    mend = (
        "give a folder with config.json and weights, or a hub id that this machine can fetch; where it has no network: "
        "python launchers/prepare.py --config RECIPE --to FOLDER"
    )
    if folder.exists() or name.startswith((".", "/")) or name.count("/") > 1:
        raise UserError(f"backbone {name} has no config.json", mend)
    try:
        return snapshot(name)
    except UserError:
        raise
    except Exception as error:  # the hub's errors share no class with those of its network library
        raise UserError(f"backbone {name} is neither a folder nor to be had from the hub ({error})", mend) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, sorted; safetensors before pickles.

    Raises:
        UserError: there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} holds no weights", "look for *.safetensors there; the download may be incomplete")
    return files


def has_own_head(folder: Path) -> bool:
    """Whether the checkpoint has an output head of its own.

    Raises:
        UserError: there are no weight files, or one of them is damaged.
    """
    return any("lm_head.weight" in tensor_names(file) for file in weight_files(folder))


def tensor_names(file: Path) -> set[str]:
    """The tensors of a weight file.

    Raises:
        UserError: it is damaged.
    """
    if file.suffix != ".safetensors":
        return set(read_pickle(file))
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}", "fetch or convert the model again") from error


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle of torch's, mapped from it; no code of the file is run.

    A file in the form that torch wrote before 1.6 cannot be mapped and is read into memory.

    Raises:
        UserError: it is damaged, or holds more than tensors.
    """
    try:
        found: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            problem = f"{file} holds more than tensors, and reading it could run code"
            raise UserError(problem, "take the model's safetensors, or its weights from another source") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is damaged: {reason}", f"fetch the model again; {as_safetensors(file.parent)}"
        ) from error
    return found


def as_safetensors(folder: Path) -> str:
    """The command that turns a folder's pickles into safetensors, in a sentence."""
    return (
        "pickles are converted once by: deepspeed --num_accelerators 1 launchers/convert.py --convert.to backbone "
        f"--convert.model {folder} --convert.output FOLDER"
    )


_told_hashes: dict[Path, str] = {}


def tell_content_hash(folder: Path, digest: str) -> None:
    """Spares this process the reading: another one has hashed the same files."""
    _told_hashes[folder] = digest


@functools.cache
def content_hash(folder: Path) -> str:
    """Hex SHA-256 over a model folder's weight files: what stores and checkpoints are bound to."""
    if folder in _told_hashes:
        return _told_hashes[folder]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as threads:
        for each in threads.map(sha256_of, weight_files(folder)):
            digest.update(each.encode())
    return digest.hexdigest()


def load_backbone(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Loads a T5-family model from a resolved folder, head intact.

    Args:
        folder: of :func:`resolve_folder`.
        dtype: of the parameters.
        overrides: of the configuration, e.g. ``dropout_rate``.

    Raises:
        UserError: an unsupported architecture or damaged files.
    """
    cls, config = _class_and_configuration(folder, overrides)
    try:
        return cls.from_pretrained(folder, config=config, dtype=dtype)
    except (OSError, RuntimeError, ValueError) as error:
        pickles = weight_files(folder)[0].suffix != ".safetensors"
        mend = as_safetensors(folder) if pickles else "fetch or convert it again"
        raise UserError(f"cannot load the backbone in {folder}: {error}", mend) from error


def empty_backbone(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """The model that :func:`load_backbone` would load, on the meta device: without values, and without memory.

    Raises:
        UserError: an unsupported architecture or damaged files.
    """
    cls, config = _class_and_configuration(folder, overrides)
    with torch.device("meta"):
        model: Any = cls(config)
    empty: PreTrainedModel = model.to(dtype).eval()
    return empty


def _class_and_configuration(folder: Path, overrides: dict[str, Any]) -> tuple[type[PreTrainedModel], Any]:
    model_type = read_json(folder / "config.json").get("model_type", "")
    cls = backbone_class(model_type, has_own_head(folder))
    config = AutoConfig.from_pretrained(folder)
    for key, value in overrides.items():
        setattr(config, key, value)
    if config.decoder_start_token_id is None:
        config.decoder_start_token_id = config.pad_token_id
    return cls, config


def merge_lora(model: Any) -> PreTrainedModel:
    """The plain model that a PEFT model with LoRA amounts to."""
    with warnings.catch_warnings():
        # peft remarks on every T5 with a head of its own, which transformers calls tied.
        warnings.simplefilter("ignore", UserWarning)
        merged: PreTrainedModel = model.merge_and_unload()
    return merged


@contextlib.contextmanager
def without_dropout(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode inside; each one's own mode is put back."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def recompute_blocks(backbone: nn.Module) -> None:
    """Makes every T5 block keep its inputs alone and compute the rest again in the backward pass, whatever its mode.

    transformers' own switch works in training mode only, which would bring dropout to a backbone that must not have it.
    """
    for name, block in backbone.named_modules():
        if name.split(".")[-2:-1] == ["block"]:
            block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def parameters_to_train(backbone: nn.Module, also_train: str) -> list[nn.Parameter]:
    """Backbone parameters of a named group, chosen by the kind of module that holds them, never by name.

    Args:
        backbone: the model.
        also_train: ``nothing``, ``norms``, ``embeddings``, ``norms_embeddings`` or ``all``.
    """
    if also_train == "all":
        return list(backbone.parameters())
    chosen: dict[int, nn.Parameter] = {}
    for module in backbone.modules():
        is_norm = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
        if ("norms" in also_train and is_norm) or ("embeddings" in also_train and isinstance(module, nn.Embedding)):
            chosen.update((id(parameter), parameter) for parameter in module.parameters(recurse=False))
    return list(chosen.values())
