# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods as a table, as sentences that follow from its numbers, and as a figure."""

from pathlib import Path

from .model_card import format_interval
from .pareto import Tradeoff


SELF_DISTILLATION = "Self-distillation"
_COLOURS = {"SFT": "#D55E00", SELF_DISTILLATION: "#0072B2", "WiSE-FT": "#009E73"}


def render_comparison(tradeoffs: list[Tradeoff], before: Tradeoff, model: str, num_seeds: int) -> str:
    """
    The report as Markdown.

    Args:
        tradeoffs (`list[Tradeoff]`): The methods.
        before (`Tradeoff`): The model that all of them start from.
        model (`str`): Its name for readers.
        num_seeds (`int`): Runs of each method.
    """
    header = ["method", "held-out known facts [95 % CI]", "new facts [95 % CI]", "Pareto front"]
    rows = [
        [
            point.label,
            format_interval(point.stability._asdict()),
            format_interval(point.plasticity._asdict()),
            "yes" if not point.dominated_by else f"no: {point.dominated_by[0]} is better",
        ]
        for point in tradeoffs
    ]
    start = (
        f"Before: {before.stability.value:.3f} of the held-out facts, {before.plasticity.value:.3f} of the new ones."
    )
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    table = [f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines]
    intro = f"{num_seeds} seeds each, the same facts and numbers of steps. {start} Intervals are over seeds and facts."
    return "\n".join(
        [f"# Methods against forgetting: {model}", "", intro, "", *table, "", *render_verdict(tradeoffs), ""]
    )


def render_verdict(tradeoffs: list[Tradeoff]) -> list[str]:
    """Whether self-distillation is on the Pareto front, by the numbers, in sentences."""
    ours = [point for point in tradeoffs if point.label.startswith(SELF_DISTILLATION)]
    front = [point.label for point in tradeoffs if not point.dominated_by]
    lines = [f"- On the front (no other method is as good on both and better on one): {'; '.join(front)}."]
    if not ours:
        return lines
    best = [point.label for point in ours if not point.dominated_by]
    if best:
        lines.append(
            f"- Self-distillation is on the front with {len(best)} of {len(ours)} settings: {'; '.join(best)}."
        )
    else:
        lines.append(f"- Self-distillation is not on the front with any of its {len(ours)} settings.")
    for point in ours:
        rivals = [label for label in point.dominated_by if not label.startswith(SELF_DISTILLATION)]
        if rivals:
            lines.append(f"- {point.label} is dominated by {'; '.join(rivals)}.")
    return lines


def plot_tradeoffs(tradeoffs: list[Tradeoff], before: Tradeoff, model: str, path: Path) -> None:
    """Stability against plasticity, one point a method with its intervals, and the front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 6), layout="constrained")
    axis.axhline(before.stability.value, color="grey", linestyle=":", label="before training")
    front = sorted((p.plasticity.value, p.stability.value) for p in tradeoffs if not p.dominated_by)
    axis.plot(*zip(*front, strict=True), color="black", linewidth=1, linestyle="--", label="Pareto front")
    markers = iter("osv^<>DPX*hpd1234+x" * 4)
    for point in tradeoffs:
        family = next((name for name in _COLOURS if point.label.startswith(name)), None)
        spread = [
            [[interval.value - interval.low], [interval.high - interval.value]]
            for interval in (point.plasticity, point.stability)
        ]
        axis.errorbar(
            point.plasticity.value,
            point.stability.value,
            xerr=spread[0],
            yerr=spread[1],
            color=_COLOURS.get(family, "#CC79A7" if point.dominated_by else "#E69F00"),
            marker=next(markers),
            linestyle="none",
            elinewidth=0.8,
            alpha=0.9,
            label=point.label,
        )
    axis.set(xlabel="plasticity: new facts learnt", ylabel="stability: held-out known facts", title=model)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
