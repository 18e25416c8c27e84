# SPDX-License-Identifier: Apache-2.0
"""How often a model gives wrong answers as if they were right, and what fine-tuning changed about it."""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from scipy.stats import binomtest

from .answer_outcome import AnswerJudge
from .intervals import balance_interval, mean_interval


class SlickCategory(StrEnum):
    """How well a model knows a fact (SLiCK, arXiv 2405.05904). "Known" means the first three."""

    HIGHLY_KNOWN = "HighlyKnown"
    MAYBE_KNOWN = "MaybeKnown"
    WEAKLY_KNOWN = "WeaklyKnown"
    UNKNOWN = "Unknown"


RATES = {"hallucination_rate": "hallucinated", "accuracy": "correct", "abstention_rate": "abstained"}
"""The rate of each outcome."""
# Names of columns in an example
_SINGULAR = {"predictions": "prediction", "baseline_predictions": "baseline_prediction", "questions": "question"}
_SINGULAR |= {"references": "references", "categories": "category", "relations": "relation"}


def score_hallucinations(
    predictions: Iterable[str],
    references: Iterable[str | Sequence[str]],
    *,
    baseline_predictions: Iterable[str] | None = None,
    categories: Iterable[str] | None = None,
    relations: Iterable[str] | None = None,
    questions: Iterable[str] | None = None,
    detailed: bool = False,
    **answer_rules,
) -> dict:
    """
    Scores answers to questions of fact by the rates of arXiv 2604.15574. Each is correct, abstained or hallucinated.

    Args:
        predictions (`Iterable[str]`): The model's answers.
        references (`Iterable`): For each prediction the accepted answer, or a list of it and its aliases.
        baseline_predictions (`Iterable[str]`, *optional*): The answers to the same questions before fine-tuning.
        categories (`Iterable[str]`, *optional*): The SLiCK category of each fact.
        relations (`Iterable[str]`, *optional*): Another grouping of the facts, for example by relation.
        questions (`Iterable[str]`, *optional*): The questions, for the examples of `detailed`.
        detailed (`bool`, *optional*, defaults to `False`): Whether to add `tables` and `examples`.
        answer_rules: Options of [`~trl_selfdistill.hallucination.answer_outcome.AnswerJudge`].

    Returns:
        `dict`: Fractions in [0, 1], each with the ends of its 95 % interval over facts under `<name>_ci_low` and
        `<name>_ci_high` (`mean_interval`, in [-1, 1] `balance_interval`, of hallucination/intervals.py); `None` for no
        facts, and for the interval of one F1.

        - `hallucination_rate`, `accuracy`, `abstention_rate` (they add up to 1), `f1`, `num_predictions`.
        - `omniscience_index`, correct minus hallucinated, in [-1, 1] (AA-Omniscience, arXiv 2511.13029);
          `correct_given_attempted`, of the answers that are no abstentions the share that is correct, and `f_score`,
          the harmonic mean of it and the accuracy, without an interval (SimpleQA, arXiv 2411.04368).
        - With a baseline: `baseline_accuracy`; of the facts that were right before, `forgetting_rate`, the share that
          is not right now, and `induced_hallucination_rate`, the share that is hallucinated now; of the others,
          `acquisition_rate`, the share that is right now; `net_change` of the accuracy, in [-1, 1]; and
          `mcnemar_p_value`, two-sided and exact.
        - With categories: `factual_stability`, the accuracy on HighlyKnown, and `factual_plasticity`, on Unknown.
        - With categories or relations: `category/<name>/<rate>` and `relation/<name>/<rate>`, without intervals.
        - With `detailed`: `tables`, the same with intervals by `"category"` or `"relation"` and group; and `examples`,
          a dict for each prediction.

    Raises:
        `TypeError`: If a column is not a list or has a row that is not text.
        `ValueError`: If a column is empty or of another length, or no prediction could match a reference.

    ```python
    >>> scores = score_hallucinations(["Paris", "Bonn", "I don't know"], ["Paris", ["Berlin"], "Rome"])
    >>> {name: round(scores[name], 2) for name in ("accuracy", "hallucination_rate", "hallucination_rate_ci_high")}
    {'accuracy': 0.33, 'hallucination_rate': 0.33, 'hallucination_rate_ci_high': 1.0}
    ```
    """
    columns = {"predictions": predictions, "baseline_predictions": baseline_predictions, "questions": questions}
    columns |= {"categories": categories, "relations": relations}
    columns = {name: check_texts(values, name) for name, values in columns.items() if values is not None}
    columns["references"] = check_references(references)
    num_rows = len(columns["predictions"])
    for name, rows in columns.items():
        if len(rows) != num_rows:
            raise ValueError(f"`{name}` has {len(rows)} rows and `predictions` {num_rows}; they must be as many")
    if others := {*columns.get("categories", [])} - {*SlickCategory}:
        names = ", ".join(SlickCategory)
        raise ValueError(f"`categories` has {min(others)!r}; use {names}, and `relations` for other groups")
    judge, references = AnswerJudge(**answer_rules), columns["references"]
    for i, aliases in enumerate(references):
        if not any(map(judge.normalize, aliases)):
            raise ValueError(f"`references[{i}]` is {aliases!r}, of which normalizing leaves nothing; add an alias")
    judged = {"outcome": (judge.outcome, "predictions"), "f1": (judge.f1, "predictions")}
    if baseline_predictions is not None:
        judged["baseline_outcome"] = judge.outcome, "baseline_predictions"
    answers = {name: np.array([*map(judged_by, columns[of], references)]) for name, (judged_by, of) in judged.items()}
    result = _rates(answers)
    if categories is not None:
        labels, right = np.array(columns["categories"]), answers["outcome"] == "correct"
        known, unknown = (right[labels == name] for name in (SlickCategory.HIGHLY_KNOWN, SlickCategory.UNKNOWN))
        result |= _flat({"factual_stability": _mean(known), "factual_plasticity": _mean(unknown)})
    tables: dict[str, dict[str, dict]] = {}
    for name in [name for name in ("categories", "relations") if name in columns]:
        column, labels = _SINGULAR[name], np.array(columns[name], dtype=object)  # NumPy's strings end before a NUL
        tables[column] = {}
        for group in np.unique(labels).tolist():
            rates = tables[column][group] = _rates({key: values[labels == group] for key, values in answers.items()})
            result |= {f"{column}/{group}/{key}": value for key, value in rates.items() if "_ci_" not in key}
    if detailed:
        result["tables"] = tables
        examples = {_SINGULAR[name]: column for name, column in columns.items()}
        examples |= {name: values.tolist() for name, values in answers.items()}
        result["examples"] = [dict(zip(examples, row, strict=True)) for row in zip(*examples.values(), strict=True)]
    return result


def check_texts(values: Iterable[str], name: str) -> list[str]:
    """Returns the column `values` as a list of strings. Errors name the argument `name` and the row."""
    rows = _rows(values, name)
    for i, value in enumerate(rows):
        if not isinstance(value, str):
            raise TypeError(f"`{name}[{i}]` is {reprlib.repr(value)}; it must be a string")
    return rows


def check_references(values: Iterable[str | Iterable[str]]) -> list[list[str]]:
    """Returns `values` as a list of lists of accepted answers. A row may be a string or a list of aliases."""
    rows = [[value] if isinstance(value, str) else value for value in _rows(values, "references")]
    return [check_texts(row, f"references[{i}]") for i, row in enumerate(rows)]


def _rows(values: Any, name: str) -> list:
    is_table = isinstance(values, Mapping) or hasattr(values, "columns")  # iterating gives the names of its columns
    if isinstance(values, str | bytes) or is_table or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` is a {type(values).__name__}; it must be a list of strings")
    rows = list(values)
    if not rows:
        raise ValueError(f"`{name}` is empty; there is nothing to score")
    return rows


def _rates(answers: dict[str, np.ndarray]) -> dict[str, float | None]:
    right, wrong = answers["outcome"] == "correct", answers["outcome"] == "hallucinated"
    rates = {name: _mean(answers["outcome"] == outcome) for name, outcome in RATES.items()}
    rates["f1"] = _mean(answers["f1"])
    rates["correct_given_attempted"] = _mean(right[right | wrong])
    rates["omniscience_index"] = balance_interval(int(right.sum()), int(wrong.sum()), len(right))
    result: dict[str, float | None] = {"num_predictions": len(right)}
    result["f_score"] = 2 * float(right.sum()) / float(len(right) + right.sum() + wrong.sum())
    if "baseline_outcome" in answers:
        before = answers["baseline_outcome"] == "correct"
        rates["baseline_accuracy"] = _mean(before)
        rates["forgetting_rate"] = _mean(~right[before])
        rates["induced_hallucination_rate"] = _mean(wrong[before])
        rates["acquisition_rate"] = _mean(right[~before])
        changed = right[before != right]
        gained = int(changed.sum())
        rates["net_change"] = balance_interval(gained, len(changed) - gained, len(right))
        # McNemar's exact test (1947): the facts that changed sides against a fair coin
        result["mcnemar_p_value"] = float(binomtest(gained, len(changed)).pvalue) if len(changed) else 1.0
    return result | _flat(rates)


def _mean(values: np.ndarray) -> tuple[float | None, ...]:
    numbers = np.clip(mean_interval(values), 0.0, 1.0).tolist() if len(values) else [np.nan] * 3
    return tuple(None if np.isnan(number) else number for number in numbers)


def _flat(intervals: dict[str, tuple]) -> dict[str, float | None]:
    ends = ("", "_ci_low", "_ci_high")
    return {f"{name}{end}": number for name, row in intervals.items() for end, number in zip(ends, row, strict=True)}
