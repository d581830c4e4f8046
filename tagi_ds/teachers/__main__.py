"""Looks after teachers' stores.

``python -m tagi_ds.teachers verify STORE`` compares a finished store's files with its manifest and with each other; of
an unfinished one it tells what is whole, what is not, and who is at work on it.
``python -m tagi_ds.teachers import PEFT_FOLDER STORE --backbone MODEL`` makes a parameter store of PEFT adapters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from tagi_ds.config import Unit
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.teachers import logit_faults, logit_store, parameter_faults, parameter_store, unfinished
from tagi_ds.teachers.binding import MANIFEST, damaged_files, read_manifest

KINDS = {
    parameter_store.FORMAT: (parameter_store, parameter_faults.contradictions),
    parameter_store.EARLIER: (parameter_store, parameter_faults.contradictions),
    logit_store.FORMAT: (logit_store, logit_faults.contradictions),
}


def verify(folder: Path) -> list[str]:
    """What is wrong with a store of either kind, one line a fault; empty where all is well."""
    if not (folder / MANIFEST).is_file():
        return [f"{folder} is not a finished store: {MANIFEST} is missing", *unfinished.describe(folder)]
    try:
        content = read_json(folder / MANIFEST)
        kind = str(content.get("format")) if isinstance(content, dict) else ""
        if kind not in KINDS:
            return [f"{folder / MANIFEST} is not the manifest of a store"]
        store, contradictions = KINDS[kind]
        manifest = read_manifest(folder, kind, store.COMMAND)
    except UserError as error:
        return [error.problem]
    faulty = damaged_files(folder, store.checksums(manifest))
    if faulty:
        return [f"{path} is damaged" if path.is_file() else f"{path} is missing" for path in faulty]
    return list(contradictions(folder, manifest))


def _verify(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.store
    faults = verify(folder)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{folder}: {read_json(folder / MANIFEST)['format']}, whole")
    return 1 if faults else 0


def _import(arguments: argparse.Namespace) -> int:
    from tagi_ds.teachers.importing import import_adapters  # transformers takes seconds to import

    try:
        manifest = import_adapters(arguments.adapters, arguments.store, arguments.backbone, arguments.unit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.store}: {len(manifest['units'])} teachers of rank {manifest['rank']} at {len(manifest['sites'])} "
        f"linears; A is {'the same in all' if manifest['gauge'] == 'frozen' else 'each its own'}"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 where a store is not whole, 2 where input is refused."""
    parser = argparse.ArgumentParser(prog="python -m tagi_ds.teachers", description="Looks after teachers' stores.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("verify", help="compare every file of a store with its manifest")
    command.add_argument("store", type=Path, help="folder of a parameter store or a logit store")
    command.set_defaults(work=_verify)
    command = commands.add_parser("import", help="make a parameter store of ordinary PEFT LoRA adapters")
    command.add_argument("adapters", type=Path, help="folder whose subfolders, named as the units, are adapters")
    command.add_argument("store", type=Path, help="folder to write")
    command.add_argument("--backbone", required=True, help="folder or hub id of the model they were trained on")
    command.add_argument("--unit", choices=get_args(Unit), default="category", help="what the names are names of")
    command.set_defaults(work=_import)
    chosen = parser.parse_args(arguments)
    return int(chosen.work(chosen))


if __name__ == "__main__":
    sys.exit(main())
