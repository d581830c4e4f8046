"""One rank of the head-tying test: loads a backbone with a head of its own under ZeRO-3 and prints its loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tagi_ds.config import EngineConfig, OptimizerConfig
from tagi_ds.engine import distributed
from tagi_ds.engine.strategy import make_strategy
from tagi_ds.model import TagiConfig, TagiForConditionalGeneration
from tagi_ds.model.backbone import load_backbone
from tests.plain_loss import label_loss


def main() -> None:
    torch.set_num_threads(1)
    ranks = distributed.start(60)
    strategy = make_strategy(EngineConfig(strategy="zero3", precision="fp32", steps=1), ranks)
    with strategy.model_context():
        backbone = load_backbone(Path(sys.argv[1]))
        config = TagiConfig(rank=4, bottleneck=16)
        model = TagiForConditionalGeneration.from_backbone(backbone, config, fusion_start="random")
    strategy.prepare(model, OptimizerConfig(), 1)
    batch = {name: torch.tensor(value) for name, value in json.loads(sys.argv[2]).items()}
    with torch.no_grad():
        loss = label_loss(strategy.model(**batch).logits, batch["labels"]).item()
    import deepspeed

    weights = [model.backbone.lm_head.weight, model.backbone.shared.weight]
    with deepspeed.zero.GatheredParameters(weights):
        gap = (weights[0] - weights[1]).abs().max().item()
    if ranks.is_main:
        print("RESULT", json.dumps({"loss": loss, "gap": gap}), flush=True)
    distributed.leave()


if __name__ == "__main__":
    main()
