# SPDX-License-Identifier: Apache-2.0
"""The comparison as old facts kept against new ones learnt: a table, which variants reach the aim, and a figure."""

import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...hallucination.intervals import Interval, mean_interval
from ..figures import page_figure
from ..markdown import format_interval, markdown_table


LEAST_NEW, MOST_FORGETTING = 0.95, 0.2  # the aim, as shares of what plain SFT learns and forgets
_COLOURS = {"SFT": "C0", "Lower rate": "C0", "WiSE-FT": "C5", "Parts of the weights": "C2", "Known facts again": "C6"}
_COLOURS |= {"Own answers": "C4", "Self-distillation": "C1", "KL on anchors": "C3"}


class Outcome(NamedTuple):
    """
    What a variant did, over seeds.

    Args:
        label (`str`): Its name for readers.
        old (`np.ndarray` of shape `(num_seeds, num_old_facts)`):
            Right (1) or wrong (0) after training, on old facts that were not trained on.
        new (`np.ndarray` of shape `(num_seeds, num_new_facts)`): The same of the new facts.
        group (`str`, *optional*): The kind of remedy that it is.
        cost (`float`, *optional*): Processor time of its training in seconds, the mean over seeds.
    """

    label: str
    old: np.ndarray
    new: np.ndarray
    group: str = ""
    cost: float | None = None


def dominators(outcome: Outcome, outcomes: list[Outcome]) -> list[Outcome]:
    """Those whose means are at least as good on both kinds of facts, and better on one; empty on the Pareto front."""
    old, new = outcome.old.mean(), outcome.new.mean()
    at_least_as_good = [other for other in outcomes if other.old.mean() >= old and other.new.mean() >= new]
    return [other for other in at_least_as_good if other.old.mean() > old or other.new.mean() > new]


def share_of_forgetting(outcome: Outcome, before: Outcome, sft: Outcome) -> Interval:
    """
    What is forgotten over what SFT forgets, of the means; NaN if SFT forgets nothing.

    Its 95 % interval is that of the linearised ratio: of `lost - ratio * lost_by_sft`, paired by seed and fact, over
    the mean of `lost_by_sft`; NaN if SFT does not clearly forget. In simulations 0.94 to 0.97 of them held the ratio.
    """
    lost, lost_by_sft = before.old - outcome.old, before.old - sft.old
    forgotten = max(lost_by_sft.mean(), 0) or np.nan
    ratio = lost.mean() / forgotten
    scale = forgotten if mean_interval(lost_by_sft).low > 0 else np.nan
    _, low, high = mean_interval((lost - ratio * lost_by_sft) / scale)
    return Interval(ratio, ratio + low, ratio + high)


def summarise(outcomes: list[Outcome]) -> list[dict]:
    """The numbers of the report as JSON values: fractions, and seconds."""
    return [
        {
            "label": outcome.label,
            "group": outcome.group,
            "stability": mean_interval(outcome.old == 1)._asdict(),
            "plasticity": mean_interval(outcome.new == 1)._asdict(),
            "dominated_by": [other.label for other in dominators(outcome, outcomes)],
            "cost": outcome.cost,
        }
        for outcome in outcomes
    ]


def render_comparison(outcomes: list[Outcome], before: Outcome, model: str) -> str:
    """
    The report as Markdown: a table by group, and which variants reach the aim or come nearest. Plain SFT is the first
    of `outcomes`, and all start from `before`, which readers know as `model`.
    """
    header = ["group", "method", "old facts kept [95 % CI]", "new facts [95 % CI]", "forgetting, share of SFT's"]
    sft, groups, rows, margins = outcomes[0], [outcome.group for outcome in outcomes], [], []
    for outcome in sorted(outcomes, key=lambda outcome: groups.index(outcome.group)):
        kept, learnt = (format_interval(mean_interval(facts == 1)) for facts in (outcome.old, outcome.new))
        share = share_of_forgetting(outcome, before, sft)
        forgotten = format_interval(share) if share.low < share.high else f"{share.value:.3f}"
        cost = f"{outcome.cost / sft.cost:.2f}" if outcome.cost and sft.cost else "-"
        front = "" if dominators(outcome, outcomes) else "yes"
        rows.append([outcome.group, outcome.label, kept, learnt, forgotten, cost, front])
        target = before.old - MOST_FORGETTING * (before.old - sft.old)
        ahead = [mean_interval(outcome.old - target), mean_interval(outcome.new - LEAST_NEW * sft.new)]
        clear = " (clearly)" if min(interval.low for interval in ahead) > 0 else ""
        margin, forgets_less = min(interval.value for interval in ahead), outcome.old.mean() > sft.old.mean()
        margins.append((forgets_less, margin, f"{outcome.label}{clear}, cost {cost}"))
    reached = [f"- {text}" for _, margin, text in margins if margin > -1e-9]
    forgets_less, _, nearest = max(margins)
    nearest = f"the nearest is {nearest}" if forgets_less else "nothing forgets less than SFT"
    verdict = "\n".join(reached) or f"- none; {nearest}"
    intro = (
        f"{len(before.old)} seeds each, on the same facts. Before: {before.old.mean():.3f} of the old facts, which "
        f"are not trained on, {before.new.mean():.3f} of the new ones.\nIntervals are over seeds and facts, cost is "
        "processor time. On the front no other method is, by the means, as good on both and better on one."
    )
    aim = (
        f"These reach the aim by the means, at least {LEAST_NEW:g} of SFT's new facts at no more than "
        f"{MOST_FORGETTING:g} of its forgetting\n(clearly: the intervals of both differences, paired, are above 0):"
    )
    table = markdown_table([*header, "cost, SFT = 1", "front"], rows)
    return "\n\n".join([f"# Methods against forgetting: {model}", intro, table, aim, f"{verdict}\n"])


def plot_comparison(outcomes: list[Outcome], before: Outcome, model: str, path: Path) -> None:
    """
    Old facts kept and new ones learnt with their intervals, a row for each method that learns at least half of what
    plain SFT does (the first outcome), those of a group together, as a PNG file.
    """
    sft, start = outcomes[0], before.old.mean()
    learnt = [outcome for outcome in outcomes if outcome.new.mean() >= sft.new.mean() / 2]
    rows, headings, top = {}, {}, 0.0  # by their places, in lines of text from the top down
    for group in dict.fromkeys(outcome.group for outcome in learnt):
        headings[top] = group
        for outcome in [outcome for outcome in learnt if outcome.group == group]:
            text = textwrap.fill(outcome.label.replace(" = ", "\u00a0=\u00a0"), 40)
            rows[top + 1 + text.count("\n") / 2] = text, outcome
            top += 1 + text.count("\n")
        top += 1.3
    aims = {"old": start - MOST_FORGETTING * (start - sft.old.mean()), "new": LEAST_NEW * sft.new.mean()}
    with page_figure(path, 1.1 + 0.145 * top) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        axes[1].set_xlabel("new facts learnt")
        for axis, (name, aim) in zip(axes, aims.items(), strict=True):
            axis.axvspan(aim, 1.005, color="C3", alpha=0.15, linewidth=0)
            for place, (_, outcome) in rows.items():
                value, low, high = mean_interval(getattr(outcome, name) == 1)
                style = {"color": _COLOURS.get(outcome.group, "0.4"), "elinewidth": 1, "fmt": "o"}
                style["markerfacecolor"] = "white" if dominators(outcome, outcomes) else style["color"]
                axis.errorbar(value, place, xerr=[[value - low], [high - value]], **style)
            axis.hlines([*rows], *axis.get_xlim(), color="0.9", linewidth=0.5, zorder=0)
            axis.tick_params(axis="y", length=0, labelsize="small")
        axes[0].axvline(start, color="0.4", linestyle=":", linewidth=1)
        axes[0].set(xlabel="old facts kept", ylim=(top - 0.8, -0.8))
        axes[0].set_yticks([*headings, *rows], [*headings.values(), *(text for text, _ in rows.values())])
        for label, group in zip(axes[0].get_yticklabels(), headings.values(), strict=False):
            label.set(weight="bold", color=_COLOURS.get(group, "0.4"))
        figure.suptitle(model)
        legend = "Green: the aim. Dotted: before training. Filled: no other is as good on both and better on one."
        figure.supxlabel(f"{legend}\nMethods that learn less than half as much as SFT are left out.", fontsize="small")
