"""Fetches what a recipe reads into one folder, on a machine with network; compute nodes then run without.

    python launchers/prepare.py --config RECIPE.yaml --to FOLDER [--c4_shards N] [--section.field VALUE ...]
    HF_HUB_OFFLINE=1 deepspeed launchers/finetune.py --config FOLDER/prepared.yaml

Backbone, logit teacher and tokenizers, data sets (the published ones where the recipe names none), their index. A git
repository's address may name a revision (tag, branch or whole commit) and a folder: https://HOST/NAME.git@REVISION#FOLDER.
Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tagi_ds.engine.distributed import quieten_libraries
from tagi_ds.errors import UserError
from tagi_ds.launch import USER_ERROR_STATUS


def main(arguments: list[str] | None = None) -> int:
    """Prepares the folder; returns the exit status."""
    options, rest = parser().parse_known_args(arguments)
    quieten_libraries()
    from tagi_ds.prepare.folder import prepare
    from tagi_ds.prepare.plan import read_plan

    try:
        plan = read_plan(rest, corpus=options.c4_shards != 0)
        path = prepare(plan, options.to, options.c4_shards, lambda text: print(text, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(f"ready: HF_HUB_OFFLINE=1 deepspeed launchers/finetune.py --config {path}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options beside a recipe's fields."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where everything goes")
    options.add_argument(
        "--c4_shards",
        type=_shards,
        metavar="N",
        help="shards of C4; 0: no corpus. Default: one a document of the batch",
    )
    return options


def _shards(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("give 0 or a number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
