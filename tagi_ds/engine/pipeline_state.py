"""What a pipeline saves: the full state, each stage its own part, by the whole model's names.

DeepSpeed's own files would bind a checkpoint to its stages and replicas, and are pickles. What trains is the
hypernetwork alone, so every stage puts its parameters together and writes them whole: any layout reads them, and on
the same layout every bit comes back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tagi_ds.engine.disk import writing_told
from tagi_ds.engine.full_state import INDEX, WEIGHTS, FullState, write_full_state
from tagi_ds.engine.zero_loading import MOMENTS
from tagi_ds.errors import UserError
from tagi_ds.files import read_json, write_json

STEP = "step"
"""Kind of AdamW's count of steps."""


def stage_folder(folder: Path, stage: int) -> Path:
    """Where a stage writes within a checkpoint."""
    return folder / f"stage_{stage:03d}"


def save_stage(engine: Any, named: Mapping[str, nn.Parameter], folder: Path | None) -> list[Path]:
    """Writes a stage's masters and AdamW's state; called on all replicas of the stage together.

    Args:
        engine: DeepSpeed's, with ZeRO-1.
        named: the stage's trained parameters by name, in one order on every replica.
        folder: of the stage; None on the replicas that only give their parts.

    Returns:
        The files that this process wrote.

    Raises:
        UserError: the folder cannot be written; the other replicas are not kept waiting.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    kinds, zero = {WEIGHTS: _whole(named, None)}, engine.optimizer
    steps = _steps_taken(zero)
    if steps is not None:
        # DeepSpeed links a parameter to its moments once; what was loaded or begun anew since is linked here.
        for group, flat in _flat_masters(zero):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
        kinds |= {kind: _whole(named, kind) for kind in MOMENTS}
    try:
        if folder is None:
            return []
        with writing_told(folder):
            folder.mkdir(parents=True)
        numbers = {} if steps is None else {STEP: ((name, steps.clone()) for name in named)}
        return write_full_state(folder, {**kinds, **numbers})
    finally:
        # A parameter is put together by all replicas: they go through all of them, whatever became of the file.
        for tensors in kinds.values():
            for _ in tensors:
                pass


def join_stages(folder: Path, stages: int) -> Path:
    """Writes the index of the whole state, once every stage has written its own; returns the index.

    Raises:
        UserError: a stage's index is missing.
    """
    files: dict[str, list[str]] = {}
    for stage in range(stages):
        own = stage_folder(folder, stage)
        for kind, names in read_json(own / INDEX)["files"].items():
            files.setdefault(kind, []).extend(f"{own.name}/{name}" for name in names)
    write_json(folder / INDEX, {"files": files})
    return folder / INDEX


def load_stage(engine: Any, named: Mapping[str, nn.Parameter], full: FullState) -> bool:
    """Takes a stage's part of a full state over; called on all ranks together.

    Returns:
        Whether it had AdamW's state; without it the optimizer's begins anew.

    Raises:
        UserError: a tensor is missing, or parameters were stepped unequally often.
    """
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    zero = engine.optimizer
    for name, parameter in named.items():
        safe_set_full_fp32_param(parameter, full.tensor(WEIGHTS, name))
    has_state = all(kind in full.kinds for kind in (*MOMENTS, STEP))
    zero.optimizer.state.clear()
    if has_state:
        counts = {float(full.tensor(STEP, name)) for name in named}
        if len(counts) != 1:
            raise UserError(
                f"parameters in {full.folder} were stepped {sorted(counts)} times; ZeRO's flat tensors have one number",
                "resume with engine.strategy single",
            )
        count = counts.pop()
        for group, flat in _flat_masters(zero):
            # What pads the flat tensor has moments of zero, as it has gradients of zero.
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            zero.optimizer.state[flat] = {STEP: torch.tensor(count), **moments}
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
        for kind in MOMENTS:
            for name, parameter in named.items():
                safe_set_full_optimizer_state(parameter, full.tensor(kind, name), kind)
    zero.update_lp_params()
    return has_state


def _whole(named: Mapping[str, nn.Parameter], kind: str | None) -> Iterator[tuple[str, Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, parameter in named.items():
        value = safe_get_full_fp32_param(parameter) if kind is None else safe_get_full_optimizer_state(parameter, kind)
        assert value is not None, name
        yield name, value


def _steps_taken(zero: Any) -> Tensor | None:
    for _, flat in _flat_masters(zero):
        with contextlib.suppress(KeyError):
            steps: Tensor = zero.optimizer.state[flat][STEP]
            return steps.detach().cpu()
    return None


def _flat_masters(zero: Any) -> list[tuple[list[nn.Parameter], Tensor]]:
    """(parameters, flat float32 masters of this replica's part) by group, of DeepSpeed's two optimizers for ZeRO-1."""
    if hasattr(zero, "bf16_groups"):
        return list(zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True))
    return list(zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True))
