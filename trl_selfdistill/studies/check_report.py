# SPDX-License-Identifier: Apache-2.0
"""The report of a check: which of the facts that a base model HighlyKnows a model made from it has lost."""

from typing import Any

from datasets import Dataset

from ..hallucination.intervals import Interval
from ..hallucination.metric import RATES, score_hallucinations
from ..hallucination.verdict import Verdict, judge_loss
from ..hub.environment import describe_environment
from ..hub.model_card import escape_markdown
from .markdown import format_interval, markdown_table


_VERDICTS = {
    "within": "Within the tolerance of {:g}",
    "beyond": "Beyond the tolerance of {:g}",
    "undecided": "Too few facts to tell whether the loss is within the tolerance of {:g}",
}
_PAIRED = {"forgetting_rate": "right before, not now", "induced_hallucination_rate": "right before, hallucinated now"}


def compare_answers(known: Dataset, answers: list[str], tolerance: float, **about: Any) -> dict[str, Any]:
    """
    What `check.json` holds: the metric's scores with intervals, the verdict, and the facts that were lost.

    Args:
        known (`Dataset`): The facts that the base HighlyKnows, with its answers in the column `base_answer`.
        answers (`list[str]`): What the model answered.
        tolerance (`float`): The largest loss that is tolerated, a fraction in [0, 1).
        about: What it also holds: the names `base` and `model`, `num_asked` (of the base), `prompts` and `notes`.
    """
    accepted = [[answer, *aliases] for answer, aliases in zip(known["answer"], known["aliases"], strict=True)]
    columns = {"relations": known["relation"][:], "questions": known["question"][:], "detailed": True}
    scores = score_hallucinations(answers, accepted, baseline_predictions=known["base_answer"][:], **columns)
    examples, tables = scores.pop("examples"), scores.pop("tables")
    rows = [
        {"fact_id": fact_id, "relation": row["relation"], "question": row["question"], "answer": row["references"][0]}
        | {"base_answer": row["baseline_prediction"], "model_answer": row["prediction"], "outcome": row["outcome"]}
        | {"change": (row["outcome"] == "correct") - (row["baseline_outcome"] == "correct")}
        for fact_id, row in zip(known["fact_id"], examples, strict=True)
    ]
    changes = [row.pop("change") for row in rows]
    verdict = judge_loss(changes.count(-1), changes.count(1), len(changes), tolerance)
    return {
        **about,
        "num_known": len(changes),
        "tolerance": tolerance,
        "verdict": verdict.outcome,
        "summary": _summary(verdict, tolerance, len(changes), about["num_asked"]),
        "loss": verdict.loss._asdict(),
        "num_needed": verdict.num_needed,
        "scores": {name: value for name, value in scores.items() if "/" not in name},
        "base_scores": score_hallucinations(known["base_answer"][:], accepted),
        "relations": tables["relation"],
        "lost": [row for row, change in zip(rows, changes, strict=True) if change == -1],
        "environment": describe_environment(),
    }


def _summary(verdict: Verdict, tolerance: float, num_known: int, num_asked: int) -> str:
    loss = f"it lost {format_interval(verdict.loss)} of the accuracy on {num_known:,} known facts"
    text = f"{_VERDICTS[verdict.outcome].format(tolerance)}: {loss}."
    if verdict.outcome != "undecided":
        return text
    if verdict.num_needed is None:
        return f"{text} That is so near to the tolerance that a million would not tell."
    facts = round(verdict.num_needed * num_asked / num_known)
    return f"{text} About {verdict.num_needed:,} known facts would tell, or {facts:,} facts to ask the base."


def render_section(report: dict[str, Any]) -> str:
    """The verdict and the rates, as a section of Markdown for a model card."""
    base, model = (escape_markdown(report[name]) for name in ("base", "model"))

    def cell(scores: dict[str, Any], name: str) -> str:
        ends = [scores[f"{name}{end}"] for end in ("", "_ci_low", "_ci_high")]
        return format_interval(Interval(*ends)) if None not in ends else "-"

    before, after = report["base_scores"], report["scores"]
    rows = [[name.replace("_", " "), cell(before, name), cell(after, name)] for name in (*RATES, "omniscience_index")]
    rows += [[f"{name.replace('_', ' ')} ({what})", "-", cell(after, name)] for name, what in _PAIRED.items()]
    header = ["fraction of the known facts, 95 % interval", f"before ({base})", f"after ({model})"]
    how = [
        f"{base} HighlyKnows {report['num_known']:,} of {report['num_asked']:,} facts: right under each of four",
        f"few-shot prompts ({report['prompts']}). Both answered these under one more, judged by exact match.",
        *report["notes"],
        f"McNemar's test that as many were lost as gained: p = {report['scores']['mcnemar_p_value']:.2g}.",
        f"`trl-selfdistill check`, {report['environment']['date'][:10]}.",
    ]
    return f"## Facts that it forgot\n\n**{report['summary']}**\n\n{markdown_table(header, rows)}\n\n{' '.join(how)}"
