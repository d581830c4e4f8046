"""One start of finetuning in a process of its own; `tests/benchmarks/growth.py` starts it.

python tests/benchmarks/growth_probe.py BACKBONE SNI STUDY

Takes the launcher's own way until the first step is done. Prints a JSON object: seconds of the imports and seconds from
there to the end of the first step, by the clock and of this process's CPU time, and which libraries are loaded by then
that a step does not need. (scipy, which transformers imports for the losses of its detection models, is not named.)
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNNEEDED = ("datasets", "matplotlib", "pandas", "peft", "lm_eval", "rouge_score", "sklearn", "tensorflow")


def clocks() -> tuple[float, float]:
    """Seconds by the clock and of this process's CPU time; the benchmarks' own import what is measured here."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Launches finetuning with labels alone and leaves behind its first step."""
    backbone, sni, study = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    began = clocks()
    # What launchers/finetune.py imports; the trainer is among it.
    from tagi_ds.engine import trainer
    from tagi_ds.launch import run_stage
    from tagi_ds.stages import hypernetwork

    imported = clocks()
    take = trainer.train_step

    def first_step(*args: Any, **kwargs: Any) -> Any:
        take(*args, **kwargs)
        done = clocks()
        told = {
            "imports_s": round(imported[0] - began[0], 3),
            "first_step_s": round(done[0] - imported[0], 3),
            "imports_cpu_s": round(imported[1] - began[1], 3),
            "first_step_cpu_s": round(done[1] - imported[1], 3),
            "imported_without_need": [name for name in UNNEEDED if name in sys.modules],
        }
        print(json.dumps(told), flush=True)
        os._exit(0)

    trainer.train_step = first_step
    given = {
        "config": ROOT / "launchers" / "recipes" / "sni_small.yaml",
        "study_dir": study,
        "model.backbone": backbone,
        "data.sni_dir": sni,
        "loss.kl": 0.0,
        "loss.alignment": 0.0,
        "engine.strategy": "single",
        "engine.deepspeed": "null",
    }
    sys.argv[1:] = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run_stage("finetune", hypernetwork.finetune)


if __name__ == "__main__":
    main()
