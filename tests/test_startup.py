"""What a fresh process loads before it trains: libraries that a step does not need wait until they are used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tagi_ds.teachers import logit_shards, logit_store
from tests.distributed import ROOT
from tests.teachers.conftest import LOGIT_HEADER, logit_rows

UNNEEDED = {
    "datasets",
    "deepspeed",
    "lm_eval",
    "matplotlib",
    "nltk",
    "pandas",
    "peft",
    "rich",
    "rouge_score",
    "sklearn",
    "tensorboard",
    "tensorflow",
}
"""What only some strategies, evaluations and conversions need; scipy is not among it, transformers loads it itself."""

PROBE = """
import json, runpy, sys
from pathlib import Path

from tagi_ds.teachers.logit_store import LogitStore

for launcher in sys.argv[2:]:
    runpy.run_path(launcher, run_name="imported")
store = LogitStore(Path(sys.argv[1]))
print(json.dumps({"read": len(store), "loaded": sorted(sys.modules)}))
"""


def test_training_and_stored_logits_load_no_library_that_a_step_does_not_need(tmp_path: Path) -> None:
    shard = tmp_path / "shard-00000.arrow"
    logit_shards.write_shard(shard, logit_rows(0, 4), "s")
    logit_store.finish(tmp_path, [shard], {"binding": {"temperature": 1.0}, **LOGIT_HEADER})
    stages = ("backbone", "pretrain", "finetune", "meta_train", "store_logits")
    launchers = [str(ROOT / "launchers" / f"{stage}.py") for stage in stages]
    command = [sys.executable, "-c", PROBE, str(tmp_path), *launchers]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["read"] == 4
    assert {"torch", "transformers", "tagi_ds.engine.trainer", "tagi_ds.stages.store_logits"} <= set(told["loaded"])
    assert UNNEEDED.isdisjoint(told["loaded"])
