"""Parameters of a run's model, part by part, counted on the meta device: the real classes, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tagi_ds.build import tagi_config
from tagi_ds.config import RunConfig
from tagi_ds.model.adapter import Site
from tagi_ds.model.backbone import backbone_class, parameters_to_train
from tagi_ds.model.tagi import TagiForConditionalGeneration
from tagi_ds.plan.backbones import backbone_shape

# Tensors of the feed-forward's width that an activation function keeps for its backward pass. gelu_new is composed
# of elementary operations: x, x / 2, tanh(.) and 1 + tanh(.).
_KEPT_BY_ACTIVATION = {"gelu_new": 4, "relu": 1, "silu": 1, "gelu": 1}


@dataclass(frozen=True)
class Block:
    """One block of the backbone and what the hypernetwork holds for it; counts are of parameters.

    Attributes:
        name: e.g. ``encoder.block.3``.
        encoder: which stack.
        first: whether it is its stack's first, whose input needs no gradient.
        backbone, generator, fusion: parameters of each part.
        trained: of all three together.
        sites: adapted linears.
    """

    name: str
    encoder: bool
    first: bool
    backbone: int
    generator: int
    fusion: int
    trained: int
    sites: tuple[Site, ...]

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return self.backbone + self.generator + self.fusion


@dataclass(frozen=True)
class Shapes:
    """What the plan knows of a model.

    Attributes:
        d_model, inner, heads, d_ff, vocabulary: widths; `inner` is heads x head width of the backbone's attention.
        fusion_inner, fusion_heads: of the fusion's attention; 0 without fusion.
        gated: whether the feed-forward has two matrices in.
        kept_ff: tensors of width d_ff that a feed-forward keeps for its backward pass.
        rank, bottleneck: of the generator; 0 without a hypernetwork.
        attention_pooling: whether instructions are pooled by a learned query a site.
        generates_a: False where A is shared and frozen.
        concatenate: the decoder attends to [I ; F].
        blocks: encoder, then decoder, in order.
        embeddings, head, norms: parameters outside of the blocks; `head` is 0 where it is tied to the embeddings.
        trained_outside: of these three, what trains.
        trains: whether the backbone's (linears, norms, embeddings) train.
        dropout: the backbone's rate.
        largest_gathered: parameters of the largest module that ZeRO-3 gathers at once.
    """

    d_model: int
    inner: int
    heads: int
    d_ff: int
    vocabulary: int
    fusion_inner: int
    fusion_heads: int
    gated: bool
    kept_ff: int
    rank: int
    bottleneck: int
    attention_pooling: bool
    generates_a: bool
    concatenate: bool
    blocks: tuple[Block, ...]
    embeddings: int
    head: int
    norms: int
    trained_outside: int
    trains: tuple[bool, bool, bool]
    dropout: float
    largest_gathered: int

    @property
    def encoder(self) -> list[Block]:
        """The encoder's blocks."""
        return [block for block in self.blocks if block.encoder]

    @property
    def decoder(self) -> list[Block]:
        """The decoder's blocks."""
        return [block for block in self.blocks if not block.encoder]

    @property
    def backbone(self) -> int:
        """Parameters of the backbone."""
        return sum(block.backbone for block in self.blocks) + self.embeddings + self.head + self.norms

    @property
    def generator(self) -> int:
        """Parameters of the adapter generator."""
        return sum(block.generator for block in self.blocks)

    @property
    def fusion(self) -> int:
        """Parameters of the fusion."""
        return sum(block.fusion for block in self.blocks)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.backbone + self.generator + self.fusion

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(block.trained for block in self.blocks) + self.trained_outside

    @property
    def frozen(self) -> int:
        """Parameters that do not."""
        return self.parameters - self.trained

    @property
    def encoder_trains(self) -> bool:
        """Whether the encoding of instructions needs a backward pass: some backbone parameter of the encoder trains."""
        return any(self.trains)

    @property
    def encoding_is_constant(self) -> bool:
        """Whether an instruction is encoded alike in every step, so that it may be kept."""
        return not self.encoder_trains


def adapter_elements(sites: Iterable[Site], rank: int) -> int:
    """Elements of A (r, d_in) and B (d_out, r) of one instruction at `sites`: r·(d_in + d_out) each."""
    return sum(rank * (site.d_in + site.d_out) for site in sites)


def count_model(config: RunConfig, stage: str) -> Shapes:
    """Counts the model that `stage` would train, without weights.

    Args:
        config: resolved.
        stage: ``pretrain`` and ``finetune`` have the hypernetwork on a frozen backbone; ``meta_train`` and
            ``backbone`` train an ordinary sequence-to-sequence model whole.

    Raises:
        UserError: the backbone is not known (see :func:`tagi_ds.plan.backbones.backbone_shape`).
    """
    shape, own_head = backbone_shape(config)
    if config.model.dropout is not None:
        shape.dropout_rate = config.model.dropout
    if getattr(shape, "decoder_start_token_id", None) is None:
        shape.decoder_start_token_id = 0
    with torch.device("meta"):
        backbone = backbone_class(shape.model_type, own_head)(shape)
        if stage in ("meta_train", "backbone"):
            return shapes_of(backbone, None)
        settings = tagi_config(config.model, None)
        return shapes_of(backbone, TagiForConditionalGeneration.from_backbone(backbone, settings, "random"))


def shapes_of(backbone: Any, model: TagiForConditionalGeneration | None) -> Shapes:
    """The shapes of a model that is there, on any device.

    Args:
        backbone: a T5-family model; its `requires_grad` says what trains.
        model: the hypernetwork's model on it.
    """
    sub: Any = backbone.config
    blocks = tuple(_blocks(backbone, model))
    whole = model if model is not None else backbone
    outside: dict[str, list[nn.Parameter]] = {
        "embeddings": list(backbone.get_input_embeddings().parameters()),
        "norms": [p for side in (backbone.encoder, backbone.decoder) for p in side.final_layer_norm.parameters()],
    }
    tied = backbone.lm_head.weight is backbone.get_input_embeddings().weight
    outside["head"] = [] if tied else [backbone.lm_head.weight]
    kept = _KEPT_BY_ACTIVATION.get(sub.dense_act_fn, 4) + (2 if sub.is_gated_act else 0)
    shapes = Shapes(
        d_model=sub.d_model,
        inner=sub.num_heads * sub.d_kv,
        heads=sub.num_heads,
        d_ff=sub.d_ff,
        vocabulary=sub.vocab_size,
        gated=sub.is_gated_act,
        kept_ff=kept,
        blocks=blocks,
        embeddings=_count(outside["embeddings"]),
        head=_count(outside["head"]),
        norms=_count(outside["norms"]),
        trained_outside=_count((p for part in outside.values() for p in part), trained=True),
        trains=_what_trains(backbone),
        dropout=sub.dropout_rate,
        largest_gathered=max(
            [*(block.parameters for block in blocks), _count(outside["embeddings"]), _count(outside["head"])]
        ),
        **_hypernetwork_shape(model),
    )
    total = _count(whole.parameters())
    assert shapes.parameters == total, f"{shapes.parameters} parameters in parts, {total} in the model"
    return shapes


def _hypernetwork_shape(model: TagiForConditionalGeneration | None) -> dict[str, Any]:
    """The fields of Shapes that describe the hypernetwork."""
    names = ("fusion_inner", "fusion_heads", "rank", "bottleneck")
    if model is None:
        return {**dict.fromkeys(names, 0), "attention_pooling": False, "generates_a": False, "concatenate": False}
    settings, fusion = model.config, model.hypernetwork.fusion
    layer: Any = fusion.layers[0] if fusion is not None else None
    widths = (layer.heads * layer.head_width, layer.heads) if layer is not None else (0, 0)
    return {
        **dict(zip(names, (*widths, settings.rank, settings.bottleneck), strict=True)),
        "attention_pooling": settings.pooling == "attention",
        "generates_a": settings.a == "generated",
        "concatenate": settings.concatenate,
    }


def _blocks(backbone: Any, model: TagiForConditionalGeneration | None) -> Iterable[Block]:
    fusion = model.hypernetwork.fusion if model is not None else None
    for side in ("encoder", "decoder"):
        for index, module in enumerate(getattr(backbone, side).block):
            name = f"{side}.block.{index}"
            generator: list[nn.Parameter] = []
            fused: list[nn.Parameter] = []
            sites: tuple[Site, ...] = ()
            if model is not None:
                key = name.replace(".", "_")
                parts = model.hypernetwork.generator
                generator = list(parts[key].parameters()) if key in parts else []
                sites = tuple(site for site in model.site_table if site.block == name)
                if fusion is not None and name in fusion.blocks:
                    parts_of_layer = (fusion.memories[index], fusion.layers[index])
                    fused = [p for part in parts_of_layer for p in part.parameters()]
            own = list(module.parameters())
            yield Block(
                name,
                side == "encoder",
                index == 0,
                _count(own),
                _count(generator),
                _count(fused),
                _count([*own, *generator, *fused], trained=True),
                sites,
            )


def _what_trains(backbone: Any) -> tuple[bool, bool, bool]:
    """Whether the backbone's linears, norms and embeddings train."""
    linears = [module for module in backbone.encoder.modules() if isinstance(module, nn.Linear)]

    def group(name: str) -> bool:
        return all(p.requires_grad for p in parameters_to_train(backbone, name))

    return all(module.weight.requires_grad for module in linears), group("norms"), group("embeddings")


def _count(parameters: Iterable[nn.Parameter], trained: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)
