from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tagi_ds.config import DataConfig
from tagi_ds.data.tokenizer import load_tokenizer, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY.parent / "shared" / "data"


def write_benchmark(folder: Path, hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tagi_ds.data.program_tasks", str(folder), "--seed", "3"]
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "written"
    write_benchmark(folder, hash_seed="1")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    texts = [f"turn the {word} around and say {word}" for word in ("lamp", "chair", "bell", "box")] * 20
    train_tokenizer(texts, folder, 330)
    return load_tokenizer(folder)


@pytest.fixture
def plain() -> DataConfig:
    return DataConfig(prompt="plain", max_source_tokens=64, max_target_tokens=32, validation_tasks=0)


@pytest.fixture
def real_data() -> Path:
    if not REAL.is_dir():
        pytest.skip("the real data sets (../shared/data) are not on this machine")
    return REAL
