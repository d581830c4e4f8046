"""Tokens of one micro-batch on one GPU, from the recipe's global batch and lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tagi_ds.config import RunConfig

VALIDATION_EXAMPLES = 64
"""Examples in a validation batch at the most: more do not make it faster, and training has left less memory."""


@dataclass(frozen=True)
class Workload:
    """One micro-batch of one GPU (in a pipeline: of one pipeline).

    Attributes:
        examples: N.
        tasks: U, distinct instructions; 0 in meta-training, where the input holds the instruction.
        instruction, source, target: padded lengths S, L, T in tokens.
        checkpointing: whether the backbone's blocks are recomputed in the backward pass.
        precision: bf16 or fp32.
        kl, alignment: whether these losses are on.
        cpu: whether torch's kernels for the processor are used, which keep a little more.
        padded: whether examples differ in length, so that a mask is laid over the position bias.
        counted: target positions that are not padding, all that the output head reads; None: all of N·T.
        instruction_cache: whether encoded instructions are read from the run's cache where the model allows it.
        sharded: whether instructions have a gradient even of a frozen encoder, as ZeRO-3 asks of the hypernetwork's
            input.
    """

    examples: int
    tasks: int
    instruction: int
    source: int
    target: int
    checkpointing: bool
    precision: str
    kl: bool = False
    alignment: bool = False
    cpu: bool = False
    padded: bool = True
    counted: int | None = None
    instruction_cache: bool = False
    sharded: bool = False

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def memory_tokens(self) -> int:
        """Tokens that the decoder may attend to before each example's own: S, or 0 in meta-training."""
        return self.instruction if self.tasks else 0

    @property
    def trained_tokens(self) -> int:
        """Input and target tokens: what tokens/s counts."""
        return self.examples * (self.source + self.target)

    def sized(self, examples: int) -> Workload:
        """The same with another number of examples, as many of them a task as before."""
        tasks = 0 if self.tasks == 0 else max(1, round(examples * self.tasks / self.examples))
        return replace(self, examples=examples, tasks=min(tasks, examples))

    def with_lengths(self, lengths: tuple[int, int, int]) -> Workload:
        """The same with other lengths S, L, T."""
        return replace(self, instruction=lengths[0], source=lengths[1], target=lengths[2])


def workload_of(config: RunConfig, stage: str, replicas: int, cpu: bool) -> Workload:
    """The longest micro-batch that the recipe allows: every length at its limit.

    Pretraining cuts a document of D tokens into three parts; each is reckoned at D - 2·least, since a batch is padded
    to its longest parts.

    Args:
        config: resolved.
        stage: pretrain, finetune, meta_train or backbone.
        replicas: data-parallel degree. Where the global batch does not divide, the next larger one that does is taken.
        cpu: see :class:`Workload`.
    """
    data, engine = config.data, config.engine
    each = 1 if stage == "pretrain" else data.examples_per_task
    tasks = max(1, -(-data.tasks_per_batch // (replicas * engine.accumulation)))
    has_hypernetwork = stage in ("pretrain", "finetune")
    part = max(1, data.document_tokens - 2 * data.min_part_tokens)
    lengths = (data.max_source_tokens, data.max_source_tokens, data.max_target_tokens)
    instruction, source, target = (part, part, part) if stage == "pretrain" else lengths
    return Workload(
        examples=tasks * each,
        tasks=tasks if has_hypernetwork else 0,
        instruction=instruction if has_hypernetwork else 0,
        source=source,
        target=target,
        checkpointing=engine.activation_checkpointing,
        precision=engine.precision,
        kl=stage == "finetune" and config.loss.kl > 0,
        alignment=stage == "finetune" and config.loss.alignment != 0,
        cpu=cpu,
        instruction_cache=stage == "finetune" and engine.instruction_cache != "off",
    )


def validation_examples(config: RunConfig) -> int:
    """Examples in a validation batch: as many as are answered together later, where that is less than the most."""
    return min(VALIDATION_EXAMPLES, config.evaluation.batch_examples)


def validation_work(config: RunConfig, stage: str, work: Workload) -> Workload | None:
    """A validation batch of one replica at the recipe's limits; None where nothing is validated.

    A task's examples follow one another: a batch holds one task's, or where they end, also the next one's.

    Args:
        work: of :func:`workload_of`.
    """
    data = config.data
    if stage == "pretrain" or (data.validation_split is None and not data.validation_tasks):
        return None
    examples = validation_examples(config)
    return replace(work, examples=examples, tasks=min(2, examples) if work.tasks else 0)


def expected_work(config: RunConfig, stage: str, limits: Workload, lengths: tuple[int, int, int] | None) -> Workload:
    """The micro-batch to which times belong.

    Args:
        config: resolved.
        stage: pretrain, finetune, meta_train or backbone.
        limits: of :func:`workload_of`.
        lengths: expected padded lengths (instruction, source, target). None: the limits; in pretraining, whose cuts
            are drawn evenly, a third of a document each.
    """
    third = config.data.document_tokens // 3
    if lengths is None and stage == "pretrain":
        lengths = (third, third, third)
    if lengths is None:
        return limits
    return limits.with_lengths(lengths if limits.tasks else (0, *lengths[1:]))
