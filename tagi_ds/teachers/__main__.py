"""``python -m tagi_ds.teachers verify STORE``: compares a finished store's files with its manifest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.teachers import logit_store, parameter_store
from tagi_ds.teachers.binding import MANIFEST, damaged_files, read_manifest

KINDS = {module.FORMAT: module for module in (parameter_store, logit_store)}


def verify(folder: Path) -> list[str]:
    """What is wrong with a store of either kind, one line a fault; empty where all is well."""
    try:
        content = read_json(folder / MANIFEST)
        kind = str(content.get("format")) if isinstance(content, dict) else ""
        if kind not in KINDS:
            return [f"{folder / MANIFEST} is not the manifest of a store"]
        manifest = read_manifest(folder, kind, KINDS[kind].COMMAND)
    except UserError as error:
        return [error.problem]
    faulty = damaged_files(folder, KINDS[kind].checksums(manifest))
    return [f"{path} is damaged" if path.is_file() else f"{path} is missing" for path in faulty]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 where the store is whole, 1 where it is not."""
    parser = argparse.ArgumentParser(prog="python -m tagi_ds.teachers", description="Looks after teachers' stores.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("verify", help="compare every file of a store with its manifest")
    command.add_argument("store", type=Path, help="folder of a parameter store or a logit store")
    folder: Path = parser.parse_args(arguments).store
    faults = verify(folder)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{folder}: {read_json(folder / MANIFEST)['format']}, whole")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
