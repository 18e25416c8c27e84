# SPDX-License-Identifier: Apache-2.0
"""The comparison as stability against plasticity: a table, sentences that follow from its numbers, and a figure."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ...hallucination.intervals import mean_interval
from ..markdown import format_interval, markdown_table


_COLOURS = {"SFT": "#D55E00", "Self-distillation": "#0072B2", "WiSE-FT": "#009E73"}


class Outcome(NamedTuple):
    """
    What a variant did, over seeds.

    Args:
        label (`str`): Its name for readers.
        old (`np.ndarray` of shape `(num_seeds, num_old_facts)`):
            Right (1) or wrong (0) after training, on old facts that were not trained on.
        new (`np.ndarray` of shape `(num_seeds, num_new_facts)`): The same of the new facts.
        group (`str`, *optional*): The kind of remedy that it is.
        cost (`float`, *optional*): Seconds of training.
    """

    label: str
    old: np.ndarray
    new: np.ndarray
    group: str = ""
    cost: float | None = None

    def clear_leads(self, other: "Outcome") -> list[str]:
        """On which facts the 95 % interval of the paired difference from another is above 0."""
        differences = {"held-out": self.old - other.old, "new": self.new - other.new}
        return [name for name, difference in differences.items() if mean_interval(difference).low > 0]


def dominators(outcome: Outcome, outcomes: list[Outcome]) -> list[Outcome]:
    """Those whose means are at least as good on both kinds of facts, and better on one; empty on the Pareto front."""
    old, new = outcome.old.mean(), outcome.new.mean()
    at_least_as_good = [other for other in outcomes if other.old.mean() >= old and other.new.mean() >= new]
    return [other for other in at_least_as_good if other.old.mean() > old or other.new.mean() > new]


def summarise(outcomes: list[Outcome]) -> list[dict]:
    """The numbers of the report as JSON values, fractions."""
    return [
        {
            "label": outcome.label,
            "stability": mean_interval(outcome.old == 1)._asdict(),
            "plasticity": mean_interval(outcome.new == 1)._asdict(),
            "dominated_by": [other.label for other in dominators(outcome, outcomes)],
            "group": outcome.group,
            "cost": outcome.cost,
        }
        for outcome in outcomes
    ]


def render_comparison(outcomes: list[Outcome], before: Outcome, model: str) -> str:
    """
    The report as Markdown.

    Args:
        outcomes (`list[Outcome]`): The variants.
        before (`Outcome`): The model that all of them start from.
        model (`str`): Its name for readers.
    """
    header = ["variant", "held-out known facts [95 % CI]", "new facts [95 % CI]", "Pareto front"]
    rows = [
        [
            outcome.label,
            format_interval(mean_interval(outcome.old == 1)),
            format_interval(mean_interval(outcome.new == 1)),
            _on_the_front(outcome, dominators(outcome, outcomes)),
        ]
        for outcome in outcomes
    ]
    intro = (
        f"{len(before.old)} seeds each, all on the same facts and, early stopping aside, for as many steps. Before: "
        f"{before.old.mean():.3f} of the held-out facts, {before.new.mean():.3f} of the new ones. Intervals are over "
        "seeds and facts.\nThe front, and which variant is better, go by the means alone, as point estimates; in "
        "brackets, on which facts the lead is clear of the 95 % interval of the difference, paired by seed and fact."
    )
    lines = [f"# Variants against forgetting: {model}", "", intro, "", markdown_table(header, rows), ""]
    return "\n".join([*lines, *render_verdict(outcomes), ""])


def _on_the_front(outcome: Outcome, better: list[Outcome]) -> str:
    if not better:
        return "yes"
    leads = [(other.label, other.clear_leads(outcome)) for other in better]
    label, clear = max(leads, key=lambda lead: len(lead[1]))  # the clearest, the first of equals
    return f"no: {label} is better (clear: {' and '.join(clear) or 'neither'})"


def render_verdict(outcomes: list[Outcome]) -> list[str]:
    """Whether self-distillation, alone and with own answers, is on the Pareto front, by the numbers, in sentences."""
    better = {outcome.label: [other.label for other in dominators(outcome, outcomes)] for outcome in outcomes}
    front = [label for label, others in better.items() if not others]
    lines = [f"- On the front (no other variant is as good on both and better on one): {'; '.join(front)}."]
    for family in ("Self-distillation", "Own answers"):
        ours = [outcome.label for outcome in outcomes if outcome.group == family]
        best = [label for label in ours if label in front]
        if best:
            lines.append(f"- {family} is on the front with {len(best)} of {len(ours)} settings: {'; '.join(best)}.")
        elif ours:
            lines.append(f"- {family} is not on the front with any of its {len(ours)} settings.")
        for label in ours:
            if others := [other for other in better[label] if other not in ours]:
                lines.append(f"- {label} is dominated by {'; '.join(others)}.")
    return lines


def plot_comparison(outcomes: list[Outcome], before: Outcome, model: str, path: Path) -> None:
    """
    Stability against plasticity: a numbered point for each variant with its intervals, and the front as a line.

    Args:
        outcomes (`list[Outcome]`): The variants.
        before (`Outcome`): The model that all of them start from.
        model (`str`): Its name for readers.
        path (`Path`): The PNG file.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    axis = figure.subplots()
    axis.axhline(before.old.mean(), color="grey", linestyle=":", label="before training")
    front = sorted((o.new.mean(), o.old.mean()) for o in outcomes if not dominators(o, outcomes))
    line = {"color": "black", "zorder": 3, "linestyle": "--", "drawstyle": "steps-pre"}
    axis.plot(*zip(*front, strict=True), label="Pareto front", **line)
    for number, outcome in enumerate(outcomes, 1):
        family = next((name for name in _COLOURS if outcome.label.startswith(name)), None)
        colour = _COLOURS.get(family, "#CC79A7" if dominators(outcome, outcomes) else "#E69F00")
        x, y = mean_interval(outcome.new == 1), mean_interval(outcome.old == 1)
        errors = [[[i.value - i.low], [i.high - i.value]] for i in (x, y)]
        style = {"color": colour, "marker": "osv^<>DPX*hpd"[number % 13], "linestyle": "none", "elinewidth": 0.8}
        axis.errorbar(x.value, y.value, xerr=errors[0], yerr=errors[1], label=f"{number}  {outcome.label}", **style)
        axis.annotate(str(number), (x.value, y.value), xytext=(5, 4), textcoords="offset points", fontsize="small")
    axis.set(xlabel="plasticity: new facts learnt", ylabel="stability: held-out known facts", title=model)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
