"""What training and answering cost, in floating-point operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from tagi_ds.config import RunConfig
from tagi_ds.data.program_tasks import VOCABULARY
from tagi_ds.errors import UserError
from tagi_ds.experiments.nodes import BENCHMARK, Node, Plan
from tagi_ds.plan.operations import count_operations
from tagi_ds.plan.shapes import Shapes, count_model
from tagi_ds.plan.workload import Workload

INPUTS_A_TASK = 100
"""Inputs answered under one instruction, as in the paper's comparison."""

Lengths = tuple[int, int, int]
"""Tokens of the instruction, an input, a target."""


def training_flops(plan: Plan, names: Iterable[str]) -> float:
    """Operations of some nodes that are done, as they were counted while they ran."""
    return sum(float(plan.nodes[name].summary().get("flops", 0.0)) for name in names)


def late_arguments(node: Node, plan: Plan) -> list[str]:
    """Arguments that only the outcome of other nodes decides: the steps of a run that is given others' compute.

    Raises:
        UserError: no trained model of the same shape tells what a step costs.
    """
    if not node.price_of:
        return []
    total = training_flops(plan, node.price_of)
    backbone = next((plan.nodes[name] for name in node.needs if plan.nodes[name].stage == "backbone"), None)
    if backbone is None or node.config is None:
        raise UserError(f"{node.name} has no backbone whose steps tell what its own cost", "give engine.steps instead")
    summary = backbone.summary()
    # The step is the backbone's: same model, same batches of concatenated instructions.
    if node.config.model.initial != "scratch":
        total -= float(summary["flops"])
    steps = max(1, round(total / (float(summary["flops"]) / summary["steps"])))
    engine = node.config.engine
    # The number is not to be scaled again, so the other numbers of steps are handed on as they were resolved.
    resolved = [f"--engine.{name}={getattr(engine, name)}" for name in ("evaluate_every", "checkpoint_every")]
    return [f"--engine.steps={steps}", "--scale=1", *resolved]


def shape_config(node: Node, plan: Plan) -> RunConfig:
    """A node's configuration with which its model can be counted, whether its backbone is there yet or not."""
    config = node.config
    assert config is not None
    named = config.model.backbone
    own = [other for other in plan.nodes.values() if other.stage == "backbone" and str(other.model) == named]
    if named is not None and not own:
        return config
    if own and own[0].done:
        return config
    scratch = config.scratch
    if any(other.stage == BENCHMARK for other in plan.nodes.values()):
        scratch = dataclasses.replace(scratch, vocabulary=VOCABULARY)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=None), scratch=scratch)


def step_flops(config: RunConfig, stage: str, lengths: Lengths) -> float:
    """Operations of one training step of a stage at the given lengths.

    Args:
        config: resolved.
        stage: backbone, meta_train, pretrain or finetune.
        lengths: of tasks; pretraining takes a third of its documents for each.
    """
    data = config.data
    examples = data.tasks_per_batch * (1 if stage == "pretrain" else data.examples_per_task)
    instruction, source, target = lengths
    if stage == "pretrain":
        instruction = source = target = max(1, data.document_tokens // 3)
    if stage in ("backbone", "meta_train"):
        tasks, instruction, source = 0, 0, instruction + source
    else:
        tasks = data.tasks_per_batch
    cached = stage == "finetune" and config.engine.instruction_cache != "off"
    work = Workload(
        examples, tasks, instruction, source, target, False, config.engine.precision,
        instruction_cache=cached, sharded=config.engine.strategy == "zero3",
    )  # fmt: skip
    return count_operations(count_model(config, stage), work).total.useful


def answering_flops(shapes: Shapes, lengths: Lengths, inputs: int = INPUTS_A_TASK) -> float:
    """Operations of answering `inputs` inputs under one instruction, which a concatenating model reads every time.

    A generated adapter is merged into the weights where that is less work, as answering does
    (:mod:`tagi_ds.model.merging`).

    Args:
        shapes: of the model; one without a hypernetwork concatenates.
        lengths: of the instruction, an input and an answer; the decoder's tokens cost the same one by one.
        inputs: under the instruction.
    """
    instruction, source, target = lengths
    if shapes.bottleneck == 0:
        work = Workload(inputs, 0, 0, instruction + source, target, False, "fp32")
        return count_operations(shapes, work).total.forward
    work = Workload(inputs, 1, instruction, source, target, False, "fp32")
    adapted = count_operations(shapes, work)
    bare = dataclasses.replace(shapes, blocks=tuple(dataclasses.replace(block, sites=()) for block in shapes.blocks))
    saved = sum(cost.forward for cost in adapted.blocks.values())
    saved -= sum(cost.forward for cost in count_operations(bare, work).blocks.values())
    merging = 2.0 * shapes.rank * sum(site.d_in * site.d_out for block in shapes.blocks for site in block.sites)
    return adapted.total.forward - max(saved - merging, 0.0)


def relative_inference(
    config: RunConfig, hypernetwork: bool, lengths: Mapping[str, Lengths], inputs: int = INPUTS_A_TASK
) -> dict[str, float]:
    """Operations of answering, relative to the same backbone with the instruction concatenated to every input.

    Args:
        config: resolved, of the method's finetuning or meta-training.
        hypernetwork: whether the model has one.
        lengths: name -> lengths.
        inputs: under one instruction.
    """
    if not hypernetwork:
        return dict.fromkeys(lengths, 1.0)
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, meta_lora=False))
    concatenating = count_model(plain, "meta_train")
    own = count_model(config, "finetune")
    return {
        name: answering_flops(own, at, inputs) / answering_flops(concatenating, at, inputs)
        for name, at in lengths.items()
    }
