"""What an installation brings along, and what `make clean` takes away."""

from __future__ import annotations

import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

from tests.distributed import ROOT

METADATA = "import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel(sys.argv[1])"


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_an_installed_package_depends_on_the_pins_that_it_runs_with(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "requirements-runtime.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tagi_ds").mkdir()
    (tmp_path / "tagi_ds" / "__init__.py").touch()
    (tmp_path / "made").mkdir()
    subprocess.run([sys.executable, "-c", METADATA, "made"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    text = next((tmp_path / "made").glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert message_from_string(text).get_all("Requires-Dist") == pins("requirements-runtime.txt")
    names = {pin.partition("==")[0] for pin in pins("requirements-runtime.txt")}
    assert {"torch", "deepspeed", "transformers"} <= names


def test_a_checkout_has_the_same_pins_and_what_its_tests_need() -> None:
    first, *development = pins("requirements.txt")
    assert first == "-r requirements-runtime.txt"
    assert not set(development) & set(pins("requirements-runtime.txt"))
    assert "pytest" in {pin.partition("==")[0] for pin in development}


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
