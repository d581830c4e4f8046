"""Every stage of TAGI on the embedded benchmark, with two processes: ``make quickstart``.

    python launchers/quickstart.py
    python launchers/quickstart.py --study_dir runs/smoke --scale 0.02

Any other field may follow as --section.field VALUE; every stage is given it.
Interrupted or killed, the same command goes on where it stopped.
"""

from __future__ import annotations

import sys

from tagi_ds import quickstart, recipe
from tagi_ds.errors import UserError
from tagi_ds.launch import DEFAULT_RECIPE, USER_ERROR_STATUS

OWN_FIELDS = ("study_dir", "scale")
"""Fields that the quickstart itself gives to every stage."""


def main() -> int:
    """Runs the study; returns the exit status."""
    try:
        parsed = recipe.parse("backbone", default_recipe=DEFAULT_RECIPE)
        if "output_dir" in parsed.flags:
            raise UserError(
                "--output_dir names one stage's folder, and there are many", "name the study's: --study_dir FOLDER"
            )
        handed_on = [f"--{field}={value}" for field, value in parsed.flags.items() if field not in OWN_FIELDS]
        arguments = ["--config", str(parsed.recipe_path), "--study_dir", parsed.config.study_dir, *handed_on]
        results = quickstart.run(parsed.config, arguments, parsed.scale, lambda text: print(text, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    quickstart.farewell(parsed.config, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
