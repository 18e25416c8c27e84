# SPDX-License-Identifier: Apache-2.0
"""The figures of the mechanism study, in the form in which the paper shows them (arXiv 2604.15574, section 5)."""

from pathlib import Path

import numpy as np

from .conditions import Condition, MechanismArguments, condition_of_overlap
from .study import MechanismResults, new_learnt


# Colours that stay apart for colour-blind readers (Okabe-Ito), and a marker each for print
_STYLES = {
    "recombined": ("#D55E00", "o"),
    "uuid": ("#0072B2", "s"),
    "pseudo": ("#009E73", "^"),
    "overlap": ("#CC79A7", "D"),
}
_OTHER_STYLES = ("#000000", "v"), ("#E69F00", "P")


def plot_mechanism(results: MechanismResults, study: MechanismArguments, model: str, folder: Path) -> list[Path]:
    """
    Draws forgetting against the number of facts and against overlap, the drift by layer, and stability against
    plasticity.

    Args:
        results ([`MechanismResults`]): What was measured.
        study ([`MechanismArguments`]): What was compared.
        model (`str`): Name of the model, which stands on every figure.
        folder (`Path`): Where the PNG files go.

    Returns:
        `list[Path]`: The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings = {"capacity": _draw_capacity, "overlap": _draw_overlap, "tradeoff": _draw_tradeoff, "drift": _draw_drift}
    files = []
    for name, draw in drawings.items():
        layers = _drift_names(results) if name == "drift" else [None]
        if not layers:
            continue
        figure, axes = pyplot.subplots(
            1, len(layers), figsize=(5.5 * max(1, len(layers)) + 1, 4.2), layout="constrained", squeeze=False
        )
        draw(results, study, axes[0])
        figure.suptitle(model)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
        pyplot.close(figure)
    return files


def _style(condition: Condition) -> tuple[str, str]:
    if condition.self_distillation:
        return _OTHER_STYLES[1]
    return _STYLES[condition.keys] if condition.num_facts else _OTHER_STYLES[0]


def _error_bars(axis, results: MechanismResults, x, conditions: list[Condition], label: str) -> None:
    losses = [results.table.loss(condition.name) for condition in conditions]
    values = np.array([loss.value for loss in losses])
    spread = np.abs(np.array([[loss.low, loss.high] for loss in losses]).T - values)
    colour, marker = _style(conditions[-1])
    axis.errorbar(x, values, yerr=spread, color=colour, marker=marker, label=label, capsize=3, linewidth=2)


def _draw_capacity(results: MechanismResults, study: MechanismArguments, axes) -> None:
    [axis] = axes
    sizes = sorted(study.num_synthetic_facts)
    for keys in ("recombined", "uuid"):
        conditions = [Condition(size, keys) for size in sizes]
        _error_bars(axis, results, sizes, conditions, conditions[0].label)
    axis.axhline(results.table.loss(Condition(0).name).value, color="black", linestyle=":", label=Condition(0).label)
    axis.set(xscale="log", xlabel="synthetic facts", ylabel="held-out accuracy lost", title="Capacity")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def _draw_overlap(results: MechanismResults, study: MechanismArguments, axes) -> None:
    [axis] = axes
    overlaps, middle = sorted(study.overlaps), study.num_facts_of_overlap
    conditions = [condition_of_overlap(middle, overlap) for overlap in overlaps]
    _error_bars(axis, results, overlaps, conditions, f"{middle:,} synthetic facts")
    x = np.array(overlaps)
    y = np.array([results.table.loss(condition.name).value for condition in conditions])
    slope, intercept = np.polyfit(x, y, 1)
    axis.plot(x, slope * x + intercept, color="black", linestyle="--", label=f"least squares, slope {slope:+.3f}")
    axis.set(xlabel="share of key tokens from real names", ylabel="held-out accuracy lost", title="Interference")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def _draw_tradeoff(results: MechanismResults, study: MechanismArguments, axes) -> None:
    [axis] = axes
    for condition, runs in results.runs.items():
        learnt = new_learnt(runs)
        if condition.num_facts != study.num_facts_of_overlap or learnt is None:
            continue
        loss = results.table.loss(condition.name)
        colour, marker = _style(condition)
        filled = {} if condition.values == "real" else {"markerfacecolor": "white"}
        spread = [[loss.high - loss.value], [loss.value - loss.low]]
        axis.errorbar(
            learnt, -loss.value, yerr=spread, color=colour, marker=marker, capsize=3, label=condition.label, **filled
        )
        if condition.overlap is not None:  # one colour and marker for all of them
            # To the left: what is learnt is often at the right edge
            offset = {"xytext": (-8, 4), "textcoords": "offset points", "ha": "right"}
            axis.annotate(f"{condition.overlap:g}", (learnt, -loss.value), fontsize="small", color=colour, **offset)
    axis.set(
        xlabel="plasticity: new facts learnt",
        ylabel="stability: change of held-out accuracy",
        title=f"{study.num_facts_of_overlap:,} synthetic facts",
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")


def _drift_names(results: MechanismResults) -> list[str]:
    lines = [runs[0].drift for runs in results.runs.values() if runs[0].drift]
    return [name for name in lines[0][-1] if name.endswith("last_subject_token")] if lines else []


def _draw_drift(results: MechanismResults, study: MechanismArguments, axes) -> None:
    for axis, name in zip(axes, _drift_names(results), strict=True):
        for condition, runs in results.runs.items():
            if not runs[0].drift:
                continue
            colour, marker = _style(condition)
            steps = [line["step"] for line in runs[0].drift]
            means = np.mean([[line[name] for line in run.drift] for run in runs], axis=0)
            axis.plot(steps, means, color=colour, marker=marker, label=condition.label, linewidth=2, markersize=4)
        layer = name.split("/")[1].replace("_", " ")
        axis.set(
            xlabel="optimizer steps", ylabel="cosine distance from the start", title=f"{layer}, last subject token"
        )
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize="small")
