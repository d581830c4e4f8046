"""DeepSpeed's saving of a checkpoint, with its barriers met by a rank that cannot write a file, too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tagi_ds.engine.disk import write_failure

_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""Which DeepSpeed copies beside its folder on rank 0."""


class _Noting:
    """DeepSpeed's checkpoint engine, which here notes the files, and an error in the place of raising it.

    After an error nothing more is written.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.files: list[Path] = []
        self.failure: tuple[Path, Exception] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append(Path(path))
        self.attempt(self._inner.save, Path(path), state_dict, path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(self._inner.makedirs, Path(path), path, exist_ok)

    def attempt(self, write: Callable[..., object], path: Path, *args: Any) -> None:
        if self.failure is not None:
            return
        try:
            write(*args)
        except (OSError, RuntimeError) as error:
            self.failure = (path, error)


def save_engine(engine: Any, folder: Path, tag: str) -> list[Path]:
    """Saves what an engine trains, as DeepSpeed does; called on all ranks together.

    Args:
        engine: DeepSpeed's, with ZeRO.
        folder: of the checkpoint; it exists.
        tag: name of DeepSpeed's own folder in it.

    Returns:
        The files that this process wrote.

    Raises:
        UserError: this rank could not write a file; no other is kept waiting for it.
    """
    with _noting(engine, folder) as noted:
        try:
            engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        except OSError as error:
            # What the optimizer has on NVMe, DeepSpeed copies itself; behind that only the end is left.
            noted.failure = (folder, error)
            _join_the_end(engine)
    if noted.failure is not None:
        path, failed = noted.failure
        told = write_failure(path, failed)
        if told is None:
            raise failed
        raise told from failed
    offloaded = folder / tag / "offloaded_tensors" / f"rank{engine.global_rank:0>2d}"
    return [*filter(Path.is_file, noted.files), *filter(Path.is_file, offloaded.rglob("*"))]


@contextlib.contextmanager
def _noting(engine: Any, folder: Path) -> Iterator[_Noting]:
    noted, own, copy = _Noting(engine.checkpoint_engine), engine.checkpoint_engine, engine._copy_recovery_script

    def copy_scripts(save_path: str) -> None:
        noted.attempt(copy, folder, save_path)
        noted.files += [folder / name for name in _RECOVERY_SCRIPTS]

    engine.checkpoint_engine, engine._copy_recovery_script = noted, copy_scripts
    try:
        yield noted
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


def _join_the_end(engine: Any) -> None:
    """What the others do after their copies."""
    from deepspeed import comm

    if engine._optimizer_has_ckpt_event_epilogue():
        engine.optimizer.checkpoint_event_epilogue()
    comm.barrier()
