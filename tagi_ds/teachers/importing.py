"""A folder of ordinary PEFT adapters as a parameter store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tagi_ds.build import backbone_sites
from tagi_ds.config import Unit
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.engine.progress import Progress
from tagi_ds.errors import UserError
from tagi_ds.files import whole_folder
from tagi_ds.model.adapter import ATTENTION_KINDS, FEED_FORWARD_KINDS, Site
from tagi_ds.model.backbone import content_hash, resolve_folder
from tagi_ds.teachers import parameter_store
from tagi_ds.teachers.binding import INPUT_FIELDS, tokenizer_hash
from tagi_ds.teachers.peft_adapters import PeftFolder


def import_adapters(source: Path, store: Path, backbone: str, unit: Unit) -> dict[str, Any]:
    """Writes the store of the adapters below `source`, each under its subfolder's name.

    Nobody measured these teachers on the run's validation shares, so all take part in the alignment; and they say
    nothing of the data that they saw, so a run's data set and prompt are not compared with theirs (``unbound``).

    Args:
        source: its subfolders hold adapter_config.json and adapter_model.safetensors.
        store: folder to write, whole; it must not be there yet.
        backbone: folder or hub id of the model that the adapters were trained on.
        unit: what the adapters' names are names of.

    Returns:
        The manifest.

    Raises:
        UserError: adapters that are damaged, differ among themselves, or are not of this backbone.
    """
    if store.exists():
        raise UserError(f"{store} is there already", "name a new folder, or delete that one")
    adapters, folder = PeftFolder(source), resolve_folder(backbone)
    sites = _sites(adapters, folder)
    adapters.require_sites(sites, adapters.rank)
    common = adapters.common_a()
    names = [site.name for site in sites]
    with whole_folder(store) as aside, Progress("import", len(adapters.names), unit="adapter") as bar:
        if common is not None:
            parameter_store.write_common(aside, {name: common[name] for name in names})
        for number, name in enumerate(adapters.names, start=1):
            factors = adapters.factors(name)
            parameter_store.write_unit(aside, name, {site: factors[site] for site in names}, {"imported": True})
            bar.update(number)
        binding = {
            "backbone": content_hash(folder),
            "tokenizer": tokenizer_hash(load_tokenizer(folder)),
            "unit": unit,
            "sites": names,
            "rank": adapters.rank,
        }
        header = {
            "binding": binding,
            "unbound": ["inputs", *INPUT_FIELDS],
            "gauge": "own" if common is None else "frozen",
            "sites": names,
            "rank": adapters.rank,
            "scaling": adapters.scaling,
        }
        return parameter_store.finish(aside, {name: {"aligned": True} for name in adapters.names}, header)


def _sites(adapters: PeftFolder, backbone: Path) -> Sequence[Site]:
    """The backbone's sites of the kinds that the adapters adapt."""
    kinds = sorted({site.rpartition(".")[2] for site in adapters.sites})
    unknown = set(kinds) - set(ATTENTION_KINDS) - set(FEED_FORWARD_KINDS)
    if unknown:
        raise UserError(
            f"{adapters.folder} adapts {', '.join(sorted(unknown))}, which are no sites of a generated adapter",
            f"keep adapters of {', '.join(ATTENTION_KINDS + FEED_FORWARD_KINDS)}",
        )
    try:
        return backbone_sites(backbone, kinds)
    except ValueError as error:
        raise UserError(f"{adapters.folder} does not fit {backbone}: {error}", "name the adapters' backbone") from error
