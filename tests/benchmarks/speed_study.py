"""What the benchmarks of speed measure on: a T5 with random weights, SNI's texts, and ways of training it."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from tagi_ds.build import build_meta, build_tagi
from tagi_ds.config import LossConfig, RunConfig
from tagi_ds.data.catalogue import group_tasks, training_split
from tagi_ds.data.collate import Collator, Form, TaskChunk
from tagi_ds.data.examples import Batch, Task
from tagi_ds.data.mixture import reference_of
from tagi_ds.data.tokenizer import load_tokenizer, train_tokenizer
from tagi_ds.encodings.instructions import InstructionCache, open_cache
from tagi_ds.engine.distributed import current
from tagi_ds.engine.flops import FlopMeter
from tagi_ds.engine.objective import Objective
from tagi_ds.engine.single import SingleStrategy
from tagi_ds.engine.step import train_step
from tagi_ds.engine.strategy import Strategy
from tagi_ds.files import whole_folder
from tagi_ds.launch import Stage
from tagi_ds.objectives import SequenceObjective, TagiObjective

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
POSITIVES = {"def": 0, "def_2_pos": 2}
_TOKENIZER_EXAMPLES = 20
MakeCache = Callable[[Strategy], InstructionCache | None]


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        shape: of the T5.
        pieces: of the tokenizer at the most; the vocabulary may have more rows, as T5's has.
        lengths: truncation of sources, targets and documents.
        rank, bottleneck: of the hypernetwork.
        grid: examples and target tokens of the step whose memory is measured.
    """

    shape: dict[str, Any]
    pieces: int
    lengths: tuple[int, int, int]
    rank: int
    bottleneck: int
    grid: tuple[int, int]


SIZES = {
    # The first T5's small size: 60.5M parameters, the head tied to the embeddings.
    "small": Size(
        {"vocab_size": 32_128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
        8000, (1024, 128, 1024), 32, 64, (32, 128),
    ),
    "tiny": Size(
        {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        600, (512, 8, 48), 4, 8, (8, 8),
    ),
}  # fmt: skip


@dataclass
class Study:
    """A folder with a backbone and a tokenizer, and the tasks beside it; what is there is used again.

    Args:
        root: may be empty.
        sni: folder in SNI's layout.
        size_name: of `SIZES`.
    """

    root: Path
    sni: Path
    size_name: str = "small"

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    def config(self, form: str = "def_2_pos", backbone: Path | None = None, **model: Any) -> RunConfig:
        """A run's configuration: one plain process in fp32.

        Args:
            form: `def` or `def_2_pos`.
            backbone: default the study's own.
            model: fields of the model section.
        """
        config = RunConfig(study_dir=str(self.root))
        source, target, document = self.size.lengths
        config.data = dataclasses.replace(
            config.data, sni_dir=str(self.sni), positives=POSITIVES[form], validation_tasks=0,
            max_source_tokens=source, max_target_tokens=target, document_tokens=document,
        )  # fmt: skip
        config.engine = dataclasses.replace(config.engine, strategy="single", precision="fp32")
        own = {"rank": self.size.rank, "alpha": float(self.size.rank), "bottleneck": self.size.bottleneck}
        config.model = dataclasses.replace(config.model, backbone=str(backbone or self.backbone), **{**own, **model})
        return config

    @cached_property
    def tasks(self) -> list[Task]:
        """The training tasks; instructions are cut by the collators, not here."""
        return training_split(self._data(), 0)[0]

    @cached_property
    def unseen(self) -> list[Task]:
        """The test tasks."""
        return group_tasks(self._data(), "test_tasks", 0)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Trained on the tasks' texts, where no published one can be had: lengths are about those of T5's own."""
        folder = self.root / "tokenizer"
        if not folder.is_dir():
            train_tokenizer(_texts(self.tasks), folder, self.size.pieces)
        return load_tokenizer(folder)

    @cached_property
    def backbone(self) -> Path:
        """The study's own backbone; the time of a step does not depend on what its weights are."""
        return self.make_backbone("backbone")

    def make_backbone(self, name: str, **shape: Any) -> Path:
        """A backbone's folder, the study's shape changed by `shape`."""
        folder = self.root / name
        if not folder.is_dir():
            settings: Any = T5Config(dropout_rate=0.0, **{**self.size.shape, **shape})
            settings.decoder_start_token_id = 0
            torch.manual_seed(0)
            with whole_folder(folder) as aside:
                T5ForConditionalGeneration(settings).save_pretrained(aside)
                self.tokenizer.save_pretrained(aside)
        return folder

    def chunks(self, tasks: int, examples: int, batches: int = 1) -> list[list[TaskChunk]]:
        """Batches of so many tasks by so many examples.

        The tasks lie at even distances in the order by what a concatenating model reads of them; every batch has
        short and long ones, as those of training have.
        """
        ordered, wanted = sorted(self.tasks, key=_characters), tasks * batches
        chosen = [ordered[(2 * at + 1) * len(ordered) // (2 * wanted)] for at in range(wanted)]
        made = [chunk_of(task, examples) for task in chosen]
        return [made[at::batches] for at in range(batches)]

    def lengths(self, chunks: Sequence[Sequence[TaskChunk]], config: RunConfig) -> dict[str, Any]:
        """Tokens of what is measured, for its row: means, least and most, and the share of padding."""
        found: dict[str, list[int]] = {"instruction": [], "input": [], "target": [], "concatenated": []}
        padded = dict.fromkeys(found, 0)
        beside, joined = self.collator("hypernetwork", config), self.collator("concatenated", config)
        for each in chunks:
            batch = beside(each)
            assert batch.instruction_attention_mask is not None
            masks = {
                "instruction": batch.instruction_attention_mask,
                "input": batch.attention_mask,
                "target": batch.labels != -100,
                "concatenated": joined(each).attention_mask,
            }
            for name, mask in masks.items():
                found[name] += mask.sum(1).tolist()
                padded[name] += mask.numel()
        told = {
            name: {
                "mean": round(statistics.mean(all_of), 1),
                "least": min(all_of),
                "most": max(all_of),
                "padding": round(1 - sum(all_of) / padded[name], 3),
            }
            for name, all_of in found.items()
        }
        return {"tasks": sum(map(len, chunks)), "examples": len(found["input"]), "tokens": told}

    def collator(self, form: Form, config: RunConfig) -> Collator:
        """Makes batches of a form."""
        return Collator(self.tokenizer, config.data, form, config.teachers.unit)

    def tagi_training(
        self, work: Sequence[Sequence[Any]], config: RunConfig, make: Callable[[Any], Batch], tasks: Sequence[Task] = ()
    ) -> Training:
        """The hypernetwork's training with labels alone.

        Args:
            work, make: of :class:`Training`.
            config: of the run.
            tasks: whose instructions are encoded once, as finetuning does; without any the step encodes them.
        """
        model = build_tagi(config)
        objective = TagiObjective(LossConfig(), model.config.scaling)
        return Training(model, objective, make, work, self.cache_of(tasks, config, model) if tasks else None)

    def cache_of(self, tasks: Sequence[Task], config: RunConfig, model: Any) -> MakeCache:
        """What makes the cache of encoded instructions that finetuning would have for these tasks."""
        stage = Stage("finetune", config, current(), Path(tempfile.mkdtemp(dir=self.root)))
        return lambda strategy: open_cache(stage, model, tasks, [], self.collator("hypernetwork", config), strategy)

    def plain_training(
        self, work: Sequence[Sequence[Any]], config: RunConfig, make: Callable[[Any], Batch], lora: bool
    ) -> Training:
        """The backbone's training, whole or by peft's LoRA, with the same rank and sites as the hypernetwork's."""
        config.model.meta_lora = lora
        return Training(build_meta(config, Path(str(config.model.backbone))), SequenceObjective(), make, work)

    def _data(self) -> Any:
        config = RunConfig().data
        return dataclasses.replace(
            config, sni_dir=str(self.sni), validation_tasks=0, index_dir=str(self.root / "index")
        )


class Training:
    """One way of training, called for a step on each of its batches: collation, forward, backward, optimizer.

    Args:
        model: only what trains requires gradients.
        objective: what is minimised.
        make: an item of a step -> its micro-batch.
        work: steps, each the items of its micro-batches.
        cache: makes the cache from which batches get their encoded instructions; it is built here, once.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        make: Callable[[Any], Batch],
        work: Sequence[Sequence[Any]],
        cache: MakeCache | None = None,
    ) -> None:
        config = RunConfig()
        config.engine = dataclasses.replace(config.engine, strategy="single", precision="fp32")
        self.model, self.objective, self.make, self.work = model, objective, make, work
        self._strategy = SingleStrategy(config.engine, current())
        self._strategy.prepare(model, config.optimizer, 10_000)
        self._cache = None if cache is None else cache(self._strategy)
        if self._cache is not None:
            self._cache.build(self._strategy)
        self._taken = 0

    def __call__(self) -> None:
        for items in self.work:
            batches = [self.make(item) for item in items]
            if self._cache is not None:
                batches = [self._cache.attach(batch) for batch in batches]
            train_step(self._strategy, self.objective, batches, self._taken, lambda: False)
            self._taken += 1

    def trained(self) -> int:
        """Parameters that train."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def count(way: Callable[[], object]) -> int:
    """Operations of one run, counted by torch: matrix products and attention."""
    meter = FlopMeter()
    with meter.counting():
        way()
    return meter.flops


def chunk_of(task: Task, examples: int) -> TaskChunk:
    """A task's first examples under its definition."""
    chosen = tuple(task.examples[at] for at in range(min(examples, len(task.examples))))
    return TaskChunk(task, 0, chosen, tuple(reference_of(example, 0) for example in chosen))


def _characters(task: Task) -> float:
    """Of an example at the mean under `Def + 2 Pos`."""
    shots = sum(len(shot.input) + len(shot.output) for shot in task.positives[: POSITIVES["def_2_pos"]])
    return len(task.definition) + shots + statistics.mean(len(example.input) for example in task.examples)


def _texts(tasks: Sequence[Task]) -> list[str]:
    texts: list[str] = []
    for task in tasks:
        texts += [task.definition, *(f"{shot.input}\n{shot.output}" for shot in task.positives)]
        for at in range(min(_TOKENIZER_EXAMPLES, len(task.examples))):
            texts.append(f"{task.examples[at].input}\n{task.examples[at].references[0]}")
    return texts
