"""Fetching each kind of source: models, Super-NaturalInstructions, P3 and its templates, C4."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from tagi_ds.data import p3
from tagi_ds.data.corpus import SUFFIXES
from tagi_ds.data.p3_templates import derive_table
from tagi_ds.data.remote import is_remote, read_bytes
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.errors import UserError
from tagi_ds.files import sha256_of
from tagi_ds.model.backbone import has_own_head
from tagi_ds.model.hub import model_files
from tagi_ds.prepare import cloning, fetching
from tagi_ds.prepare.fetching import RemoteFile

_ROWS = (".jsonl", ".json", ".parquet")


class Sources:
    """Fetches sources into one folder and remembers what came from where.

    Args:
        target: the folder.
        say: prints a line.
        show: progress bars.

    Attributes:
        record: address -> folder in the target, revision or files and bytes.
    """

    def __init__(self, target: Path, say: Callable[[str], None], show: bool = True) -> None:
        self.target = target
        self.record: dict[str, dict[str, Any]] = {}
        self._say = say
        self._show = show

    def model(self, name: str) -> Path:
        """A model of the hub with its tokenizer: configuration, and weights in one form alone.

        Raises:
            UserError: it cannot be had, is not whole, or is no model with a tokenizer.
        """
        folder = self.target / "models" / name.replace("/", "--")
        try:
            found = HfApi().model_info(name, files_metadata=True)
        except Exception as error:  # the hub's errors share no class with those of its network library
            raise UserError(
                f"model {name} is neither a folder nor to be had from the hub: {_first_line(error)}",
                "check its name and the network; a gated model wants `hf auth login`",
            ) from error
        files = {item.rfilename: item for item in found.siblings or []}
        wanted = model_files(files)
        present = {path for path in wanted if (folder / path).is_file()}
        needed = sum(files[path].size or 0 for path in wanted if path not in present)
        fetching.require_space(self.target, needed, f"model {name}")
        self._say(f"{name}: {len(wanted)} files, {needed / 1e9:.2f} GB to fetch")
        try:
            snapshot_download(name, revision=found.sha, local_dir=folder, allow_patterns=wanted)
        except Exception as error:
            raise UserError(
                f"model {name} cannot be fetched: {_first_line(error)}",
                "check the network and the disk; the same command goes on where it stopped",
            ) from error
        for path in wanted:
            _require_whole(folder / path, files[path])
        has_own_head(folder)  # reads the names of all tensors: a file that is no weights is named now
        load_tokenizer(folder)
        size = sum(files[path].size or 0 for path in wanted)
        self.record[name] = {"folder": _inner(folder, self.target), "revision": found.sha, "bytes": size}
        return folder

    def sni(self, address: str, splits: Mapping[str, Collection[str]]) -> Path:
        """The named split files and their tasks; a repository whole, and so are rows on the hub, having no splits.

        Args:
            address: a git repository or a folder that fsspec opens.
            splits: folder under splits/ -> files of it, without `.txt`.
        """
        if cloning.is_repository(address):
            return self._clone(address, "sni")
        system, files = fetching.listing(address, "data/sni")
        inner = {file.local.removeprefix("data/sni/"): file for file in files}
        texts = {f"splits/{folder}/{name}.txt" for folder, names in splits.items() for name in names} & inner.keys()
        if texts:
            named: set[str] = set()
            for path in texts:
                lines = read_bytes(address, path).decode("utf-8", "replace").splitlines()
                named |= {f"tasks/{line.strip().removesuffix('.json')}.json" for line in lines if line.strip()}
            wanted = [file for path, file in inner.items() if path in texts or path in named]
        else:
            wanted = [file for path, file in inner.items() if path.endswith(_ROWS)]
        return self._files(address, system, wanted, "data/sni")

    def p3(self, address: str, templates: str | None, splits: Sequence[tuple[str, str]]) -> Path:
        """The rows that named splits read, by the reader's own choice.

        Args:
            address: that fsspec opens.
            templates: local, of :meth:`templates`.
            splits: (named split, split of the rows) that the stages read.
        """
        read: set[str] = set()
        for named, group in splits:
            read |= {path for path, _, _ in p3.listing(address, templates, named, group)["files"]}
        system, files = fetching.listing(address, "data/p3")
        wanted = [file for file in files if file.local.removeprefix("data/p3/") in read]
        return self._files(address, system, wanted, "data/p3")

    def templates(self, name: str) -> Path:
        """The table derived from promptsource's template files, which are a folder, a repository or a table already."""
        output = self.target / "data" / "p3_templates.json"
        folder = Path(name)
        if cloning.is_repository(name):
            folder = self._clone(name, "promptsource")
        elif is_remote(name):
            system, files = fetching.listing(name, "data/promptsource")
            wanted = [file for file in files if file.local.endswith((".yaml", ".json"))]
            folder = self._files(name, system, wanted, "data/promptsource")
        if folder.is_file():
            return folder.resolve()
        count = derive_table(folder, output)
        self._say(f"{count} templates of P3 from {name}")
        return output

    def c4(self, address: str, shards: int) -> Path:
        """The first so many training shards."""
        system, files = fetching.listing(address, "data/c4")
        found = [file for file in files if file.local.endswith(SUFFIXES)]
        # The folder on the hub holds validation shards beside those of training.
        training = [file for file in found if "train" in PurePosixPath(file.local).name] or found
        if not training:
            raise UserError(f"{address} holds no shard ({', '.join(SUFFIXES)})", "check --data.c4_dir")
        if shards < len(training):
            self._say(f"{address}: {shards} of {len(training)} shards (--c4_shards N for another number)")
        return self._files(address, system, training[:shards], "data/c4")

    def _files(self, address: str, system: Any, wanted: list[RemoteFile], folder: str) -> Path:
        if not wanted:
            raise UserError(f"{address} holds nothing that the recipe reads", "check the address and the splits")
        self._require_unmixed(address, wanted, folder)
        todo = fetching.missing(wanted, self.target)
        needed = sum(file.size for file in todo)
        fetching.require_space(self.target, needed, address)
        self._say(f"{address}: {len(wanted)} files, {len(todo)} of them ({needed / 1e9:.2f} GB) to fetch")
        fetching.fetch(system, todo, self.target, self._show)
        self.record[address] = {
            "folder": folder,
            "files": len(wanted),
            "bytes": sum(file.size for file in wanted),
        }
        return self.target / folder

    def _require_unmixed(self, address: str, wanted: list[RemoteFile], folder: str) -> None:
        """Readers take all that a folder holds: nothing may be left in it of a source that the recipe named before."""
        mend = "delete that folder, or choose another --to FOLDER"
        if (self.target / folder / ".git").is_dir():
            raise UserError(f"{self.target / folder} is a clone, and {address} is to be fetched into it", mend)
        ours = {file.local for file in wanted}
        for local, entry in fetching.read_ledger(self.target).items():
            of_another = local.startswith(f"{folder}/") and local not in ours and entry.get("address") != address
            if of_another and (self.target / local).is_file():
                held = f"{local.rsplit('/', 1)[-1]} of {entry.get('address')}"
                raise UserError(f"{self.target / folder} holds {held}, and {address} is to be fetched into it", mend)

    def _clone(self, address: str, name: str) -> Path:
        fetching.require_space(self.target, 0, address)
        clone = self.target / "data" / name
        self._say(f"{address}: {'cloned before' if cloning.is_cloned(address, clone) else 'cloning'}")
        folder = cloning.clone(address, clone)
        self.record[address] = {"folder": _inner(folder, self.target), "revision": cloning.revision(clone)}
        return folder


def _require_whole(path: Path, item: Any) -> None:
    """Compares a file with what the hub says of it."""
    whole = path.is_file() and (item.size is None or path.stat().st_size == item.size)
    if whole and item.lfs is not None:
        whole = sha256_of(path) == item.lfs.sha256
    if not whole:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} is not what the hub says of it", "run the same command again: it fetches it anew")


def _inner(folder: Path, target: Path) -> str:
    return folder.relative_to(target).as_posix()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
