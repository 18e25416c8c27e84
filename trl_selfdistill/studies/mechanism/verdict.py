# SPDX-License-Identifier: Apache-2.0
"""Which of the hypotheses on forgetting the measured numbers support, by rules that are written down here.

A fact that is right before a run and wrong after it is a loss of 1, the other way round of -1. All numbers that a rule
looks at are linear in the losses: they are computed for each seed and fact and averaged, so that runs are paired.
"""

from typing import Literal, NamedTuple

import numpy as np

from ...hallucination.intervals import Interval, mean_interval
from .variants import MechanismArguments, MechanismVariant, variant_of_overlap


# By the name of a variant, right before minus right after, `(num_seeds, num_facts)`, the same facts in the same order
Losses = dict[str, np.ndarray]
# A cause must explain at least this share of what it has to explain
MIN_SHARE = 0.5
# Facts that were not learnt took no room: below this share of new facts learnt, capacity is undecided
MIN_LEARNT = 0.5
_WHOLE = "Each comparison holds only if its whole interval does."
_RULES = {
    "capacity": "Supported if the loss grows with log10 of the number of facts for both kinds of keys, and for UUID "
    f"keys more than {MIN_SHARE:.0%} as steeply as for name-like ones. Contradicted if it grows for name-like keys, "
    f"and for UUID keys less than {MIN_SHARE:.0%} as steeply. Undecided in any case if less than {MIN_LEARNT:.0%} of "
    f"the new facts of either kind were learnt at the largest number, as what is not learnt takes no room. {_WHOLE}",
    "behaviour cloning": "Supported if name-like keys and each kind without overlap (pseudo-word keys, UUID keys) "
    f"cost more than Known facts alone, the latter by more than {MIN_SHARE:.0%} of what name-like ones cost "
    "beyond these. Contradicted if name-like ones cost more than Known facts alone, and those of each kind without "
    f"overlap less than {MIN_SHARE:.0%} of it. Learnt or not, they are trained on, which is what the hypothesis "
    f"blames. {_WHOLE}",
    "interference": "Looked at is the least-squares line of the loss beyond that of Known facts alone over the "
    "overlap, and its value at overlap 1. Supported if both are above 0, and its slope more than "
    f"{MIN_SHARE:.0%} of that value. Contradicted if that value is above 0, and the slope less than "
    f"{MIN_SHARE:.0%} of it. Learnt or not: steps towards a fact that is not stored overwrite as well. {_WHOLE}",
}


class Finding(NamedTuple):
    """A hypothesis by its name, the verdict on it, the rule in words, and the numbers that the rule looked at."""

    hypothesis: str
    verdict: Literal["supported", "contradicted", "undecided"]
    rule: str
    numbers: dict[str, Interval]


def judge_capacity(losses: Losses, study: MechanismArguments, learnt: dict[str, float | None]) -> Finding:
    """
    Capacity: does the loss grow with the number of facts, as steeply for keys that look like nothing known? `learnt`
    is the share of its new facts that each variant learnt, by name.
    """
    sizes = sorted(study.num_synthetic_facts)
    name_like, foreign = ([MechanismVariant(size, keys).name for size in sizes] for keys in ("recombined", "uuid"))
    finding = _judge(
        "capacity",
        ("loss per tenfold number of facts, name-like keys", _slope(losses, name_like, np.log10(sizes))),
        {"loss per tenfold number of facts, UUID keys": _slope(losses, foreign, np.log10(sizes))},
    )
    for keys, name in (("name-like", name_like[-1]), ("UUID", foreign[-1])):
        if learnt[name] < MIN_LEARNT:
            rule = f"{finding.rule} Of {sizes[-1]:,} facts with {keys} keys, only {learnt[name]:.1%} were learnt."
            finding = finding._replace(verdict="undecided", rule=rule)
    return finding


def judge_behaviour_cloning(losses: Losses, study: MechanismArguments) -> Finding:
    """Behaviour cloning: is as much lost on unknown facts whose keys share nothing with known names?"""
    known_only = losses[MechanismVariant(0).name]
    costs = {}
    for keys in ("recombined", "pseudo", "uuid"):
        variant = MechanismVariant(study.num_facts_of_overlap, keys)
        costs[f"loss beyond that of Known facts alone, {variant.label}"] = losses[variant.name] - known_only
    name_like, *_ = costs.items()
    return _judge("behaviour cloning", name_like, dict([*costs.items()][1:]))


def judge_interference(losses: Losses, study: MechanismArguments) -> Finding:
    """Interference: does the loss grow with the share of tokens that new keys have in common with known names?"""
    overlaps = np.array(sorted(study.overlaps))
    names = [variant_of_overlap(study.num_facts_of_overlap, overlap).name for overlap in overlaps]
    slope = _slope(losses, names, overlaps)
    mean = np.mean([losses[name] for name in names], axis=0) - losses[MechanismVariant(0).name]
    # At full overlap the line has to be mostly slope, or most of the loss has another cause
    at_full_overlap = mean + (1 - overlaps.mean()) * slope
    return _judge(
        "interference",
        ("value of the line at overlap 1", at_full_overlap),
        {"slope of the loss from overlap 0 to 1": slope},
    )


def _judge(hypothesis: str, whole: tuple[str, np.ndarray], parts: dict[str, np.ndarray]) -> Finding:
    """The one shape of the rules: is each part, by its name, at least [`MIN_SHARE`] of the whole?"""
    whole_name, whole = whole
    numbers, verdicts = {whole_name: mean_interval(whole)}, set()
    for name, part in parts.items():
        surplus_name = f"{name}, minus {MIN_SHARE:.0%} of the {whole_name}"
        numbers |= {name: mean_interval(part), surplus_name: mean_interval(part - MIN_SHARE * whole)}
        verdict = "undecided"
        if numbers[whole_name].low > 0 and numbers[name].low > 0 and numbers[surplus_name].low > 0:
            verdict = "supported"
        elif numbers[whole_name].low > 0 and numbers[surplus_name].high < 0:
            verdict = "contradicted"
        verdicts.add(verdict)
    verdict = verdicts.pop() if len(verdicts) == 1 else "undecided"
    return Finding(hypothesis, verdict, _RULES[hypothesis], numbers)


def _slope(losses: Losses, names: list[str], x: np.ndarray) -> np.ndarray:
    """The slope of the least-squares line through the losses of `names` over `x`, `(num_seeds, num_facts)`."""
    centred = x - x.mean()
    return np.tensordot(centred, [losses[name] for name in names], axes=1) / (centred @ centred)
