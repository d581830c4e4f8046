"""What engine.deterministic asks torch for; that the kernels then repeat themselves only a GPU can show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tagi_ds.engine.determinism import CUBLAS_WORKSPACE, choose_kernels

SETTING: Any = torch.utils.deterministic


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set and deleted: what is set under way is gone after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(SETTING, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("asked", "device"), [(False, "cuda"), (True, "cpu"), (False, "cpu")])
def test_without_the_setting_or_a_gpu_nothing_changes(asked: bool, device: str) -> None:
    choose_kernels(asked, torch.device(device))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_on_a_gpu_kernels_are_deterministic_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernels(True, torch.device("cuda", 0))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not SETTING.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == CUBLAS_WORKSPACE
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_kernels(True, torch.device("cuda", 0))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "a user's setting wins"
