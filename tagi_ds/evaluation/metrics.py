"""Exact match and ROUGE-L by the rules of Super-NaturalInstructions' published evaluation, and their averages.

An example's score is that of its best reference, between 0 and 1; averages are percentages over examples.
Source: allenai/natural-instructions, eval/automatic/evaluation.py, which rounds its figures to four decimals.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tagi_ds.errors import UserError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

METRICS = ("exact_match", "rouge_l")
"""Names of the scores, as results files have them."""
XLINGUAL = "xlingual"
"""The split folder of the cross-lingual track."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SubwordTokens:
    """What ROUGE-L compares on the cross-lingual track: a tokenizer's pieces without their mark of a space before.

    The published figures are those of GPT-2's byte-level tokenizer. Pieces are neither lower-cased nor stemmed.

    Args:
        folder: of a byte-level tokenizer.

    Raises:
        UserError: there is none.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=Path(folder).is_dir())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no tokenizer: {error}", "name the folder of GPT-2's tokenizer") from error

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text."""
        return [piece.lstrip("Ġ") for piece in self._tokenizer.tokenize(text)]


def scored_tokens(split: str, tokenizer: str | None) -> SubwordTokens | None:
    """What ROUGE-L compares on a track: None for stemmed English words.

    Args:
        split: the folder under ``splits/``.
        tokenizer: folder of the tokenizer of the cross-lingual track.

    Raises:
        UserError: the cross-lingual track without a tokenizer.
    """
    if split != XLINGUAL:
        return None
    if tokenizer is None:
        raise UserError(
            "the cross-lingual track is scored by the pieces of GPT-2's tokenizer, and none is named",
            "give its folder: --evaluation.tokenizer FOLDER (the hub's gpt2 has it)",
        )
    return SubwordTokens(tokenizer)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, white space collapsed: what exact match compares."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after :func:`normalise`, else 0.

    Raises:
        ValueError: there is no reference.
    """
    _require(references)
    answer = normalise(prediction)
    return float(any(answer == normalise(reference) for reference in references))


def rouge_l(prediction: str, references: Sequence[str], tokens: SubwordTokens | None = None) -> float:
    """F-measure of the longest common subsequence of words, for the best reference; 0 to 1.

    Args:
        prediction: the answer; an empty one scores 0.
        references: acceptable answers.
        tokens: of the cross-lingual track. Without it words are stemmed runs of a-z and 0-9: texts in other scripts
            score 0, as in the published evaluation.

    Raises:
        ValueError: there is no reference.
    """
    _require(references)
    return max(_rouge_l(prediction, reference, tokens) for reference in references)


def score_tasks(
    answers: Iterable[tuple[str, str, Sequence[str]]], tokens: SubwordTokens | None = None
) -> dict[str, dict[str, Any]]:
    """Averages a task from (task, prediction, references); `tokens` as in :func:`rouge_l`.

    Returns:
        Task name -> {"exact_match": %, "rouge_l": %, "examples": n}, in the order of first occurrence.
    """
    scores: dict[str, list[tuple[float, float]]] = {}
    for task, prediction, references in answers:
        pair = (exact_match(prediction, references), rouge_l(prediction, references, tokens))
        scores.setdefault(task, []).append(pair)
    return {
        task: {
            "exact_match": 100 * sum(match for match, _ in pairs) / len(pairs),
            "rouge_l": 100 * sum(rouge for _, rouge in pairs) / len(pairs),
            "examples": len(pairs),
        }
        for task, pairs in scores.items()
    }


def average(per_task: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Averages over all examples of several tasks' scores: {metric: %}.

    Raises:
        ValueError: there is no task.
    """
    if not per_task:
        raise ValueError("no task to average over")
    examples = sum(task["examples"] for task in per_task.values())
    return {name: sum(task[name] * task["examples"] for task in per_task.values()) / examples for name in metrics}


def average_categories(
    per_task: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, Any]]:
    """Averages over the examples of each category, by the categories' names.

    Args:
        per_task: scores that carry their task's "category".
        metrics: names of the scores.

    Returns:
        Category -> {metric: %, "tasks": n, "examples": n}.
    """
    categories: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, scores in per_task.items():
        categories.setdefault(scores["category"], {})[name] = scores
    return {
        category: {
            **average(members, metrics),
            "tasks": len(members),
            "examples": sum(scores["examples"] for scores in members.values()),
        }
        for category, members in sorted(categories.items())
    }


@functools.cache
def _scorer(tokens: SubwordTokens | None) -> RougeScorer:
    # Imported where it scores: it brings nltk and scikit-learn, a second for whatever only names this module.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True) if tokens is None else RougeScorer(["rougeL"], tokenizer=tokens)


@functools.lru_cache(maxsize=100_000)  # tiny answers repeat a great deal, and stemming is slow
def _rouge_l(prediction: str, reference: str, tokens: SubwordTokens | None) -> float:
    return float(_scorer(tokens).score(target=reference, prediction=prediction)["rougeL"].fmeasure)


def _require(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError("references must be a sequence of at least one text")
