"""A study for the benchmark of distillation: a random backbone, both stores, and finetuning steps on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from tagi_ds.build import backbone_sites, build_tagi, load_study_tokenizer, open_distillation
from tagi_ds.config import RunConfig
from tagi_ds.data.catalogue import training_split
from tagi_ds.data.collate import Collator
from tagi_ds.data.examples import Task, unit_of
from tagi_ds.data.tokenizer import train_tokenizer
from tagi_ds.encodings.instructions import open_cache
from tagi_ds.engine.distributed import current
from tagi_ds.engine.step import train_step
from tagi_ds.engine.strategy import make_strategy
from tagi_ds.launch import Stage
from tagi_ds.model.adapter import LowRank
from tagi_ds.model.backbone import content_hash
from tagi_ds.stages import hypernetwork, store_logits
from tagi_ds.teachers import parameter_store
from tagi_ds.teachers.binding import input_binding
from tagi_ds.teachers.logit_store import LogitStore

T5_VOCABULARY = 32_128


@dataclass
class Study:
    """A study with a random backbone and both stores; time does not depend on what the weights are."""

    config: RunConfig
    tasks: list[Task]
    manifest: dict[str, Any]


def make_study(folder: Path, sni: Path, instances: int) -> Study:
    config = RunConfig(study_dir=str(folder))
    config.data.sni_dir, config.data.positives, config.data.max_instances = str(sni), 2, instances
    config.data.tasks_per_batch, config.data.validation_tasks = 4, 1
    config.teachers.unit, config.engine.strategy, config.engine.precision = "task", "single", "fp32"
    config.engine.accumulation, config.evaluation.batch_examples = 1, 8
    config.model.backbone = str(make_backbone(folder / "model", config))
    store_logits.run(Stage("store_logits", config, current(), folder / "store_logits"))
    tasks, _ = training_split(config.data, config.seed)
    make_parameter_store(config, tasks)
    return Study(config, tasks, LogitStore(folder / "store_logits" / "store").manifest)


def make_backbone(folder: Path, config: RunConfig) -> Path:
    """As deep as wide in T5's way, small enough for a step in about a second; the tokenizer is trained on the data."""
    tasks, _ = training_split(config.data, config.seed)
    texts = (
        f"{task.definition}\n{example.input}\n{example.references[0]}" for task in tasks for example in task.examples
    )
    train_tokenizer(texts, folder, 8000)
    settings: Any = T5Config(
        vocab_size=T5_VOCABULARY, d_model=256, d_kv=64, d_ff=512, num_layers=4, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    T5ForConditionalGeneration(settings).save_pretrained(folder)
    return folder


def make_parameter_store(config: RunConfig, tasks: list[Task]) -> None:
    assert config.model.backbone is not None
    backbone, folder = Path(config.model.backbone), Path(config.study_dir) / "train_teachers" / "store"
    sites, rank = backbone_sites(backbone, config.model.sites), config.model.rank
    generator = torch.Generator().manual_seed(0)
    parameter_store.write_common(folder, {s.name: torch.randn(rank, s.d_in, generator=generator) for s in sites})
    units = {}
    for unit in sorted({unit_of(task, config.teachers.unit) for task in tasks}):
        factors = {
            s.name: LowRank(
                torch.randn(rank, s.d_in, generator=generator), 0.01 * torch.randn(s.d_out, rank, generator=generator)
            )
            for s in sites
        }
        parameter_store.write_unit(folder, unit, factors, {"settings": ""})
        units[unit] = {"aligned": True}
    names = [site.name for site in sites]
    binding = {
        **input_binding(config.data, tasks, load_study_tokenizer(config)),
        "backbone": content_hash(backbone),
        "unit": config.teachers.unit,
        "sites": names,
        "rank": rank,
    }
    header = {"binding": binding, "gauge": "trained", "sites": names, "rank": rank, "scaling": 1.0}
    parameter_store.finish(folder, units, header)


def finetuning_steps(config: RunConfig) -> Iterator[None]:
    """Takes a step of the finetuning stage whenever the next item is asked for."""
    tokenizer = load_study_tokenizer(config)
    tasks, _ = training_split(config.data, config.seed)
    distillation = open_distillation(config, tasks, tokenizer)
    stage = Stage("finetune", config, current(), Path(config.study_dir) / "finetune")
    strategy = make_strategy(config.engine, stage.ranks)
    model = build_tagi(config)
    cache = open_cache(stage, model, tasks, [], Collator(tokenizer, config.data), strategy)
    objective, source = hypernetwork.objective_and_source(
        stage, tasks, tokenizer, distillation, model.config.scaling, cache
    )
    strategy.prepare(model, config.optimizer, 1000)
    if cache is not None:
        cache.build(strategy)
    step = 0
    while True:
        train_step(strategy, objective, source.next_step(), step, lambda: False)
        step += 1
        yield
