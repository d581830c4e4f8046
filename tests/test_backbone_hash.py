"""One process hashes a backbone for all of them, but only what is the same files."""

from __future__ import annotations

import json
from pathlib import Path

from tagi_ds.files import sha256_of
from tests.distributed import run_ranks

RANK = """
import json, sys
from pathlib import Path
from tagi_ds.backbone_hash import share_backbone_hash, share_hash
from tagi_ds.config import RunConfig
from tagi_ds.engine import distributed
from tagi_ds.model import backbone

hashed, sha256_of = [], backbone.sha256_of
backbone.sha256_of = lambda file: (hashed.append(file.name), sha256_of(file))[1]
ranks, folder = distributed.start(60), Path(sys.argv[1])
config = RunConfig()
config.model.backbone = str(folder / "shared")
share_backbone_hash(config)
found = {"shared": backbone.content_hash(folder / "shared"), "hashed": list(hashed)}
own = folder / f"own_{ranks.rank}"
share_hash(own)
found["own"] = backbone.content_hash(own)
# One that rank 0 lacks, and one that it alone has.
share_hash(folder / "shared" if ranks.rank else None)
share_hash(None if ranks.rank else folder / "shared")
print("FOUND " + json.dumps(found), flush=True)
distributed.leave()
"""


def weights(folder: Path, end: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (folder / name).write_bytes(bytes(3 * 2**20) + end)
    return folder


def test_rank_0_hashes_for_all_who_have_the_same_files(tmp_path: Path) -> None:
    weights(tmp_path / "shared", b"a")
    folders = [weights(tmp_path / f"own_{rank}", bytes([rank])) for rank in range(2)]
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    outputs = run_ranks(script, 2, [str(tmp_path)]).outputs
    first, second = (json.loads(text.split("FOUND ")[1]) for text in outputs)
    assert first["shared"] == second["shared"]
    assert sorted(first["hashed"]) == ["model-1.safetensors", "model-2.safetensors"]
    assert second["hashed"] == []
    assert sha256_of(folders[0] / "model-1.safetensors") != sha256_of(folders[1] / "model-1.safetensors")
    assert first["own"] != second["own"], "another backbone on that machine is not taken for rank 0's"
