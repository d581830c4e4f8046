"""TAGI as a transformers model: one way from instruction and input to logits.

    state  = compile_instructions(instruction)      encoder -> generator, fusion memory      once an instruction
    memory = encode_input(input, state)             adapted encoder with fusion              once an input
    logits = decoder(memory, state)                 adapted decoder attending to [I ; F]     once a token

Training, generation and compiled tasks all take these three steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.mt5.modeling_mt5 import MT5Block
from transformers.models.t5.modeling_t5 import T5Block

from tagi_ds.model.adapter import STATE_KEYWORD, TaskState, find_sites, install
from tagi_ds.model.backbone import backbone_class, parameters_to_train, without_dropout
from tagi_ds.model.configuration import TagiConfig
from tagi_ds.model.cross_bias import without_biases
from tagi_ds.model.fusion import Fusion, FusionLayer, FusionMemory
from tagi_ds.model.head import Figures, Reader, ReadingHead
from tagi_ds.model.hypernetwork import Hypernetwork, SiteGroup
from tagi_ds.model.start import Gather, Starting, fill, whole
from tagi_ds.runs import runs_of

if TYPE_CHECKING:
    from tagi_ds.model.compiled import CompiledTask


@dataclass
class TagiOutput(Seq2SeqLMOutput):
    """Logits (N, T, vocabulary) and with labels their loss, or what was read of them; and the state that the
    instructions gave, for losses on the adapters."""

    state: TaskState | None = None
    figures: Figures | None = None


class TagiForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A frozen encoder-decoder backbone answered by adapters that a hypernetwork generates from instructions."""

    config: TagiConfig
    config_class = TagiConfig
    base_model_prefix = "tagi"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [T5Block.__name__, MT5Block.__name__]  # noqa: RUF012
    backbone: Any  # one of backbone.ARCHITECTURES
    stage_costs: list[float] | None = None
    """What each of :meth:`stage_units` costs, in any measure; None: alike."""
    shared_a_mark: str | None = None
    """With `a: shared`, which A the run has (:func:`tagi_ds.initial.mark_of`)."""
    parameters_are_sharded: bool = False
    """Set by engines that release a module's parameters once the gradient of its inputs is known, and at once where no
    input needs one: the hypernetwork's input then asks for a gradient, so that its parameters stay for its backward."""

    def __init__(self, config: TagiConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            sub_config = config.backbone_config
            backbone = backbone_class(sub_config.model_type, config.own_head)(sub_config)
        self.backbone = backbone
        ReadingHead.instead_of(self.backbone.lm_head)
        sub = backbone.config
        sites = find_sites(backbone, config.sites or [])
        fusion = None
        if config.fusion:
            names = [f"encoder.block.{layer}" for layer in range(sub.num_layers)]
            heads = config.fusion_heads or sub.num_heads
            fusion = Fusion(names, sub.d_model, heads, sub.d_kv, sub.layer_norm_epsilon, config.fusion_norm)
        self.hypernetwork = Hypernetwork(
            sites,
            fusion,
            d_model=sub.d_model,
            bottleneck=config.bottleneck,
            rank=config.rank,
            head=config.head,
            pooling=config.pooling,
            shared_a=config.a == "shared",
        )
        layers: dict[str, nn.Module] = dict(zip(fusion.blocks, fusion.layers, strict=True)) if fusion else {}
        install(backbone, sites, config.scaling, layers, config.concatenate)
        # Behind the hooks that put the instruction before the keys.
        without_biases(backbone)
        self.site_table = sites
        self.generation_config = backbone.generation_config
        self.post_init()
        self.freeze()

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel,
        config: TagiConfig,
        fusion_start: str = "backbone",
        gather: Gather = whole,
        seed: int = 0,
        construction: contextlib.AbstractContextManager[Any] | None = None,
    ) -> TagiForConditionalGeneration:
        """A new hypernetwork on a loaded backbone.

        Args:
            backbone: loaded by :func:`tagi_ds.model.backbone.load_backbone`.
            config: its `backbone` and `own_head` are filled in here.
            fusion_start: ``backbone`` or ``random``.
            gather: makes sharded parameters whole.
            seed: decides the hypernetwork's values (:mod:`tagi_ds.model.start`).
            construction: entered while modules are made; a sharding engine's takes each one's parameters at once.
        """
        config.backbone = backbone.config.to_dict()
        config.own_head = type(backbone).__name__.startswith("OwnHead")
        config.__post_init__()
        # Values come below: what modules draw as they are made would be drawn in vain.
        with no_init_weights(), construction or contextlib.nullcontext():
            model = cls(config, backbone)
        model.start_hypernetwork(fusion_start, gather, seed)
        return model

    def start_hypernetwork(self, fusion_start: str = "backbone", gather: Gather = whole, seed: int = 0) -> None:
        """Gives a new hypernetwork the values with which it begins; parameters on the meta device stay without.

        Args:
            fusion_start, gather, seed: of :meth:`from_backbone`.
        """
        fusion = self.hypernetwork.fusion
        copied: list[nn.Parameter] = []
        if fusion is not None and fusion_start == "backbone":
            layers = [block.layer[0] for block in self.backbone.encoder.block]
            attentions, norms = [layer.SelfAttention for layer in layers], [layer.layer_norm for layer in layers]
            copied = fusion.start_from(attentions, norms, gather)
        fill(self.hypernetwork, seed, gather, but=copied)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers; what the configuration calls frozen is frozen.

        A folder that holds the hypernetwork alone is joined with its backbone: see :mod:`tagi_ds.model.apart`, where
        `backbone` says where that lies now.
        """
        config = kwargs.get("config") or TagiConfig.from_pretrained(name)
        if config.backbone_apart:
            from tagi_ds.model.apart import load_apart

            return load_apart(cls, name, **{**kwargs, "config": config})
        kwargs.pop("backbone", None)
        result = super().from_pretrained(name, *args, **kwargs)
        (result[0] if isinstance(result, tuple) else result).freeze()
        return result

    @property
    def z3_leaf_classes(self) -> list[type[nn.Module]]:
        """Modules whose parameters ZeRO-3 gathers together rather than linear by linear."""
        wanted = (SiteGroup, FusionMemory, FusionLayer, T5Block, MT5Block)
        return [kind for kind in wanted if any(type(module) is kind for module in self.modules())]

    def stage_units(self) -> list[list[nn.Module]]:
        """The model's layers for a pipeline: see :func:`tagi_ds.model.pipeline.stage_units`."""
        from tagi_ds.model.pipeline import stage_units

        return stage_units(self)

    @property
    def pad_token_id(self) -> int:
        """T5's padding id, 0 unless the backbone says otherwise."""
        return self.config.pad_token_id or 0

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Starting):
            own = dict(module.named_parameters())
            for name, start in module.starts().items():
                # By torch's own function, which transformers guards: what a checkpoint has given is left as it is.
                nn.init.normal_(own[name], start.mean, start.std)

    def freeze(self, also_train: str | None = None) -> None:
        """Leaves open what trains: the hypernetwork, and the group of backbone parameters named by `also_train`."""
        self.config.also_train = also_train or self.config.also_train
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters_to_train(self.backbone, self.config.also_train):
            parameter.requires_grad_(True)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embeddings."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's output head."""
        return self.backbone.lm_head

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The backbone's encoder."""
        return self.backbone.encoder

    @property
    def encoding_is_constant(self) -> bool:
        """Whether an instruction is encoded alike in every training step: nothing of the encoder trains."""
        return not any(p.requires_grad for p in self.backbone.encoder.parameters())

    def encode_instructions(self, instruction_ids: Tensor, instruction_attention_mask: Tensor) -> Tensor:
        """I (U, S, d) of U instructions (U, S); a constant of a frozen encoder: no graph, no dropout."""
        with contextlib.ExitStack() as modes:
            if self.encoding_is_constant:
                modes.enter_context(torch.no_grad())
                modes.enter_context(without_dropout(self.backbone.encoder))
            encoded: Tensor = self.backbone.encoder(
                input_ids=instruction_ids, attention_mask=instruction_attention_mask
            ).last_hidden_state
        return encoded

    def compile_instructions(
        self,
        instruction_ids: Tensor | None,
        instruction_attention_mask: Tensor,
        instruction_encoding: Tensor | None = None,
    ) -> TaskState:
        """What U instructions imply: adapters, fusion memory, decoder memory.

        Args:
            instruction_ids, instruction_attention_mask: (U, S) int64.
            instruction_encoding: (U, S, d) of :meth:`encode_instructions`, kept from before; the ids are then not
                looked at.

        Raises:
            ValueError: an encoding from before, of an encoder whose encodings change.
        """
        if instruction_encoding is not None and not self.encoding_is_constant:
            raise ValueError("an encoding kept from before stands for a frozen encoder alone")
        if instruction_encoding is None:
            assert instruction_ids is not None
            encoded = self.encode_instructions(instruction_ids, instruction_attention_mask)
        else:
            encoded = instruction_encoding
        source = encoded
        if self.parameters_are_sharded and torch.is_grad_enabled() and not encoded.requires_grad:
            source = encoded.detach().requires_grad_()
        adapters, fusion = self.hypernetwork(source, instruction_attention_mask)
        return TaskState(adapters, fusion, encoded, instruction_attention_mask)

    @torch.no_grad()
    def keep_instructions(self, state: TaskState) -> None:
        """Computes what every answer of U tasks takes of their instructions in the decoder, and keeps it in `state`.

        A pass of one token over the decoder, so that sharding engines have each block's parameters whole. Without
        concatenation there is nothing to keep.
        """
        assert state.memory is not None
        assert state.mask is not None
        state.kept = {}
        one = state.mask.new_ones(len(state.mask), 1)
        self.backbone.decoder(
            input_ids=one,
            encoder_hidden_states=state.memory[:, :1],
            encoder_attention_mask=torch.cat([state.mask, one], dim=1) if self.config.concatenate else one,
            use_cache=False,
            **{STATE_KEYWORD: state.at(None)},
        )

    def encode_input(self, input_ids: Tensor, attention_mask: Tensor, state: TaskState) -> tuple[Tensor, Tensor]:
        """F of N inputs, and the mask of what the decoder attends to: [I ; F], of which the state has I.

        Args:
            input_ids, attention_mask: (N, L) int64.
            state: of the N examples (its index set).

        Returns:
            (N, L, d) and (N, S + L); without concatenation (N, L, d) and (N, L).
        """
        encoded = self.backbone.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **{STATE_KEYWORD: state}
        ).last_hidden_state
        if not self.config.concatenate:
            return encoded, attention_mask
        assert state.mask is not None
        return encoded, torch.cat([state.spread(state.mask, input_ids.shape[0]), attention_mask], dim=1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        task_index: Tensor | None = None,
        instruction_encoding: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        state: TaskState | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        read: Reader | None = None,
        **kwargs: Any,
    ) -> TagiOutput:
        """Logits for N examples of U tasks, or what a reader takes of them.

        Args:
            input_ids, attention_mask: (N, L); with `encoder_outputs`, the mask of :meth:`encode_input`.
            instruction_ids, instruction_attention_mask: (U, S), unless `state` is given.
            task_index: (R,), which instruction each run of N / R examples has, one by one where R = N; None: the U
                instructions in order, N / U examples each, or what `state` says.
            instruction_encoding: (U, S, d), see :meth:`compile_instructions`.
            decoder_input_ids: (N, T); by default `labels` shifted right.
            labels: (N, T), -100 where nothing is to be predicted.
            state: of :meth:`compile_instructions`.
            encoder_outputs: F of :meth:`encode_input`.
            past_key_values, use_cache: as in transformers.
            read: takes figures from the logits of some positions at a time, which then never exist together.

        Returns:
            logits (N, T, vocabulary), or with `read` its figures, and the state; with `labels` and without `read` also
            the loss, the mean cross-entropy over the labels that are not -100, as of transformers' T5.
        """
        if state is None:
            assert instruction_attention_mask is not None
            state = self.compile_instructions(instruction_ids, instruction_attention_mask, instruction_encoding)
        if task_index is not None:
            state = state.at(task_index)
        if encoder_outputs is None:
            assert input_ids is not None
            assert attention_mask is not None
            memory, attention_mask = self.encode_input(input_ids, attention_mask, state)
        else:
            memory = encoder_outputs[0]
        if decoder_input_ids is None:
            decoder_input_ids = self.backbone._shift_right(labels)
        decoded = self.backbone.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=memory,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            **{STATE_KEYWORD: state},
        )
        hidden = decoded.last_hidden_state
        if self.backbone.config.scale_decoder_outputs:
            hidden = hidden * self.backbone.model_dim**-0.5
        found = self.backbone.lm_head(hidden, read)
        loss = None
        if labels is not None and read is None:
            loss = functional.cross_entropy(found.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return TagiOutput(
            loss=loss,
            logits=found if read is None else None,
            figures=None if read is None else found,
            past_key_values=decoded.past_key_values,
            encoder_last_hidden_state=memory,
            state=state,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_attention_mask: Tensor | None = None,
        task_index: Tensor | None = None,
        task: CompiledTask | TaskState | None = None,
        **settings: Any,
    ) -> Tensor:
        """Answers N inputs; every decoding setting of transformers' ``generate``.

        Args:
            input_ids, attention_mask: (N, L).
            instruction_ids, instruction_attention_mask: (U, S), unless `task` is given.
            task_index: (N,), which instruction each input has; None: the U instructions in order, N / U inputs each.
            task: a compiled task; the instruction is then not touched.
            settings: of ``GenerationMixin.generate`` (``num_beams``, ``do_sample``, ``max_new_tokens``, ...).
        """
        if attention_mask is None:
            attention_mask = input_ids.ne(self.pad_token_id).long()
        if task is None:
            assert instruction_ids is not None
            if instruction_attention_mask is None:
                instruction_attention_mask = instruction_ids.ne(self.pad_token_id).long()
            state = self.compile_instructions(instruction_ids, instruction_attention_mask)
        else:
            state = task if isinstance(task, TaskState) else task.state
            # Who gives a task gives it again.
            state.kept = {} if state.kept is None else state.kept
        # Beams and samples make every run longer, which needs no other index.
        state = state.at(None if task_index is None else runs_of(task_index))
        memory, memory_mask = self.encode_input(input_ids, attention_mask, state)
        return super().generate(  # type: ignore[misc, return-value]
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            attention_mask=memory_mask,
            state=state,
            **settings,
        )

    def _reorder_cache(self, cache: Any, beam_index: Tensor) -> Any:
        # `state` is also a name under which transformers looks for a cache. Beams of one example share their task, so
        # the task's state needs no reordering.
        if not isinstance(cache, TaskState):
            cache.reorder_cache(beam_index)
        return cache

    def compile_task(self, instruction: str | Tensor, tokenizer: Any = None) -> CompiledTask:
        """A task object that answers inputs without touching its instruction again.

        Args:
            instruction: its text, or token ids (S,) or (1, S).
            tokenizer: for a text; by default the one saved beside the model.
        """
        from tagi_ds.model.compiled import compile_task

        return compile_task(self, instruction, tokenizer)


# After an import of this module transformers' own entries load a folder: AutoModelForSeq2SeqLM.from_pretrained(FOLDER).
AutoModel.register(TagiConfig, TagiForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(TagiConfig, TagiForConditionalGeneration, exist_ok=True)
