# SPDX-License-Identifier: Apache-2.0
"""How often a model gives wrong answers as if they were right, and what fine-tuning changed about it.

The plain function behind the metric in `evaluate_metrics/hallucination`: numpy alone, neither torch nor `evaluate`.
The rates before and after fine-tuning are those of arXiv 2604.15574.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from .answer_outcome import AnswerJudge
from .bootstrap import mcnemar_exact, mean_interval
from .inputs import check_categories, check_count, check_references, check_texts


# The rate that each outcome gives
RATES = {"hallucination_rate": "hallucinated", "accuracy": "correct", "abstention_rate": "abstained"}


class _Answers(NamedTuple):
    """How each prediction was judged: one array of shape `(num_predictions,)` for each column."""

    outcomes: np.ndarray  # of `answer_outcome.OUTCOMES`
    f1: np.ndarray
    outcomes_before: np.ndarray | None  # of the baseline

    def select(self, index: np.ndarray) -> "_Answers":
        return _Answers(*(column if column is None else column[index] for column in self))


def score_hallucinations(
    predictions: Iterable[str],
    references: Iterable[str | Sequence[str]],
    *,
    baseline_predictions: Iterable[str] | None = None,
    categories: Iterable[str] | None = None,
    relations: Iterable[str] | None = None,
    questions: Iterable[str] | None = None,
    match: Literal["exact", "contains"] = "exact",
    fold_width: bool = True,
    strip_accents: bool = False,
    exact_numbers: bool = False,
    abstention_patterns: Iterable[str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    detailed: bool = False,
) -> dict:
    """
    Scores answers to questions of fact. Each is correct, abstained or hallucinated
    ([`~trl_selfdistill.hallucination.answer_outcome.AnswerJudge`]).

    Args:
        predictions (`Iterable[str]`):
            The model's answers.
        references (`Iterable`):
            For each the accepted answer, or a list of it and its aliases.
        baseline_predictions (`Iterable[str]`, *optional*):
            What the model answered to the same questions before fine-tuning.
        categories (`Iterable[str]`, *optional*):
            SLiCK category of each fact: HighlyKnown, MaybeKnown, WeaklyKnown or Unknown.
        relations (`Iterable[str]`, *optional*):
            Another group of each fact, for example its relation.
        questions (`Iterable[str]`, *optional*):
            The questions; they are shown with `detailed`.
        match, fold_width, strip_accents, exact_numbers, abstention_patterns:
            See [`~trl_selfdistill.hallucination.answer_outcome.AnswerJudge`].
        resamples (`int`, *optional*, defaults to `10_000`):
            Bootstrap resamples; 0 for no intervals.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        detailed (`bool`, *optional*, defaults to `False`):
            Whether to add `tables` and `examples`.

    Returns:
        `dict`: Fractions in [0, 1], each with the ends of its 95 % bootstrap interval under `<name>_ci_low` and
        `<name>_ci_high`. A share of no facts is `None`.

        - `hallucination_rate`, `accuracy`, `abstention_rate` (they add up to 1), `f1`, `num_predictions`.
        - With a baseline: `baseline_accuracy`; `forgetting_rate` and `induced_hallucination_rate`, the shares of those
          right before that are not right, and hallucinated, now; `acquisition_rate`, the share of those not right
          before that are right now; `net_change` of the accuracy, in [-1, 1]; `mcnemar_p_value`.
        - With categories: `factual_stability`, the accuracy on HighlyKnown, and `factual_plasticity`, on Unknown.
        - With categories or relations: `category/<name>/<rate>` and `relation/<name>/<rate>`, without intervals.
        - With `detailed`: `tables`, the same with intervals by `"category"`, `"relation"` and group; and `examples`,
          a dict for each prediction.

    Raises:
        `TypeError`, `ValueError`: If a column is empty, too long or short, or has a row that is not text.

    ```python
    >>> scores = score_hallucinations(["Paris", "Bonn", "I don't know"], ["Paris", ["Berlin"], "Rome"], resamples=0)
    >>> {name: round(value, 2) for name, value in scores.items()}
    {'hallucination_rate': 0.33, 'accuracy': 0.33, 'abstention_rate': 0.33, 'f1': 0.33, 'num_predictions': 3}
    ```
    """
    judge = AnswerJudge(
        match=match,
        fold_width=fold_width,
        strip_accents=strip_accents,
        exact_numbers=exact_numbers,
        abstention_patterns=abstention_patterns,
    )
    intervals = {"resamples": check_count(resamples, "resamples"), "seed": check_count(seed, "seed")}
    predictions = check_texts(predictions, "predictions")
    num_rows = len(predictions)
    references = check_references(references, num_rows)
    _check_matchable(judge, references)
    optional = {"baseline_predictions": baseline_predictions, "relations": relations, "questions": questions}
    columns = {n: check_texts(v, n, num_rows) for n, v in optional.items() if v is not None}
    if categories is not None:
        columns["categories"] = check_categories(categories, num_rows)

    answers = _judge(judge, predictions, references, columns.get("baseline_predictions"))
    result = _rates(answers, **intervals)
    groups = {"category": columns.get("categories"), "relation": columns.get("relations")}
    groups = {column: labels for column, labels in groups.items() if labels is not None}
    if "category" in groups:
        for name, category in (("factual_stability", "HighlyKnown"), ("factual_plasticity", "Unknown")):
            asked = np.array([value == category for value in groups["category"]])
            result |= _with_interval(name, (answers.outcomes == "correct")[asked], **intervals)
    shown = intervals if detailed else {"resamples": 0, "seed": 0}
    tables = {column: _by_group(answers, labels, **shown) for column, labels in groups.items()}
    for column, table in tables.items():
        for group, rates in table.items():
            named = {f"{column}/{group}/{n}": v for n, v in rates.items() if not n.endswith(("_ci_low", "_ci_high"))}
            result |= named
    if detailed:
        result["tables"] = tables
        result["examples"] = _examples(answers, predictions, references, columns)
    return result


def _check_matchable(judge: AnswerJudge, references: list[list[str]]) -> None:
    for i, aliases in enumerate(references):
        if not any(judge.normalize(alias) for alias in aliases):
            raise ValueError(
                f"`references[{i}]` is {aliases!r}, of which nothing is left after normalising (lower case, no "
                "punctuation), so that no prediction could match it. Drop the row, or give another alias."
            )


def _judge(judge: AnswerJudge, predictions, references, before: list[str] | None) -> _Answers:
    return _Answers(
        np.array([judge.outcome(*pair) for pair in zip(predictions, references, strict=True)]),
        np.array([judge.f1(*pair) for pair in zip(predictions, references, strict=True)]),
        None if before is None else np.array([judge.outcome(*pair) for pair in zip(before, references, strict=True)]),
    )


def _rates(answers: _Answers, resamples: int, seed: int) -> dict:
    right = answers.outcomes == "correct"
    means = {name: answers.outcomes == outcome for name, outcome in RATES.items()}
    means["f1"] = answers.f1
    counts = {"num_predictions": len(right)}
    if answers.outcomes_before is not None:
        before = answers.outcomes_before == "correct"
        means["baseline_accuracy"] = before
        means["forgetting_rate"] = ~right[before]
        means["induced_hallucination_rate"] = (answers.outcomes == "hallucinated")[before]
        means["acquisition_rate"] = right[~before]
        means["net_change"] = right.astype(int) - before
        counts["mcnemar_p_value"] = mcnemar_exact(int((before & ~right).sum()), int((right & ~before).sum()))
    result = {}
    for name, values in means.items():
        result |= _with_interval(name, values, resamples, seed)
    return result | counts


def _with_interval(name: str, values: np.ndarray, resamples: int, seed: int) -> dict:
    """The mean of `values` under `name`, and the ends of its interval; `None` where there are no values."""
    ends = (f"{name}_ci_low", f"{name}_ci_high") if resamples else ()
    if not len(values):
        return dict.fromkeys((name, *ends))
    if not resamples:
        return {name: float(np.mean(values))}
    return dict(zip((name, *ends), mean_interval(values, resamples, seed), strict=True))


def _by_group(answers: _Answers, labels: list[str], resamples: int, seed: int) -> dict[str, dict]:
    rows = defaultdict(list)
    for i, label in enumerate(labels):
        rows[label].append(i)
    return {label: _rates(answers.select(np.array(rows[label])), resamples, seed) for label in sorted(rows)}


def _examples(answers: _Answers, predictions, references, columns: dict[str, list[str]]) -> list[dict]:
    table = {
        "question": columns.get("questions"),
        "prediction": predictions,
        "references": references,
        "outcome": answers.outcomes.tolist(),
        "f1": answers.f1.tolist(),
        "baseline_prediction": columns.get("baseline_predictions"),
        "baseline_outcome": None if answers.outcomes_before is None else answers.outcomes_before.tolist(),
        "category": columns.get("categories"),
        "relation": columns.get("relations"),
    }
    table = {name: column for name, column in table.items() if column is not None}
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
