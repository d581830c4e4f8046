"""The README.md of a converted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tagi_ds.config import RunConfig
from tagi_ds.files import read_json, read_json_lines

RUN_FILE = "run.yaml"
"""The training run's configuration, beside the weights; a recipe by itself."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        config, stage: of the training run.
        saved: the checkpoint's `state.json`.
        run_dir: the run's folder.
        identity: content hash of the new folder's weights, under which evaluations know the model.
        with_backbone: whether the backbone's weights are in the folder.
    """

    config: RunConfig
    stage: str
    saved: dict[str, Any]
    run_dir: Path
    identity: str
    with_backbone: bool = True

    @property
    def hypernetwork(self) -> bool:
        """Whether the model is TAGI, not an ordinary seq2seq model."""
        return self.stage in ("pretrain", "finetune")


def model_card(facts: CardFacts, folder: Path) -> str:
    """What the model is, what it was trained on, its figures and the command, and how to use it.

    Args:
        facts: of the run.
        folder: where the model is going to lie.
    """
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---"]
    title = "TAGI: adapters from instructions" if facts.hypernetwork else "Seq2seq model"
    lines += [f"# {title} ({facts.stage})", ""]
    if facts.hypernetwork:
        backbone = "the frozen backbone" if facts.config.model.also_train == "nothing" else "its backbone"
        held = "both" if facts.with_backbone else "what was trained and names the backbone"
        lines += [
            f"A hypernetwork reads an instruction once and generates a LoRA adapter for {backbone}, "
            f"which then answers bare inputs. The folder holds {held}.",
            "",
        ]
    lines += _table(_training(facts))
    lines += ["", "## Figures", "", *_figures(facts)]
    lines += ["", "## The command", "", *_command(facts)]
    lines += ["", "## Use", "", *(_use_tagi(folder) if facts.hypernetwork else _use_seq2seq()), ""]
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _training(facts: CardFacts) -> dict[str, str]:
    config, stage, state = facts.config, facts.stage, facts.saved["run"]
    data, model = config.data, config.model
    read = [data.c4_dir] if stage == "pretrain" else [data.sni_dir, data.p3_dir]
    rows = {
        "data": ", ".join(f"`{corpus}`" for corpus in read if corpus) or "the embedded benchmark",
        "steps": f"{state['step']} of {state['total_steps']}",
        "global batch": f"{data.tasks_per_batch * data.examples_per_task} examples",
        "learning rate": f"{config.optimizer.learning_rate:g} ({config.optimizer.name}, {config.optimizer.schedule})",
        "precision": f"{config.engine.precision}, {config.engine.strategy}",
        "seed": str(config.seed),
    }
    if stage == "meta_train":
        lora = f"a LoRA of rank {model.rank}, alpha {model.alpha:g} on {', '.join(model.sites)}, merged"
        rows["trained"] = lora if model.meta_lora else "the whole model"
    if stage != "pretrain":
        rows["split"] = f"{data.split}/{data.train_split}"
        rows["prompt"] = f"{data.prompt}, {data.positives} positive examples"
    if facts.hypernetwork:
        rows["backbone"] = f"`{model.backbone or 'trained by the study'}`"
        rows["backbone's weights"] = f"`{state['extra'].get('backbone_hash')}`"
        rows["adapters"] = f"rank {model.rank}, alpha {model.alpha:g}, sites {', '.join(model.sites) or 'none'}"
        rows["method"] = model.method
        rows["backbone parameters trained too"] = model.also_train
    return rows


def _figures(facts: CardFacts) -> list[str]:
    """The run's own figures at the checkpoint and, where this very model was evaluated, its scores."""
    state = facts.saved["run"]
    rows = {name: f"{value:.4g}" for name, value in _logged(facts.run_dir, state["step"]).items()}
    if state.get("best"):
        rows["best"] = f"{state['best']['value']:.4g} at step {int(state['best']['step'])}"
    lines = _table(rows) if rows else ["No step of this checkpoint was logged."]
    for split, metrics in _evaluated(Path(facts.config.study_dir), facts.identity):
        scores = {
            f"{group}, {name}": f"{value:.1f}" for group, found in metrics.items() for name, value in found.items()
        }
        lines += ["", f"On {split}, in percent:", "", *_table(scores)]
    return lines


def _logged(run_dir: Path, step: int) -> dict[str, float]:
    """Losses and validation figures of the last logged lines up to a step."""
    found: dict[str, float] = {}
    for row in read_json_lines(run_dir / "metrics.jsonl"):
        if row["step"] <= step:
            found.update({name: v for name, v in row.items() if name.startswith(("loss/", "validation/"))})
    return found


def _evaluated(study_dir: Path, identity: str) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """(split, scores by group) of the study's evaluations of the model with these weights."""
    found = []
    for path in sorted((study_dir / "evaluate").glob("*/results.json")):
        results = read_json(path)
        if results.get("model") == identity and results.get("instruction", "own") == "own":
            numbers = {
                group: {name: value for name, value in scores.items() if isinstance(value, (int, float))}
                for group, scores in results["metrics"].items()
            }
            found.append((results["split"], numbers))
    return found


def _command(facts: CardFacts) -> list[str]:
    launcher = f"launchers/{facts.stage}.py --config {RUN_FILE}"
    return [
        f"The run's resolved configuration is `{RUN_FILE}`, with versions and git revision; it is a recipe by itself:",
        "",
        "```bash",
        f"deepspeed --num_accelerators {facts.saved['world_size']} {launcher}",
        "```",
    ]


def _use_tagi(folder: Path) -> list[str]:
    return [
        "```",
        f'python launchers/answer.py --model {folder} --instruction "WHAT TO DO" --input "A BARE INPUT"',
        "```",
        "",
        "In Python: `tagi_ds.convert.model_folder.load_model_folder(FOLDER)` reads texts in the wording of the "
        "training (`tagi_prompt.json`); after `import tagi_ds.model`, transformers' "
        "`AutoModelForSeq2SeqLM.from_pretrained(FOLDER)` is the bare model.",
    ]


def _use_seq2seq() -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")',
        "```",
    ]
