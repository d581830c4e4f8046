"""A run folder that is another one on each machine is refused before anything is done."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import run_ranks

STAGE = """
import os, sys
from tagi_ds import launch
from tagi_ds.engine import disk

disk.ARRIVES_S = 1.0
folder = sys.argv.pop()
sys.argv += ["--output_dir", folder.replace("RANK", os.environ["RANK"])]
launch.prepare_index = lambda config: None
launch.run_stage("backbone", lambda stage: {"steps": 1})
"""


def test_a_folder_that_machines_do_not_share_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(STAGE)
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    arguments = ["--study_dir", str(tmp_path), "--engine.strategy", "zero2"]
    ended = run_ranks(script, 2, [*arguments, str(tmp_path / "disk_RANK" / "run")], check=False)
    assert ended.statuses == [2, 2], ended.text
    assert f"error: {tmp_path}/disk_0/run on " in ended.outputs[0]
    assert "is not the folder of that name on " in ended.outputs[0]
    assert "mend: choose an --output_dir on a disk that all machines share" in ended.outputs[0]
    run_ranks(script, 2, [*arguments, str(tmp_path / "run")])
    assert (tmp_path / "run" / "done.json").is_file()
    for folder in ("run", "disk_0/run", "disk_1/run"):
        assert not list((tmp_path / folder).glob(".shared.*"))
