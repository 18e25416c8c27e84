# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods as a table, as sentences that follow from its numbers, and as a figure."""

from collections.abc import Sequence
from pathlib import Path

from ...hub.markdown import format_interval
from ..random_effects import random_effects_interval
from .pareto import MethodOutcome, Tradeoff


SELF_DISTILLATION = "Self-distillation"
WITH_OWN_ANSWERS = "Self-distillation with own answers"
_FRONT_NOTE = (
    "The front, and who is better, go by the means alone, which are point estimates; in brackets, on which facts the "
    "lead is clear of the 95 % interval of the difference, paired by seed and fact."
)
# How far from the best on either axis a method may be to be in the figure's second panel, a fraction
_CORNER = 0.2
_COLOURS = {"SFT": "#D55E00", SELF_DISTILLATION: "#0072B2", "WiSE-FT": "#009E73"}


def render_comparison(
    tradeoffs: list[Tradeoff], before: Tradeoff, model: str, num_seeds: int, outcomes: Sequence[MethodOutcome] = ()
) -> str:
    """
    The report as Markdown.

    Args:
        tradeoffs (`list[Tradeoff]`): The methods.
        before (`Tradeoff`): The model that all of them start from.
        model (`str`): Its name for readers.
        num_seeds (`int`): Runs of each method.
        outcomes (`Sequence[MethodOutcome]`, *optional*):
            What the methods did, for whether the lead of a better one is clear.
    """
    by_label = {outcome.label: outcome for outcome in outcomes}
    header = ["method", "held-out known facts [95 % CI]", "new facts [95 % CI]", "Pareto front"]
    rows = [
        [
            point.label,
            format_interval(point.stability),
            format_interval(point.plasticity),
            _on_the_front(point, by_label),
        ]
        for point in tradeoffs
    ]
    start = (
        f"Before: {before.stability.value:.3f} of the held-out facts, {before.plasticity.value:.3f} of the new ones."
    )
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    table = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]
    intro = (
        f"{num_seeds} seeds each, the same facts and, but for early stopping, numbers of steps. {start} Intervals are "
        "over seeds and facts."
    )
    return "\n".join(
        [
            f"# Methods against forgetting: {model}",
            "",
            intro,
            _FRONT_NOTE,
            "",
            *table,
            "",
            *render_verdict(tradeoffs),
            "",
        ]
    )


def _on_the_front(point: Tradeoff, outcomes: dict[str, MethodOutcome]) -> str:
    if not point.dominated_by:
        return "yes"
    if not outcomes:
        return f"no: {point.dominated_by[0]} is better"
    leads = {better: clear_lead(outcomes[better], outcomes[point.label]) for better in point.dominated_by}
    better = max(leads, key=lambda label: len(leads[label]))  # the clearest, the first of equals
    return f"no: {better} is better (clear: {' and '.join(leads[better]) or 'neither'})"


def clear_lead(better: MethodOutcome, worse: MethodOutcome) -> list[str]:
    """On which facts the 95 % interval of the paired difference between two methods is above 0."""
    differences = {"held-out": better.old - worse.old, "new": better.new - worse.new}
    return [name for name, difference in differences.items() if random_effects_interval(difference).low > 0]


def render_verdict(tradeoffs: list[Tradeoff]) -> list[str]:
    """Whether self-distillation, alone and with own answers, is on the Pareto front, by the numbers, in sentences."""
    front = [point.label for point in tradeoffs if not point.dominated_by]
    lines = [f"- On the front (no other method is as good on both and better on one): {'; '.join(front)}."]
    for family in (SELF_DISTILLATION, WITH_OWN_ANSWERS):
        ours = {point.label: point.dominated_by for point in tradeoffs if point.family == family}
        best = [label for label, better in ours.items() if not better]
        if best:
            lines.append(f"- {family} is on the front with {len(best)} of {len(ours)} settings: {'; '.join(best)}.")
        elif ours:
            lines.append(f"- {family} is not on the front with any of its {len(ours)} settings.")
        for label, better in ours.items():
            if others := [other for other in better if other not in ours]:
                lines.append(f"- {label} is dominated by {'; '.join(others)}.")
    return lines


def plot_tradeoffs(tradeoffs: list[Tradeoff], before: Tradeoff, model: str, path: Path) -> None:
    """
    Stability against plasticity, one numbered point a method with its intervals, and the front as a line. Where some
    methods are near the best on both axes, a second panel shows that corner.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = [max(getattr(p, axis).value for p in tradeoffs) - _CORNER for axis in ("plasticity", "stability")]
    corner = [p for p in tradeoffs if p.plasticity.value >= best[0] and p.stability.value >= best[1]]
    panels = 2 if 1 < len(corner) < len(tradeoffs) else 1
    figure, axes = pyplot.subplots(1, panels, figsize=(5 + 5 * panels, 6), layout="constrained", squeeze=False)
    for axis in axes[0]:
        _draw_points(axis, tradeoffs, before, unnumbered=corner if panels == 2 and axis is axes[0, 0] else [])
        axis.set(xlabel="plasticity: new facts learnt", ylabel="stability: held-out known facts", title=model)
        axis.grid(alpha=0.3)
    if panels == 2:
        x, y = [p.plasticity.value for p in corner], [p.stability.value for p in corner]
        axes[0, 1].set(title="its upper right corner", xlim=(min(x) - 0.01, max(x) + 0.01))
        axes[0, 1].set(ylim=(min(y) - 0.01, max(y) + 0.01))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_points(axis, tradeoffs: list[Tradeoff], before: Tradeoff, unnumbered: list[Tradeoff]) -> None:
    axis.axhline(before.stability.value, color="grey", linestyle=":", label="before training")
    front = sorted((p.plasticity.value, p.stability.value) for p in tradeoffs if not p.dominated_by)
    axis.plot(
        *zip(*front, strict=True),
        color="black",
        linewidth=1,
        linestyle="--",
        drawstyle="steps-pre",
        label="Pareto front",
    )
    for number, (point, marker) in enumerate(zip(tradeoffs, "osv^<>DPX*hpd" * len(tradeoffs), strict=False), 1):
        family = next((name for name in _COLOURS if point.label.startswith(name)), None)
        colour = _COLOURS.get(family, "#CC79A7" if point.dominated_by else "#E69F00")
        place = point.plasticity.value, point.stability.value
        xerr, yerr = (
            [[interval.value - interval.low], [interval.high - interval.value]]
            for interval in (point.plasticity, point.stability)
        )
        style = dict(color=colour, marker=marker, linestyle="none", elinewidth=0.8, alpha=0.9)
        axis.errorbar(*place, xerr=xerr, yerr=yerr, label=f"{number}  {point.label}", **style)
        if point not in unnumbered:
            offset = {"xytext": (5, 4), "textcoords": "offset points"}
            axis.annotate(str(number), place, **offset, fontsize="small", annotation_clip=True)
