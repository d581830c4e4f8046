"""From a run's configuration to its parts: folders of a study, tokenizer, models, stores."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from tagi_ds.config import ModelConfig, RunConfig
from tagi_ds.data.examples import Task
from tagi_ds.data.own_tokenizer import own_tokenizer
from tagi_ds.data.tokenizer import load_tokenizer
from tagi_ds.errors import UserError
from tagi_ds.initial import Initial, mark_of
from tagi_ds.methods import METHODS
from tagi_ds.model.adapter import Site, find_sites
from tagi_ds.model.backbone import backbone_class, content_hash, empty_backbone, load_backbone, resolve_folder
from tagi_ds.model.configuration import TagiConfig
from tagi_ds.model.cross_bias import without_biases
from tagi_ds.model.head import accept_reader
from tagi_ds.model.start import Gather, whole
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.model.weights import Held, materialize, read_backbone
from tagi_ds.teachers.bank import common_a
from tagi_ds.teachers.binding import data_binding, dataset_fingerprint, input_binding, teacher_binding
from tagi_ds.teachers.distillation import Distillation
from tagi_ds.teachers.logit_store import LogitStore
from tagi_ds.teachers.logit_teacher import load_teacher, named_teacher, teacher_folder
from tagi_ds.teachers.parameter_store import ParameterStore


def study_backbone(config: RunConfig) -> Path:
    """The folder of the run's backbone: `model.backbone`, or the one that the study itself trained.

    Raises:
        UserError: neither is there.
    """
    if config.model.backbone is not None:
        return resolve_folder(config.model.backbone)
    own = Path(config.study_dir) / "backbone" / "model"
    if not (own / "config.json").is_file():
        raise UserError(
            f"the study has no backbone: {own} is missing",
            "name one with --model.backbone FOLDER_OR_HUB_ID, or train the small one: deepspeed launchers/backbone.py",
        )
    return own


def load_study_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer; before there is a backbone, the data folder's, else one trained for the study."""
    named = config.model.backbone
    if named is not None:
        # A name that is no folder is resolved first: its error is then the backbone's, and the hub is asked once.
        return load_tokenizer(named if Path(named).is_dir() else study_backbone(config))
    with contextlib.suppress(UserError):
        return load_tokenizer(study_backbone(config))
    beside = Path(config.data.sni_dir or "") / "tokenizer"
    if beside.is_dir():
        return load_tokenizer(beside)
    return own_tokenizer(config, Path(config.study_dir) / "tokenizer")


def build_scratch(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small T5 with random weights, drawn from torch's current generator."""
    shape = config.scratch
    settings: Any = T5Config(
        vocab_size=len(tokenizer),
        d_model=shape.d_model,
        d_kv=shape.d_model // shape.heads,
        d_ff=shape.d_ff,
        num_layers=shape.layers,
        num_heads=shape.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=config.model.dropout or 0.0,
    )
    settings.decoder_start_token_id = tokenizer.pad_token_id
    model = T5ForConditionalGeneration(settings)
    accept_reader(model, model.lm_head)
    return model


def build_seq2seq(config: RunConfig, folder: Path) -> PreTrainedModel:
    """An ordinary seq2seq model from a folder, with the run's dropout."""
    return load_backbone(folder, **_overrides(config.model))


def build_meta(config: RunConfig, folder: Path) -> nn.Module:
    """What meta-training trains: the seq2seq model of a folder, whole or with a new LoRA on it.

    Only what trains requires gradients.
    """
    model = build_seq2seq(config, folder)
    without_biases(model)
    if not config.model.meta_lora:
        accept_reader(model, model.get_output_embeddings())
        return model.requires_grad_(True)
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=config.model.rank,
        lora_alpha=config.model.alpha,  # type: ignore[arg-type]  # any number scales
        target_modules=[site.name for site in find_sites(model, config.model.sites)],
    )
    adapted = get_peft_model(model, settings)
    # The wrapper calls the model's forward past its hooks.
    accept_reader(adapted, model.get_output_embeddings())
    return adapted


def _overrides(settings: ModelConfig) -> dict[str, Any]:
    return {} if settings.dropout is None else {"dropout_rate": settings.dropout}


def build_tagi(
    config: RunConfig,
    dtype: torch.dtype = torch.float32,
    gather: Gather = whole,
    shared_a: Mapping[str, torch.Tensor] | None = None,
    construction: contextlib.AbstractContextManager[Any] | None = None,
    held: Held | None = None,
    stage_costs: list[float] | None = None,
) -> TagiForConditionalGeneration:
    """The run's TAGI model: its backbone, and a hypernetwork that is new or `model.initial`'s.

    Under ZeRO-3 (`gather` and `construction` of its strategy) a process never allocates more than its shards and one
    parameter (of fusion: one layer's projections); safetensors are read where they lie. Measured: two ranks that load
    a backbone of 1.02B parameters and make a hypernetwork of 0.35B in bf16, 2.74 GB, peak at 1.51 GB each, of which
    1.37 GB are their shards. In a pipeline (`held` of its strategy) a process reads and makes what its stage holds.

    Args:
        config: its seed draws a new hypernetwork, the same under every strategy.
        dtype: of the parameters.
        gather: makes sharded parameters whole.
        construction: entered while the hypernetwork's modules are made.
        shared_a: site -> A (r, d_in) of the teachers, for `model.a: shared`. None: the one that the run's seed gives to
            teachers and hypernetworks alike.
        held: chooses the parameters that get values; the others stay on the meta device. None: all get them.
        stage_costs: of the model, for `held`: what each of its stage units costs, in any measure.

    Raises:
        UserError: there is no such backbone, fusion cannot begin as the recipe says, or `model.initial` does not fit.
    """
    settings = config.model
    folder = study_backbone(config)
    _check_fusion_start(settings, folder)
    if held is None:
        backbone = load_backbone(folder, dtype, **_overrides(settings))
        model = TagiForConditionalGeneration.from_backbone(
            backbone, tagi_config(settings, folder), settings.fusion_start, gather, config.seed, construction
        )
        model.hypernetwork.to(dtype)
    else:
        backbone = empty_backbone(folder, dtype, **_overrides(settings))
        with torch.device("meta"):
            model = TagiForConditionalGeneration.from_backbone(
                backbone, tagi_config(settings, folder), settings.fusion_start
            )
        model.hypernetwork.to(dtype)
        model.stage_costs = stage_costs
        materialize(model, held(model))
        read_backbone(model.backbone, folder)
        model.start_hypernetwork(settings.fusion_start, seed=config.seed)
    a = None
    if settings.a == "shared":
        a = shared_a if shared_a is not None else common_a(model.site_table, settings.rank, config.seed)
    if settings.initial is not None:
        initial = Initial(Path(settings.initial))
        initial.load(model, gather)
        a = a and initial.shared_a(model, a, is_the_teachers=shared_a is not None)
    if a is not None:
        model.hypernetwork.set_shared_a(a, gather)
        model.shared_a_mark = mark_of(a)
    model.freeze()
    # What follows draws alike, whatever building has drawn.
    torch.manual_seed(config.seed)
    return model


def _check_fusion_start(settings: ModelConfig, folder: Path) -> None:
    """Fusion begins as the backbone's self-attention only where it is as wide; said before anything is loaded."""
    fuses = settings.fusion and METHODS[settings.method].fusion and settings.fusion_start == "backbone"
    if not fuses or settings.fusion_heads is None:
        return
    heads = AutoConfig.from_pretrained(folder).num_heads
    if settings.fusion_heads != heads:
        raise UserError(
            f"model.fusion_heads {settings.fusion_heads} with model.fusion_start backbone, whose attention has {heads} "
            "heads",
            "set model.fusion_start random, or leave model.fusion_heads out",
        )


def tagi_config(settings: ModelConfig, backbone: Path | None) -> TagiConfig:
    """The transformers configuration of a run's model section; the method decides fusion and concatenation.

    Args:
        backbone: its folder, whose weights are hashed; None where there are none yet, as for a plan.
    """
    method = METHODS[settings.method]
    return TagiConfig(
        backbone_hash=None if backbone is None else content_hash(backbone),
        backbone_name=settings.backbone or str(backbone),
        rank=settings.rank,
        alpha=settings.alpha,
        sites=list(settings.sites),
        a=settings.a,
        bottleneck=settings.bottleneck,
        head=settings.head,
        pooling=settings.pooling,
        fusion=settings.fusion and method.fusion,
        fusion_norm=settings.fusion_norm,
        fusion_heads=settings.fusion_heads,
        concatenate=settings.concatenate and method.concatenate,
        also_train=settings.also_train,
    )


def backbone_sites(folder: Path, kinds: Sequence[str]) -> list[Site]:
    """The adapter sites of a backbone, from its configuration alone; no weights are loaded."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return find_sites(backbone_class(config.model_type, own_head=False)(config), kinds)


def open_distillation(
    config: RunConfig, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, speaks: bool = True
) -> Distillation:
    """The stores that the run's loss asks for, each checked against the run before its first step.

    An online logit teacher is loaded whole: call this outside of a strategy's model context.

    Args:
        speaks: whether this process computes the loss; where it does not, an online teacher is not loaded.

    Raises:
        UserError: a store is missing, damaged, or bound to something else.
    """
    loss, study = config.loss, Path(config.study_dir)
    logits = parameters = online = None
    if loss.kl > 0 and loss.logits == "online":
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        backbone = study_backbone(config)
        folder = teacher_folder(config, backbone, tokenizer)
        online = load_teacher(folder, backbone, dtype) if speaks else None
    elif loss.kl > 0:
        folder = Path(loss.logit_store or study / "store_logits" / "store")
        teacher = {**teacher_binding(config.teachers), **named_teacher(config, study_backbone(config))}
        data = data_binding(config.data, tasks, tokenizer)
        logits = LogitStore(folder, {**data, **teacher, "seed": config.seed})
    if loss.alignment:
        folder = Path(loss.parameter_store or study / "train_teachers" / "store")
        backbone = study_backbone(config)
        sites = [site.name for site in backbone_sites(backbone, config.model.sites)]
        expected: dict[str, Any] = {"backbone": content_hash(backbone), "unit": config.teachers.unit, "sites": sites}
        if loss.alignment_form == "mse":
            expected["rank"] = config.model.rank
        inputs = {**input_binding(config.data, tasks, tokenizer), "dataset": dataset_fingerprint(tasks)}
        parameters = ParameterStore(folder, {**inputs, **expected})
    return Distillation(logits, parameters, loss, online)


def trainable_share(model: nn.Module) -> str:
    """One line: parameters of each part, and how many train."""

    def count(parameters: Any, trained: bool = False) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad or not trained)

    parts = {"all": model}
    if isinstance(model, TagiForConditionalGeneration):
        parts = {"backbone": model.backbone, "generator": model.hypernetwork.generator}
        if model.hypernetwork.fusion is not None:
            parts["fusion"] = model.hypernetwork.fusion
    return ", ".join(
        f"{name} {count(p.parameters()):,} ({count(p.parameters(), True):,} train)" for name, p in parts.items()
    )
