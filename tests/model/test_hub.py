"""A backbone from the hub: asked for once, in one form, and found again without a network; no hub is needed here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tagi_ds import launch, run_folder
from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.model import hub
from tagi_ds.model.backbone import resolve_folder
from tagi_ds.strict_yaml import read_yaml

NAME, COMMIT = "someone/t5-of-theirs", "0123456789abcdef0123456789abcdef01234567"
BOTH_FORMS = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "onnx/model.safetensors",
    "spiece.model",
    "tf_model.h5",
]


class Hub:
    """A hub that has one repository; `asked` holds what was wanted of it."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files, self.is_up, self.is_kept = folder, files, True, False
        self.asked: list[Any] = []

    def model_info(self, name: str) -> Any:
        self.asked.append(name)
        if not self.is_up or name != NAME:
            raise OSError("no route to the hub")
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(
        self, name: str, allow_patterns: list[str] | None = None, local_files_only: bool = False
    ) -> str:
        if local_files_only and not self.is_kept:
            raise FileNotFoundError(name)
        assert self.is_up or local_files_only
        self.asked.append(allow_patterns)
        self.is_kept = True
        return str(self.folder)


@pytest.fixture
def a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub.snapshot.cache_clear()
    made = Hub(tmp_path / "models--t5" / "snapshots" / COMMIT, BOTH_FORMS)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    yield made
    hub.snapshot.cache_clear()


def test_a_process_asks_once_and_for_weights_in_one_form(a_hub: Hub) -> None:
    assert resolve_folder(NAME) == resolve_folder(NAME) == a_hub.folder
    wanted = [name for name in BOTH_FORMS if name.startswith(("config", "model", "spiece"))]
    assert a_hub.asked == [NAME, wanted]
    assert hub.model_files([name for name in BOTH_FORMS if "safetensors" not in name]) == [
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "spiece.model",
    ]


def test_without_a_network_what_was_fetched_before_serves(a_hub: Hub) -> None:
    a_hub.is_up = False
    with pytest.raises(UserError, match=r"neither a folder nor to be had from the hub \(no route"):
        resolve_folder(NAME)
    a_hub.is_kept = True
    assert resolve_folder(NAME) == a_hub.folder


def test_a_repository_without_weights_is_refused_before_it_is_fetched(a_hub: Hub) -> None:
    a_hub.files = ["config.json", "tf_model.h5"]
    with pytest.raises(UserError, match="no weights"):
        resolve_folder(NAME)
    assert a_hub.asked == [NAME]


def test_a_run_records_the_commit_and_keeps_it(a_hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path / "run"))
    config.model.backbone = str(tiny_folder)
    assert launch._fetched_backbone(config, "finetune") is None, "a folder is nobody's commit"
    config.model.backbone = NAME
    assert launch._fetched_backbone(config, "convert") is None
    assert a_hub.asked == []
    commit = launch._fetched_backbone(config, "finetune")
    folder = run_folder.open_run(config, "finetune", 1, 0, commit)
    run_folder.mark_done(folder, {})
    a_hub.asked.clear()
    hub.snapshot.cache_clear()
    run_folder.open_run(config, "finetune", 1, 0, launch._fetched_backbone(config, "finetune"))
    assert a_hub.asked == [], "a run that is done needs no backbone"
    assert read_yaml(folder / run_folder.CONFIG_FILE)["run"]["backbone_commit"] == COMMIT
