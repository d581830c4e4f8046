"""The parameter store beyond a round trip: memory, gauges, what its checksums cannot see, and imported adapters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tagi_ds.build import backbone_sites
from tagi_ds.errors import UserError
from tagi_ds.files import read_json
from tagi_ds.model.adapter import LowRank, find_sites
from tagi_ds.model.backbone import load_backbone
from tagi_ds.teachers import parameter_store
from tagi_ds.teachers.__main__ import main
from tagi_ds.teachers.bank import TeacherBank
from tagi_ds.teachers.parameter_store import ParameterStore
from tagi_ds.teachers.peft_adapters import CONFIG_FILE, WEIGHTS_FILE, PeftFolder
from tagi_ds.teachers.warm_start import WarmStart
from tests.distributed import ROOT
from tests.teachers.conftest import BINDING, RANK, SCALING, SITES, random_factors

HEADER: dict[str, Any] = {
    "binding": BINDING,
    "gauge": "trained",
    "sites": list(SITES),
    "rank": RANK,
    "scaling": SCALING,
}

_READER = """
import sys
from pathlib import Path
from tagi_ds.teachers.parameter_store import ParameterStore

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024

store = ParameterStore(Path(sys.argv[1]))
names = list(store.manifest["units"])
highest = []
# The allocator needs some turns until it has the room that it reuses; a reader that kept files would grow on.
for half in (names[::2], names[1::2]):
    sizes = []
    for name in half:
        factors, present = store.read([name])
        assert present.all()
        sizes.append(resident())
    highest.append(max(sizes))
print(highest[1] - highest[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_reading_every_teacher_holds_one_of_them(tmp_path: Path) -> None:
    units, size = 32, 2**20
    a = torch.randn(RANK, size // RANK)
    factors = {"encoder.q": LowRank(a, torch.randn(4, RANK))}
    parameter_store.write_common(tmp_path, {"encoder.q": a})
    for number in range(units):
        parameter_store.write_unit(tmp_path, f"unit{number}", factors, {})
    header = {**HEADER, "sites": ["encoder.q"]}
    parameter_store.finish(tmp_path, {f"unit{number}": {"aligned": True} for number in range(units)}, header)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _READER, str(tmp_path)]
    grown = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    one = 4 * size
    assert grown < 4 * one < units / 2 * one / 2


def rewrite(folder: Path, unit: str, factors: dict[str, LowRank], **header: Any) -> None:
    """A store with one unit's file replaced, by one that says it is `says`'s, and a manifest with its checksum."""
    manifest = read_json(folder / "manifest.json")
    units = {name: {"aligned": entry["aligned"]} for name, entry in manifest["units"].items()}
    written = parameter_store.write_unit(folder, header.pop("says", unit), factors, {})
    written.replace(folder / parameter_store.unit_file(unit))
    parameter_store.finish(folder, units, {**HEADER, **header}, ["never"])


def wider(factors: dict[str, LowRank]) -> dict[str, LowRank]:
    return {site: LowRank(torch.cat([a, a], 1), b) for site, (a, b) in factors.items()}


def infinite(factors: dict[str, LowRank]) -> dict[str, LowRank]:
    return {site: LowRank(a, b / 0) for site, (a, b) in factors.items()}


@pytest.mark.parametrize(
    "change, header, fault",
    [
        (dict, {}, None),
        (wider, {}, "has the shape"),
        (infinite, {}, "not finite"),
        (dict, {"says": "other"}, "says that it is that of 'other'"),
        (dict, {"gauge": "frozen"}, "is not the common A"),
        (dict, {"rank": RANK + 1}, "has the shape"),
    ],
)
def test_files_at_odds_with_the_manifest_are_named(
    change: Callable[[dict[str, LowRank]], dict[str, LowRank]],
    header: dict[str, Any],
    fault: str | None,
    parameter_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Left out of the alignment, so that its mean square does not depend on what it holds.
    rewrite(parameter_folder, "weak", change(random_factors(3)), **header)
    status = main(["verify", str(parameter_folder)])
    printed = capsys.readouterr().out
    assert status == (fault is not None), printed
    assert (fault or "whole") in printed
    assert fault is None or "unit-" in printed


def test_a_store_of_the_earlier_format_is_bound_to_its_data_set(
    parameter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binding = {**BINDING, "dataset": "d" * 64, "prompt": "plain", "positives": 0, "negatives": 0, "explanations": False}
    del binding["inputs"]
    with monkeypatch.context() as before:
        before.setattr(parameter_store, "FORMAT", parameter_store.EARLIER)
        rewrite(parameter_folder, "weak", random_factors(3), binding=binding)
    assert read_json(parameter_folder / "manifest.json")["format"] == "tagi_ds parameter store 2"
    run = {"inputs": "i" * 64, "dataset": "d" * 64, "prompt": "plain", "unit": "task"}
    assert "one" in ParameterStore(parameter_folder, run)
    for field in ("dataset", "prompt"):
        with pytest.raises(UserError, match=f"differing: {field} "):
            ParameterStore(parameter_folder, {**run, field: "other"})
    assert main(["verify", str(parameter_folder)]) == 0


def test_files_of_no_unit_are_named(parameter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameter_store.write_unit(parameter_folder, "stray", random_factors(9), {})
    (parameter_folder / ".unit-half.safetensors.12-ab.part").write_bytes(b"half")
    assert main(["verify", str(parameter_folder)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("belongs to no unit") == 2


# Imported adapters.


def write_adapter(folder: Path, seed: int, backbone: Path, shared_a: bool = False, **changes: Any) -> Path:
    """One adapter that peft itself made for the backbone and saved."""
    from peft import LoraConfig, TaskType, get_peft_model

    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], **changes}
    model = get_peft_model(load_backbone(backbone), LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ("lora_A" in name and not shared_a):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "lora_A" in name:
                parameter.fill_(0.25)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    write_adapter(folder / "Question Answering", 1, tiny_folder)
    write_adapter(folder / "task5_sums", 2, tiny_folder, lora_alpha=12)
    return folder


def test_imported_adapters_give_pefts_own_logits(adapters: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    store_folder = tmp_path / "store"
    arguments = ["import", str(adapters), str(store_folder), "--backbone", str(tiny_folder), "--unit", "task"]
    assert main(arguments) == 0
    assert main(["verify", str(store_folder)]) == 0
    store = ParameterStore(store_folder, {"inputs": "anything", "prompt": "plain", "unit": "task"})
    with pytest.raises(UserError, match="differing: unit"):
        ParameterStore(store_folder, {"unit": "category"})
    with pytest.raises(UserError, match="have no common A"):
        store.common_a()
    ids = torch.tensor([[4, 9, 12, 1]])
    labels = torch.tensor([[7, 8, 1]])
    for name in ("Question Answering", "task5_sums"):
        model = PeftModel.from_pretrained(load_backbone(tiny_folder), str(adapters / name)).eval()
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
            backbone = load_backbone(tiny_folder).eval()
            sites = find_sites(backbone, ["q", "v"])
            factors = store.factors(name)
            start = {site: a for site, (a, _) in factors.items()}
            bank = TeacherBank(backbone, sites, 1, start, store.scaling, True)
            bank.load(0, factors)
            found = bank(ids, torch.ones_like(ids), labels, torch.tensor([0]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_adapters_with_one_a_have_a_common_a(tiny_folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("x", "y")):
        write_adapter(tmp_path / "peft" / name, seed, tiny_folder, shared_a=True)
    assert main(["import", str(tmp_path / "peft"), str(tmp_path / "store"), "--backbone", str(tiny_folder)]) == 0
    store = ParameterStore(tmp_path / "store")
    assert store.gauge == "frozen"
    assert all((a == 0.25).all() for a in store.common_a().values())
    assert main(["verify", str(tmp_path / "store")]) == 0


def alter_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def alter_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / WEIGHTS_FILE
    save_file(change(load_file(path)), path)


def without(*endings: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(endings)}


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank": (lambda folder: alter_config(folder, r=3), "has rank 3, .* has 2"),
    "dora": (lambda folder: alter_config(folder, use_dora=True), "use_dora True"),
    "pattern": (lambda folder: alter_config(folder, rank_pattern={"q": 4}), "rank_pattern"),
    "kind": (lambda folder: alter_config(folder, peft_type="PREFIX_TUNING"), "does not describe a LoRA"),
    "targets": (lambda folder: alter_config(folder, target_modules=["q"]), "but its weights adapt .*v"),
    "pickle": (lambda folder: (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin"), "from safetensors alone"),
    "truncated": (
        lambda folder: (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-9]),
        "is damaged",
    ),
    "half": (lambda folder: alter_weights(folder, without("0.SelfAttention.q.lora_B.weight")), "lacks A or B of"),
    "fewer": (
        lambda folder: alter_weights(folder, without(".v.lora_A.weight", ".v.lora_B.weight")),
        "does not adapt .*v, and .* does",
    ),
    "shape": (
        lambda folder: alter_weights(folder, lambda tensors: {k: v[:, :5].contiguous() for k, v in tensors.items()}),
        "have the shapes",
    ),
    "config": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "is not JSON"),
    "tokens": (lambda folder: alter_config(folder, alora_invocation_tokens=[3]), "alora_invocation_tokens"),
    "singular values": (lambda folder: alter_config(folder, kasa_config={"beta": 1.0}), "kasa_config"),
    **{
        start: (
            lambda folder, start=start: alter_config(folder, init_lora_weights=start),
            f"weights '{start}': its B·A",
        )
        for start in ("pissa_niter_4", "OLoRA", "corda", "lora_ga", "loftq", "of next year")
    },
}


@pytest.mark.parametrize("name", REFUSALS)
def test_other_adapters_are_refused(
    name: str, adapters: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "peft"
    shutil.copytree(adapters, folder)
    change, reason = REFUSALS[name]
    change(folder / "task5_sums")
    with pytest.raises(UserError, match=reason):
        PeftFolder(folder)
    assert main(["import", str(folder), str(tmp_path / "store"), "--backbone", str(tiny_folder)]) == 2
    assert "mend:" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_adapters_that_began_beside_unchanged_weights_are_taken(
    start: bool | str, adapters: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapters, tmp_path / "peft")
    alter_config(tmp_path / "peft" / "task5_sums", init_lora_weights=start)
    assert PeftFolder(tmp_path / "peft").names == PeftFolder(adapters).names


def peft_logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[4, 9, 12, 1]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([[7, 8, 1]])).logits


def test_an_adapter_of_changed_weights_is_taken_once_peft_has_converted_it(tiny_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, r=2, lora_alpha=4, target_modules=["q", "v"], init_lora_weights="pissa"
    )
    model = get_peft_model(load_backbone(tiny_folder), settings)
    before, trained, plain = tmp_path / "before", tmp_path / "trained" / "t", tmp_path / "plain" / "t"
    model.save_pretrained(str(before))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    expected = peft_logits(model)
    model.save_pretrained(str(trained))
    with pytest.raises(UserError, match="'pissa': its B·A") as refused:
        PeftFolder(tmp_path / "trained")
    assert "path_initial_model_for_weight_conversion" in refused.value.mend
    model.save_pretrained(str(plain), path_initial_model_for_weight_conversion=str(before))
    adapters = PeftFolder(tmp_path / "plain")
    backbone = load_backbone(tiny_folder)
    with torch.no_grad():
        for site, (a, b) in adapters.factors("t").items():
            backbone.get_submodule(site).weight += adapters.scaling * b @ a  # type: ignore[operator]
    torch.testing.assert_close(peft_logits(backbone), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_without_adapters_and_a_store_that_is_there_are_refused(
    adapters: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no PEFT adapters"):
        PeftFolder(tmp_path)
    assert main(["import", str(adapters), str(tmp_path), "--backbone", str(tiny_folder)]) == 2


def test_a_warm_start_is_checked_against_the_run(adapters: Path, tiny_folder: Path, parameter_folder: Path) -> None:
    sites = backbone_sites(tiny_folder, ["q", "v"])
    warm = WarmStart(adapters, sites, 2, 8.0, True, ["task5_sums", "new"])
    assert warm.names == ["task5_sums"]
    assert warm.common is None
    assert warm.factors("new") is None
    factors, source = warm.factors("task5_sums"), PeftFolder(adapters)
    assert factors is not None
    for site, (a, b) in source.factors("task5_sums").items():
        # alpha 12 over rank 2 is a scaling of 6; the update stays the same.
        torch.testing.assert_close(8.0 * factors[site].b @ factors[site].a, source.scaling * b @ a)
    with pytest.raises(UserError, match="for none of the 1 units"):
        WarmStart(adapters, sites, 2, 8.0, True, ["new"])
    with pytest.raises(UserError, match="have the shapes"):
        WarmStart(adapters, sites, 4, 8.0, True, ["task5_sums"])
    with pytest.raises(UserError, match="each have their own A"):
        WarmStart(adapters, sites, 2, 8.0, False, ["task5_sums"])
    with pytest.raises(UserError, match="does not"):
        WarmStart(parameter_folder, sites, RANK, 8.0, True, ["one"])
    with pytest.raises(UserError, match="neither a parameter store nor a folder"):
        WarmStart(adapters / "nowhere", sites, 2, 8.0, True, ["one"])
