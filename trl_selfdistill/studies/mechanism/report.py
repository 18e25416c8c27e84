# SPDX-License-Identifier: Apache-2.0
"""What the mechanism study found, as text: each run, each hypothesis with its rule and numbers, drift and cost."""

from statistics import fmean

from ...hub.markdown import format_interval
from ..experiment import ExperimentResult
from .conditions import PREDICTIONS, Condition
from .study import MechanismResults, new_learnt


def render_mechanism_report(results: MechanismResults, model: str) -> str:
    """
    The report as Markdown that also reads well in a terminal.

    Args:
        results ([`MechanismResults`]): What was measured.
        model (`str`): Name of the model for readers.
    """
    table = results.table
    # Beside a verdict that few seeds support
    few = {1: " (one seed)", 2: " (two seeds)"}.get(table.num_seeds, "")
    lines = [
        f"# Why fine-tuning makes {model} forget",
        "",
        f"Lost: accuracy before minus after on {table.num_facts} held-out facts that it knew, with a 95 % interval. "
        f"{_what_intervals_cover(table.num_seeds)}",
        "",
        *_table(*_runs_table(results)),
        "",
        "Memory: the peak of a run; on a CPU that of the whole process, which keeps what earlier runs left.",
        "",
    ]
    for finding in results.findings:
        lines += [
            f"## {finding.hypothesis.capitalize()}: {finding.verdict.value}{few}",
            "",
            f"Prediction: {PREDICTIONS[finding.hypothesis]}",
            "",
            f"Rule: {finding.rule}",
            "",
            *(f"- {what}: {format_interval(x, signed=True)}" for what, x in finding.numbers.items()),
            *(f"- new facts learnt, {what}: {share:.3f}" for what, share in finding.learnt.items()),
            "",
        ]
    probed = {condition: runs for condition, runs in results.runs.items() if runs[0].drift}
    if probed:
        lines += ["## Drift of held-out facts at the end", "", *_table(*_drift_table(probed)), ""]
    return "\n".join(lines)


def summarise(results: MechanismResults) -> dict:
    """All numbers of the report as JSON values; rates are fractions."""
    return {
        "runs": {
            condition.name: {
                "condition": condition._asdict(),
                "lost": results.table.loss(condition.name)._asdict(),
                "new_learnt": new_learnt(runs),
                "steps": runs[0].training["steps"],
                "seconds_per_step": _seconds_per_step(runs),
                "peak_memory_bytes": max(run.training["peak_memory_bytes"] for run in runs),
                "drift": [run.drift for run in runs],  # of each seed
            }
            for condition, runs in results.runs.items()
        },
        "findings": [
            {**finding._asdict(), "numbers": {name: number._asdict() for name, number in finding.numbers.items()}}
            for finding in results.findings
        ],
    }


def _what_intervals_cover(num_seeds: int) -> str:
    if num_seeds == 1:
        return (
            "There is one seed: the intervals cover other facts only, and nothing is known about other seeds. What "
            "stands below holds for this seed."
        )
    return (
        f"The intervals cover other facts and other seeds, by a two-way random-effects model of {num_seeds} seeds and "
        "these facts."
    )


def _runs_table(results: MechanismResults) -> tuple[list[str], list[list[str]]]:
    header = ["trained on", "synthetic facts", "lost [95 % CI]", "new learnt", "steps", "s / 1,000 facts", "memory"]
    rows = []
    for condition, runs in results.runs.items():
        learnt = new_learnt(runs)
        seconds = _seconds_per_step(runs)
        memory = max(run.training["peak_memory_bytes"] for run in runs) / 2**30
        rows.append(
            [
                condition.label,
                f"{condition.num_facts:,}",
                format_interval(results.table.loss(condition.name)),
                "-" if learnt is None else f"{learnt:.3f}",
                f"{runs[0].training['steps']:,}",
                "-" if seconds is None else f"{seconds * 1000 / runs[0].training['rows_per_step']:.1f}",
                f"{memory:.2f} GiB",
            ]
        )
    return header, rows


def _seconds_per_step(runs: list[ExperimentResult]) -> float | None:
    """Mean over seeds; `None` where each was killed after its last step, and no step was timed."""
    seconds = [run.training["seconds_per_step"] for run in runs]
    timed = [value for value in seconds if value is not None]
    return fmean(timed) if timed else None


def _drift_table(probed: dict[Condition, list]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in next(iter(probed.values()))[0].drift[-1] if name not in ("step", "epoch")]
    header = ["trained on", *(name.removeprefix("drift_").replace("_", " ") for name in names)]
    rows = [
        [condition.label, *(f"{fmean(run.drift[-1][name] for run in runs):.4f}" for name in names)]
        for condition, runs in probed.items()
    ]
    return header, rows


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]
