"""Exact match and ROUGE-L by the rules of Super-NaturalInstructions' published evaluation, and their averages.

An example's score is that of its best reference, between 0 and 1; averages are percentages over examples.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

METRICS = ("exact_match", "rouge_l")
"""Names of the scores, as results files have them."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


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


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of stemmed words, for the best reference; 0 to 1.

    Words are runs of a-z and 0-9: texts in other scripts score 0, as in the published evaluation.

    Raises:
        ValueError: there is no reference.
    """
    _require(references)
    return max(_rouge_l(prediction, reference) for reference in references)


def score_tasks(answers: Iterable[tuple[str, str, Sequence[str]]]) -> dict[str, dict[str, Any]]:
    """Averages a task from (task, prediction, references).

    Returns:
        Task name -> {"exact_match": %, "rouge_l": %, "examples": n}, in the order of first occurrence.
    """
    scores: dict[str, list[tuple[float, float]]] = {}
    for task, prediction, references in answers:
        pair = (exact_match(prediction, references), rouge_l(prediction, references))
        scores.setdefault(task, []).append(pair)
    return {
        task: {
            "exact_match": 100 * sum(match for match, _ in pairs) / len(pairs),
            "rouge_l": 100 * sum(rouge for _, rouge in pairs) / len(pairs),
            "examples": len(pairs),
        }
        for task, pairs in scores.items()
    }


def average(per_task: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Averages over all examples of several tasks' scores: {"exact_match": %, "rouge_l": %}.

    Raises:
        ValueError: there is no task.
    """
    if not per_task:
        raise ValueError("no task to average over")
    examples = sum(task["examples"] for task in per_task.values())
    return {name: sum(task[name] * task["examples"] for task in per_task.values()) / examples for name in METRICS}


def bootstrap_interval(
    per_task: Mapping[str, Mapping[str, Any]], metric: str, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of :func:`average` when tasks, not examples, are drawn anew (percentile bootstrap).

    Examples of one task rise and fall together, so tasks are the unit of chance. Deterministic from `seed`.
    """
    scores = np.array([task[metric] for task in per_task.values()])
    weights = np.array([task["examples"] for task in per_task.values()], dtype=float)
    drawn = np.random.default_rng(seed).integers(len(scores), size=(resamples, len(scores)))
    means = (scores * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


@functools.lru_cache(maxsize=100_000)  # tiny answers repeat a great deal, and stemming is slow
def _rouge_l(prediction: str, reference: str) -> float:
    return float(_scorer().score(target=reference, prediction=prediction)["rougeL"].fmeasure)


def _require(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError("references must be a sequence of at least one text")
