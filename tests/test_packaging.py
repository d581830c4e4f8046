"""What an installation brings along, and what `make clean` takes away."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.distributed import ROOT


def test_an_installed_package_depends_on_the_pins_that_it_is_tested_with() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    runtime, tested = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("# What a checkout is tested with.")
    assert declared == [line for line in runtime.splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in (*declared, *tested.split()))
    assert not set(declared) & set(tested.split())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_cleaning_removes_products_and_caches_and_no_study(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["runs/quickstart/finetune", "tagi_ds", "launchers", "tests"]
    gone = [".venv/bin", "build/lib", "dist", "tagi_ds.egg-info", ".pytest_cache", "tagi_ds/model/__pycache__"]
    for name in (*kept, *gone):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert [name for name in kept if not (tmp_path / name).is_dir()] == []
    assert [name for name in gone if (tmp_path / name).exists()] == []
