"""The typed description of a run: what a recipe may say, field by field.

A recipe is one YAML file with the sections below and an optional ``stages`` table, whose entry for the
launched stage (``pretrain``, ``finetune``, ...) is laid over the common part. Reading, overriding on the
command line and saving live in :mod:`tagi_ds.recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["category", "task", "source"]
"""What one teacher learns: a task category (SNI in the paper), a single task, or a source data set (P3)."""

Control = Literal["random", "shuffled"]
"""An instruction in the place of a task's own, see :mod:`tagi_ds.evaluation.controls`."""

Dealing = Literal["length", "order"]
"""How a global batch is dealt to ranks and micro-batches, see :mod:`tagi_ds.data.dealing`."""

STAGES = ("backbone", "train_teachers", "store_logits", "pretrain", "finetune", "meta_train", "evaluate", "convert")
"""The stages of a study in the order in which they run; ``backbone`` only where no published one is used."""


@dataclass
class ModelConfig:
    """The backbone and the hypernetwork on top of it."""

    backbone: str | None = None
    """Folder or hub id of a T5-family model. Default: the study's own ``backbone/model``."""
    initial: str | None = None
    """Folder of a converted TAGI model to start from (finetuning: the pretrained one). Default: none."""
    method: Literal["tagi", "hint", "hypertuning", "hypter"] = "tagi"
    """Named configuration of the parts (paper, Table 1); it sets `fusion` and `concatenate`."""
    rank: int = 32
    """Rank r of every generated LoRA."""
    alpha: float = 32.0
    """LoRA scaling is alpha / rank."""
    sites: list[str] = field(default_factory=lambda: ["q", "v"])
    """Adapted linears of every attention (q, k, v, o) and feed-forward (wi, wo)."""
    a: Literal["generated", "shared"] = "generated"
    """`shared`: A is one frozen matrix a site, drawn by the seed as the teachers' is, and only B is generated."""
    bottleneck: int = 64
    """Width m of the generator's two-layer MLP."""
    head: Literal["full", "slot"] = "full"
    """`full`: the MLP's last layer emits all r rows; `slot`: one head shared by the r rank slots (for 11B)."""
    pooling: Literal["attention", "mean"] = "attention"
    """How the encoded instruction becomes a vector a site: one learned query a site, or the masked mean."""
    fusion: bool = True
    """Instruction fusion in every encoder layer (paper, section 3.3)."""
    fusion_norm: Literal["pre", "post"] = "pre"
    """`post` is the paper's LayerNorm(S + Attention); `pre` starts as the identity."""
    fusion_start: Literal["backbone", "random"] = "backbone"
    """Start of fusion's q, k, v: the layer's own self-attention weights, or random."""
    fusion_heads: int | None = None
    """Heads of the fusion's attention; default the backbone's. Fewer make fusion narrower."""
    concatenate: bool = True
    """The decoder attends to [I ; F] rather than to F alone."""
    also_train: Literal["nothing", "norms", "embeddings", "norms_embeddings", "all"] = "nothing"
    """Backbone parameters trained beside the hypernetwork, to reproduce published variants."""
    meta_lora: bool = False
    """Meta-training: train a LoRA (`rank`, `alpha`, `sites`) rather than the whole backbone; it is merged into the
    model that the stage leaves."""
    dropout: float | None = None
    """Overrides the backbone's dropout rate; None keeps it."""


@dataclass
class ScratchConfig:
    """Shape of the small T5 that the `backbone` stage trains where no published backbone can be had."""

    d_model: int = 64
    """Width."""
    d_ff: int = 192
    """Width of the gated feed-forward."""
    layers: int = 2
    """Layers of the encoder and of the decoder."""
    heads: int = 4
    """Attention heads."""
    vocabulary: int = 4000
    """Pieces at the most of the tokenizer that is trained where the data folder brings none."""


@dataclass
class DataConfig:
    """What is read and how it is cut into batches."""

    sni_dir: str | None = None
    """Folder in Super-NaturalInstructions' layout (tasks/, splits/), or an hf:// address whose rows carry the same
    fields. Default: the embedded benchmark."""
    p3_dir: str | None = None
    """Folder of P3 templates (jsonl or parquet), or hf://datasets/bigscience/P3@refs%2Fconvert%2Fparquet."""
    p3_templates: str | None = None
    """promptsource's template files, or the table that launchers/prepare.py derives from them. Default: `templates`
    in p3_dir."""
    c4_dir: str | None = None
    """Folder of C4 shards (*.json.gz, *.jsonl, *.parquet), or an hf:// address of one. With fewer shards than
    `tasks_per_batch` several processes decompress the same one. Default: the embedded corpus."""
    index_dir: str | None = None
    """Where the one-time index of SNI and P3 is kept. Default: <study_dir>/index."""
    split: str = "default"
    """Name of the folder under splits/."""
    train_split: str = "train_tasks"
    """Split file with the training tasks, without `.txt`."""
    validation_split: str | None = None
    """Split file with validation tasks, or `p3:` and data sets of P3, whose validation rows are then read (T0 chose its
    checkpoints so); at most `max_instances` a task, of P3 the same for every seed. Without one, `validation_tasks`
    training tasks are held out: of P3 templates, whose inputs others of the same data set share."""
    validation_tasks: int = 8
    """Training tasks held out for choosing the best checkpoint where no validation split is named."""
    max_tasks: int | None = None
    """Train on so many of the training tasks only, chosen by the seed, validation tasks apart; a smaller number's tasks
    are among a larger one's."""
    label_noise: float = 0.0
    """Share of the training examples that are given the answer of another example of their task, for studies of noisy
    labels; those of a smaller share are among a larger one's."""
    prompt: Literal["tk_instruct", "plain"] = "tk_instruct"
    """Wording around instruction and input: Tk-Instruct's, or the bare texts joined by a line break."""
    positives: int = 0
    """Positive examples in the instruction: 0 is `Def`, 2 is `Def + 2 Pos`."""
    negatives: int = 0
    """Negative examples in the instruction."""
    explanations: bool = False
    """Each positive and negative example brings its explanation."""
    p3_train: str = "t0_train"
    """Named split of P3 to train on: t0_train (36 data sets), or data sets joined by commas."""
    p3_max_examples: int = 1000
    """P3: training examples a template at the most, the same for every seed: one index, and one prepared folder, serves
    all seeds of a study. Rows that are validated or tested on have limits of their own."""
    weights: dict[str, float] | None = None
    """Share of each source in the batches: {sni: 0.3, p3: 0.7}. Default: by their sizes."""
    sampling: Literal["size", "uniform", "category"] = "size"
    """How often a task comes: by its number of examples (each once an epoch), all alike, or all categories alike."""
    task_cap: int | None = None
    """Sampling by size: examples of a task that count in one epoch at the most; others follow in the next ones."""
    malformed: Literal["error", "skip"] = "error"
    """Rows that cannot be read: an error that names file and row, or counted and left out."""
    workers: int = 0
    """Processes a rank that prepare batches ahead; 0: in the rank's own, when asked. The order is the same with any."""
    english_only: bool = True
    """Leave out tasks whose input or output language is not English."""
    max_instances: int = 100
    """SNI: training instances a task at the most, chosen by the seed; and instances of a validation split's tasks."""
    max_source_tokens: int = 1024
    """Truncation of an instruction and of an input."""
    max_target_tokens: int = 128
    """Truncation of a target."""
    tasks_per_batch: int = 16
    """Distinct tasks (pretraining: documents) in one global batch."""
    examples_per_task: int = 1
    """Examples of each task in one global batch."""
    dealing: Dealing = "length"
    """How a global batch is dealt to ranks and micro-batches: by length in parts of about equal cost, so that little is
    padded and no rank waits long, or in equal parts in its order. Pretraining: to a rank's own micro-batches alone."""
    pad_multiple: int = 8
    """Lengths are padded to a multiple of this; 8 suits accelerators, 1 CPUs and short texts."""
    min_part_tokens: int = 8
    """C4: least length of each of the parts a | b | c."""
    document_tokens: int = 1024
    """C4: tokens of an example at the most."""
    documents: Literal["truncate", "windows"] = "truncate"
    """C4: what becomes of a longer document: its beginning alone, or one example after the other until its end."""
    shuffle_block: int = 1024
    """C4: consecutive rows of a shard that are shuffled among themselves; shards are shuffled as a whole."""


@dataclass
class TeacherConfig:
    """Task-specific LoRA teachers and the logit teacher."""

    unit: Unit = "category"
    """What one teacher learns: a task category (SNI in the paper), a single task, or a source data set (P3)."""
    max_units: int | None = None
    """Train teachers for the first so many units of a seeded order only; the rest learns from labels and logits."""
    batched: int = 16
    """Teachers trained together over one frozen backbone in one process."""
    examples: int = 8
    """Examples a teacher and step."""
    steps: int = 10_000
    """Steps of each teacher."""
    learning_rate: float = 1e-4
    """AdamW's learning rate for the teachers."""
    train_a: bool = True
    """False freezes the recorded common A and trains B alone."""
    validation_share: float = 0.1
    """Share of each unit's instances kept for the stop and for the gain."""
    min_gain: float = 0.0
    """A teacher whose validation loss falls by less than this (nats a token) is left out of the alignment."""
    patience: int = 0
    """Looks at the validation share without gain after which a teacher stops; 0: it takes all steps."""
    look_every: int = 0
    """Steps between two looks at the validation share; 0: a tenth of the steps."""
    warm_start: str | None = None
    """Parameter store or folder of PEFT adapters whose adapters of the same names teachers start from."""
    claim_timeout_s: int = 600
    """A unit whose trainer gave no sign of life for so long is taken over by another."""
    logit_teacher: str | None = None
    """Seq2seq model that reads instruction + input. Default: the study's backbone."""
    demonstrations: int = 0
    """Training examples of the task that the logit teacher reads by fusion in the decoder, each encoded on its own
    beside the input (FiD-ICL: 16); 0: instruction and input alone."""
    method: Literal["topk", "sampled"] = "topk"
    """Stored distributions: the top entries with the tail's mass, or draws from the teacher (unbiased)."""
    top_k: int = 12
    """`topk`: entries kept a target token; the tail's mass is kept beside them."""
    draws: int = 50
    """`sampled`: draws a target token; equal ones are stored once with their count."""
    temperature: float = 1.0
    """Temperature of the stored distributions."""
    store_dtype: Literal["float16", "float32"] = "float16"
    """Precision of the stored log-probabilities; float32 takes 24 bytes a token more at k = 12."""


@dataclass
class LossConfig:
    """L = label·L_pred + kl·KL + alignment·MSE (paper, section 3.4)."""

    label: float = 1.0
    """Weight of L_pred; 0 is the paper's ablation."""
    kl: float = 0.0
    """λ1. The paper's value is 5."""
    alignment: float | Literal["sigmoid"] = 0.0
    """λ2: a number, or `sigmoid` for the paper's sigmoid(stop_gradient(MSE)), taken per task."""
    alignment_form: Literal["mse", "product"] = "product"
    """`mse` on (A, B) as in the paper, or gauge-free on B·A through Gram matrices."""
    logits: Literal["store", "online"] = "store"
    """Where the teacher's distributions come from: computed beforehand, or by the teacher in every step."""
    logit_store: str | None = None
    """Folder of the logit store; default the study's own when kl > 0."""
    parameter_store: str | None = None
    """Folder of the parameter store; default the study's own when alignment is on."""
    missing: Literal["error", "label_only"] = "error"
    """What to do with examples or units that the stores lack."""


@dataclass
class OptimizerConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """Adafactor runs in the single process only (ZeRO flattens what it factors)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warmup."""
    clip: float = 1.0
    """Global gradient norm; 0 leaves gradients as they are."""


@dataclass
class EngineConfig:
    """How the steps are run."""

    strategy: Literal["single", "zero2", "zero3", "pipeline"] = "zero3"
    """`single` is the plain torch reference; the others run through DeepSpeed. `pipeline` trains the hypernetwork
    (pretrain, finetune) with its layers cut into stages; answers are generated from the converted model."""
    stages: int = 1
    """`pipeline`: consecutive stages of about equal cost, at most one a block; the processes are a multiple of them,
    and `accumulation` micro-batches are under way at once (several times the stages keep them busy)."""
    deepspeed: str | None = None
    """DeepSpeed JSON laid under what the run decides itself. Default: ds_configs/<strategy>.json."""
    nvme_path: str | None = None
    """With a JSON that offloads (ds_configs/zero3_offload.json): folder on an NVMe disk that takes what would
    otherwise lie in host memory."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights of what trains."""
    steps: int = 1000
    """Optimizer steps."""
    epochs: float | None = None
    """Epochs over the tasks in the place of `steps`: as many chunks as they have, or as `data.task_cap` leaves."""
    accumulation: int = 1
    """Micro-batches a step and rank; of LoRA teachers those of a group's step, all its teachers' examples together. The
    global batch does not depend on it."""
    activation_checkpointing: bool = False
    """Recompute the backbone's blocks in the backward pass."""
    instruction_cache: Literal["auto", "on", "off"] = "auto"
    """Finetuning: every instruction is encoded once, before the first step, and read from the run folder from then on.
    That asks for an encoder that does not train, which reads instructions without dropout; `auto` encodes in every step
    where it trains, `on` refuses."""
    peak_tflops: float | None = None
    """Dense matrix products of one processor at most, 1e12 operations a second; MFU refers to it. Default: what a plan
    takes for an H100, H200 or A100; of others no MFU is logged."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between two evaluations on the validation tasks, and looks at adapters and answers (in pretraining these
    alone); 0: at the end only."""
    best_by: Literal["loss", "exact"] = "loss"
    """Validation figure that chooses the best checkpoint: the loss, or the share of targets predicted whole. The loss
    rises with a model's confidence long before its answers get worse, but it is the finer one where few are exact."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Latest checkpoints kept beside the best."""
    timeout_s: int = 1800
    """A process that the others have waited for so long ends the run, with a message that names it; so does one that
    gives no sign of life for a minute, or for a thirtieth of this time where that is longer."""
    deterministic: bool = False
    """Kernels alone that give the same bits every time, at some cost in speed. On CUDA it takes this for an interrupted
    run to give the unbroken one's very digits, and an operation without such a kernel is an error; on CPUs nothing
    changes."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop before the optimizer's step, or leave that step out and go on; the
    examples are named in either case."""
    nonfinite_limit: int = 10
    """`skip`: so many steps left out one after the other stop the run."""


@dataclass
class EvaluationConfig:
    """Evaluation: answers generated, or where all examples have answer choices the likeliest choice."""

    methods: dict[str, str] | None = None
    """Name of a method -> what is evaluated: the folder of a converted TAGI model or of an ordinary seq2seq model
    (which reads the concatenated instruction), or `untrained` for a new hypernetwork. Default: what the study has."""
    groups: dict[str, str] | None = None
    """Name of a group of tasks -> split file (without .txt), or `p3:` and a named split of P3. Default: {"test":
    "test_tasks"}; where P3 alone is named {"mtest11": "p3:mtest11"}."""
    batch_examples: int = 64
    """Examples answered together on one rank; of tasks with answer choices, choices. A validation batch in training has
    as many, at most 64."""
    max_instances: int = 100
    """Instances a task at the most, the same for every seed. SNI: the first ones, which are those of the published
    evaluation. P3: drawn, the same under each template of a data set; the published evaluation counts all."""
    beams: int = 1
    """Beams; 1 is greedy."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which every method answers, whatever type its folder has: `auto` is bf16 on a GPU that computes in it and
    fp32 elsewhere (without TF32), and for all jobs of a run folder what it is for the first. Each process holds a whole
    copy: of 11B parameters 22 GB in bf16, 44 GB in fp32."""
    controls: list[Control] = field(default_factory=list)
    """Further rows for every method: `random`, the instruction of another task; `shuffled`, the words of its own in
    another order. They show what the instruction is worth."""
    cost_tasks: int = 1
    """Tasks of each group on which operations, seconds and memory of TAGI models are measured beside those of their
    backbone with the concatenated instruction; 0: none."""
    tokenizer: str | None = None
    """Folder of GPT-2's tokenizer, by whose pieces ROUGE-L scores the cross-lingual track (data.split xlingual)."""


@dataclass
class ConvertConfig:
    """Conversion of a checkpoint or a model."""

    to: Literal["model", "hypernetwork", "universal", "backbone", "peft", "merged", "compiled", "exported"] = "model"
    """Of a checkpoint: `model` is a self-contained folder, `hypernetwork` one that holds what trained and names its
    backbone, `universal` what any number of processes and strategy resumes from. Of a model and an instruction: `peft`
    is an adapter folder, `merged` a plain model with the adapter merged in, `compiled` a compiled task, `exported` one
    as torch.export programs. `backbone` turns published weights (pickles too) into sharded safetensors."""
    run: str | None = None
    """Of a checkpoint: run folder of a training stage. Default: the study's `finetune`."""
    checkpoint: str | None = None
    """A checkpoint folder of that run. Default: its best, for `universal` its latest."""
    model: str | None = None
    """Of a model and an instruction: a converted model, by default the study's `convert/model`. `to: backbone`: folder
    or hub id of the published weights, by default `model.backbone`."""
    instruction: str | None = None
    """The instruction's text."""
    task_file: str | None = None
    """A task in SNI's format whose definition is the instruction."""
    split_file: str | None = None
    """A split (without .txt) of data.sni_dir: one adapter for each of its tasks."""
    output: str | None = None
    """Folder (or file, for a compiled task) to write. Default: inside the run folder; for `universal` beside the
    checkpoint, where the run's next start finds it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the written weights. Default: float32 of what trained or was merged and as it lay of the rest; bfloat16
    for `to: backbone`."""
    shard_gb: float = 4.0
    """Most gigabytes (1e9 bytes) of a weight file, and of what a conversion holds in memory."""


@dataclass
class RunConfig:
    """One run of one stage."""

    study_dir: str = "runs/quickstart"
    """Folder of the whole study: each stage's run folder lies in it and finds its predecessors there."""
    output_dir: str | None = None
    """Run folder. Default: <study_dir>/<stage>."""
    seed: int = 0
    """Seed of initialisation, order and choice."""
    scale: float = 1.0
    """Multiplies every number of steps; 0.02 makes a smoke run of a recipe."""
    profile: bool = False
    """Record a few steps (or batches) of rank 0 into the run folder's `profile/`: a trace and its ten largest costs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teachers: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
