"""The launches of one variant and seed, from data to an evaluated model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tagi_ds.config import RunConfig
from tagi_ds.errors import UserError
from tagi_ds.experiments.definition import Variant, leaves
from tagi_ds.experiments.nodes import Node
from tagi_ds.experiments.relevance import goes_to
from tagi_ds.methods import NO_FINETUNING, UNTRAINED, Approach

if TYPE_CHECKING:
    from tagi_ds.experiments.planning import Planner


class Chain:
    """The launches from data to an evaluated model for one variant and seed."""

    def __init__(
        self,
        planner: Planner,
        variant: Variant,
        approach: Approach,
        seed: int,
        tuned: Mapping[str, Any],
        price_of: tuple[str, ...] = (),
        logit_teacher: Node | None = None,
    ) -> None:
        self.planner, self.variant, self.approach, self.seed = planner, variant, approach, seed
        self.tuned, self.price_of, self.logit_teacher = tuned, price_of, logit_teacher

    def fields(self, stage: str) -> dict[str, Any]:
        """What the study, the method, the tuning and the variant set for a stage."""
        fields = leaves(self.planner.study.fields, stage) | dict(self.approach.settings)
        if stage == "finetune":
            fields |= self.approach.finetuning
        if stage == self.approach.trained_in:
            fields |= self.tuned
        return fields | leaves(self.variant.fields, stage)

    def finetuning(self) -> RunConfig:
        """The configuration of the stage `finetune`, as far as no other node decides it."""
        fields = self.fields("finetune")
        return self.planner.config("finetune", {key: v for key, v in fields.items() if goes_to(key, "finetune")}, {})

    def launch(self, stage: str, label: str = "", price_of: tuple[str, ...] = (), **wired: Any) -> Node:
        """A node of this chain; `wired` names fields with __ for the dot, each a value and the node behind it."""
        links = {key.replace("__", "."): value for key, value in wired.items() if value is not None}
        return self.planner.node(stage, label, self.seed, self.fields(stage), {**self.data(), **links}, price_of)

    def data(self) -> dict[str, tuple[Any, Node | None]]:
        """The benchmark's folders. Every launch is told of both: the default recipe's would write its own otherwise."""
        benchmark = self.planner.benchmark
        if benchmark is None:
            return {}
        corpus = str(benchmark.run_dir / "c4" / "en")
        return {"data.sni_dir": (str(benchmark.run_dir), benchmark), "data.c4_dir": (corpus, benchmark)}

    def backbone(self) -> Node | None:
        """What trains the backbone, where the recipe names none."""
        named = self.finetuning().model.backbone
        return None if named is not None else self.launch("backbone")

    def _backbone_link(self) -> tuple[str, Node] | None:
        node = self.backbone()
        return None if node is None else (str(node.model), node)

    def trained(self) -> Node:
        """The node whose run is the model."""
        if self.approach.trained_in == "meta_train":
            kind = "lora" if self.fields("meta_train").get("model.meta_lora") else "whole"
            if self.price_of and self.backbone() is None:
                raise UserError(
                    "compute_of needs a backbone that the study trains, whose steps tell what one costs",
                    "leave compute_of out, and give engine.steps",
                )
            return self.launch("meta_train", kind, self.price_of, model__backbone=self._backbone_link())
        label = str(self.fields("finetune")["model.method"])
        start = self._pretrained(label)
        loss = self.finetuning().loss
        logits = teachers = None
        backbone = self._backbone_link()
        teacher = None if self.logit_teacher is None else (str(self.logit_teacher.model), self.logit_teacher)
        if loss.kl > 0 and loss.logits == "store" and loss.logit_store is None:
            store = self.launch("store_logits", model__backbone=backbone, teachers__logit_teacher=teacher)
            logits = (str(store.run_dir / "store"), store)
        if loss.alignment and loss.parameter_store is None:
            store = self.launch("train_teachers", model__backbone=backbone)
            teachers = (str(store.run_dir / "store"), store)
        return self.launch(
            "finetune",
            label,
            model__backbone=backbone,
            model__initial=start,
            teachers__logit_teacher=teacher,
            loss__logit_store=logits,
            loss__parameter_store=teachers,
        )

    def _pretrained(self, label: str) -> tuple[str, Node] | None:
        if not self.approach.pretraining or "pretrain" in self.variant.without:
            return None
        node = self.launch("pretrain", label, model__backbone=self._backbone_link())
        return str(node.run_dir), node

    def evaluated(self) -> Node:
        """The node that evaluates the model."""
        backbone = self._backbone_link()
        if self.variant.method == UNTRAINED:
            source: tuple[Any, Node | None] = ({UNTRAINED: UNTRAINED}, None)
            return self.launch("evaluate", UNTRAINED, evaluation__methods=source, model__backbone=backbone)
        if self.variant.method == NO_FINETUNING:
            name = self.finetuning().model.backbone
            path, node = backbone if backbone is not None else (str(name), None)
            link = ({NO_FINETUNING: path}, node)
            return self.launch("evaluate", NO_FINETUNING, evaluation__methods=link, model__backbone=backbone)
        trained = self.trained()
        if trained.stage == "finetune":
            converted = self.launch("convert", trained.name.split("-")[1], convert__run=(str(trained.run_dir), trained))
        else:
            converted = trained
        label = "-".join(trained.name.split("-")[:2])
        link = ({label: str(converted.model)}, converted)
        return self.launch("evaluate", label, evaluation__methods=link, model__backbone=backbone)
