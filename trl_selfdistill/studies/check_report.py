# SPDX-License-Identifier: Apache-2.0
"""The report of a check: which of the facts that a base model HighlyKnows a model made from it has lost."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files import warn_without, write_json
from ..hallucination.intervals import Interval
from ..hallucination.metric import RATES, score_hallucinations
from ..hallucination.verdict import Verdict, judge_loss
from ..hub.environment import describe_environment
from ..hub.model_card import escape_markdown
from .figures import page_figure
from .markdown import format_interval, markdown_table


_VERDICTS = {
    "within": "Within the tolerance of {:g}",
    "beyond": "Beyond the tolerance of {:g}",
    "undecided": "Too few facts to tell whether the loss is within the tolerance of {:g}",
}
_MOST_SHOWN = 50  # of the lost facts, in the report; `check.json` has all
_MOST_DRAWN = 40  # relations in the figure, those that lost most
_PAIRED = {"forgetting_rate": "right before, not now", "induced_hallucination_rate": "right before, hallucinated now"}


def compare_answers(known: Dataset, answers: list[str], tolerance: float, **about: Any) -> dict[str, Any]:
    """
    What `check.json` holds: the metric's scores with intervals, the verdict, and the facts that were lost.

    Args:
        known (`Dataset`): The facts that the base HighlyKnows, with its answers in the column `base_answer`.
        answers (`list[str]`): What the model answered.
        tolerance (`float`): The largest loss that is tolerated, a fraction in [0, 1).
        about (`dict`): What it also holds: the names `base` and `model`, `num_asked` (the facts that the base was
            asked), `prompts` and `notes`.
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


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes `check.json`, `check.md` and `check.png` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check.json", report)
    header = ["relation", "facts", "accuracy before", "after", "forgetting rate"]
    rows = []
    for name, scores in report["relations"].items():
        rates = [scores[key] for key in ("baseline_accuracy", "accuracy", "forgetting_rate")]
        shown = ["-" if rate is None else f"{rate:.3f}" for rate in rates]
        rows.append([escape_markdown(name), str(scores["num_predictions"]), *shown])
    columns = ("question", "answer", "base_answer", "model_answer")
    lost = [[escape_markdown(row[column]) for column in columns] for row in report["lost"][:_MOST_SHOWN]]
    shown = f", the first {_MOST_SHOWN}" if len(report["lost"]) > _MOST_SHOWN else ""
    figure = folder / "check.png"
    figure.unlink(missing_ok=True)
    with warn_without(figure):
        _plot(report, figure)
    parts = [
        f"# {escape_markdown(report['model'])}: what it kept of what {escape_markdown(report['base'])} knows",
        render_section(report),
        f"## By relation\n\n{markdown_table(header, rows)}",
        *(["![Accuracy before and after, by relation](check.png)"] if figure.is_file() else []),
        f"## Lost facts ({len(report['lost'])}{shown})",
        markdown_table(["question", "right answer", "before", "after"], lost) if lost else "None.",
    ]
    (folder / "check.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _plot(report: dict[str, Any], path: Path) -> None:
    """A line for each relation from the accuracy before to that after, with its interval; most was lost at the top."""
    relations = sorted(report["relations"].items(), key=lambda item: -item[1]["net_change"])[-_MOST_DRAWN:]
    with page_figure(path, 1 + 0.25 * len(relations)) as figure:
        axis = figure.subplots()
        for y, (_, scores) in enumerate(relations):
            before, after = scores["baseline_accuracy"], scores["accuracy"]
            axis.plot([before, after], [y, y], color="0.7", marker="", zorder=1)
            ends = [[after - scores["accuracy_ci_low"]], [scores["accuracy_ci_high"] - after]]
            axis.errorbar([after], [y], xerr=ends, fmt="s", color="C4", label=None if y else "after")
            axis.plot([before], [y], "o", color="C0", label=None if y else "before")
        names = [f"{name} ({scores['num_predictions']})" for name, scores in relations]
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="share of the known facts that are answered right", xlim=(-0.02, 1.02))
        figure.legend(loc="outside upper right", ncols=2)
