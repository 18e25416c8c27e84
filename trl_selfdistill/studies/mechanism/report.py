# SPDX-License-Identifier: Apache-2.0
"""What the mechanism study found: each run, each hypothesis with its rule and numbers, drift and cost, as text and as
the figures of the paper (arXiv 2604.15574, section 5)."""

from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from ..figures import label_ends, page_figure
from ..markdown import format_interval, markdown_table
from ..results import VariantResult, mean_seconds
from .study import MechanismResults, new_learnt
from .variants import PREDICTIONS, MechanismArguments, MechanismVariant, variant_of_overlap


_STYLES = {"recombined": "v-C4", "uuid": "D-C3", "overlap": "P-C5", "known only": "o-C0", "self-distillation": "s-C1"}


def render_mechanism_report(results: MechanismResults, model: str) -> str:
    """The report on a model, by its name for readers, as Markdown that also reads well in a terminal."""
    num_seeds, num_facts = next(iter(results.losses.values())).shape
    # Beside a verdict that few seeds support
    few = {1: " (one seed)", 2: " (two seeds)"}.get(num_seeds, "")
    covered = f"The intervals cover other facts and other seeds (a random-effects model of {num_seeds} seeds)."
    if num_seeds == 1:
        covered = "There is one seed: nothing is known about other seeds, and the verdicts hold for this one."
    parts = [
        f"# Why fine-tuning makes {model} forget",
        f"Lost: accuracy before minus after on {num_facts} held-out facts that it knew, with a 95 % "
        f"interval. {covered}",
        _runs_table(results),
    ]
    for finding in results.findings:
        numbers = [f"- {what}: {format_interval(value, signed=True)}" for what, value in finding.numbers.items()]
        parts += [
            f"## {finding.hypothesis.capitalize()}: {finding.verdict}{few}",
            f"Prediction: {PREDICTIONS[finding.hypothesis]}",
            f"Rule: {finding.rule}",
            "\n".join(numbers),
        ]
    return "\n\n".join([*parts, "## Drift of held-out facts at the end", _drift_table(results)]) + "\n"


def summarise(results: MechanismResults) -> dict:
    """All numbers of the report as JSON values; rates are fractions."""
    runs = {}
    for variant, runs_of_seeds in results.runs.items():
        runs[variant.name] = {"variant": variant._asdict(), "lost": results.lost(variant)._asdict()}
        runs[variant.name] |= _mean_numbers(runs_of_seeds) | {"drift": [run.drift for run in runs_of_seeds]}
    findings = [
        finding._asdict() | {"numbers": {what: value._asdict() for what, value in finding.numbers.items()}}
        for finding in results.findings
    ]
    return {"runs": runs, "findings": findings}


def _mean_numbers(runs: list[VariantResult]) -> dict[str, float | None]:
    """What was learnt and what it cost, over the seeds of a variant."""
    return {
        "new_learnt": new_learnt(runs),
        "steps": runs[0].training["num_steps"],
        "seconds_per_step": mean_seconds(runs, "seconds_per_step"),
    }


def _runs_table(results: MechanismResults) -> str:
    header = ["trained on", "synthetic facts", "lost [95 % CI]", "new learnt", "steps", "s / 1,000 facts"]
    rows = []
    for variant, runs in results.runs.items():
        learnt, steps, seconds = _mean_numbers(runs).values()
        lost = format_interval(results.lost(variant))
        learnt = "-" if learnt is None else f"{learnt:.3f}"
        seconds = "-" if seconds is None else f"{seconds * 1000 / runs[0].training['rows_per_step']:.1f}"
        rows.append([variant.label, f"{variant.num_facts:,}", lost, learnt, f"{steps:,}", seconds])
    return markdown_table(header, rows)


def _drift_table(results: MechanismResults) -> str:
    """The last measurement of each probed variant, means over seeds."""
    last = {variant.label: [run.drift[-1] for run in runs] for variant, runs in results.runs.items() if runs[0].drift}
    names = [name for name in next(iter(last.values()))[0] if name.startswith("drift_")]
    rows = [[label, *(f"{fmean(line[name] for line in runs):.4f}" for name in names)] for label, runs in last.items()]
    return markdown_table(["trained on", *(name.removeprefix("drift_").replace("_", " ") for name in names)], rows)


def plot_mechanism(results: MechanismResults, study: MechanismArguments, model: str, folder: Path) -> list[Path]:
    """
    Draws forgetting against the number of facts and against overlap, and the drift of the probed layers, with the name
    of the model as the title, each as a PNG file in `folder`. Returns the files.
    """
    [last, *_] = [runs[0].drift[-1] for runs in results.runs.values() if runs[0].drift]
    drift_names = [name for name in last if name.endswith("last_subject_token")]
    figures = {"capacity": [_draw_capacity], "overlap": [_draw_overlap]}
    figures["drift"] = [partial(_draw_drift, name=name) for name in drift_names]
    for name, panels in figures.items():
        with page_figure(folder / f"{name}.png") as figure:
            axes = figure.subplots(1, len(panels), squeeze=False)[0]
            for axis, draw in zip(axes, panels, strict=True):
                draw(axis, results, study)
            label_ends(axes[-1])
            figure.suptitle(model)
    return [folder / f"{name}.png" for name in figures]


def _style(variant: MechanismVariant) -> str:
    kind = variant.keys if variant.num_facts else "known only"
    return _STYLES["self-distillation" if variant.self_distillation else kind]


def _draw_loss(axis, results: MechanismResults, x: list[float], variants: list[MechanismVariant], label: str) -> None:
    losses = np.array([results.lost(variant) for variant in variants])  # columns value, low, high
    spread = np.abs(losses[:, 1:] - losses[:, :1]).T
    line, *_ = axis.errorbar(x, losses[:, 0], yerr=spread, fmt=_style(variants[-1]))
    line.set_label(label)
    axis.set_ylabel("held-out accuracy lost")


def _draw_capacity(axis, results: MechanismResults, study: MechanismArguments) -> None:
    sizes, known_only = sorted(study.num_synthetic_facts), MechanismVariant(0)
    for keys, beside in (("recombined", 0.97), ("uuid", 1.03)):  # so that no interval hides another
        variants = [MechanismVariant(size, keys) for size in sizes]
        _draw_loss(axis, results, [beside * size for size in sizes], variants, variants[0].label)
    axis.axhline(results.lost(known_only).value, linestyle=":", label=known_only.label, color="C0", marker="")
    axis.set(xscale="log", xlabel="synthetic facts", title="Capacity")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()


def _draw_overlap(axis, results: MechanismResults, study: MechanismArguments) -> None:
    overlaps, middle = sorted(study.overlaps), study.num_facts_of_overlap
    variants = [variant_of_overlap(middle, overlap) for overlap in overlaps]
    _draw_loss(axis, results, overlaps, variants, f"{middle:,} synthetic facts")
    axis.set(xlabel="share of key tokens from real names", title="Interference")


def _draw_drift(axis, results: MechanismResults, study: MechanismArguments, name: str) -> None:
    for variant, runs in results.runs.items():
        if runs[0].drift:
            steps = [line["step"] for line in runs[0].drift]
            means = np.mean([[line[name] for line in run.drift] for run in runs], axis=0)
            axis.plot(steps, means, _style(variant), label=variant.label)
    layer = name.split("/")[1].replace("_", " ")
    axis.set(xlabel="optimizer steps", ylabel="cosine distance from the start", title=f"{layer}, last subject token")
