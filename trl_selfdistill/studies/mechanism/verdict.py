# SPDX-License-Identifier: Apache-2.0
"""Which of the hypotheses on forgetting the measured numbers support, by a rule that is written down here.

What is lost is counted fact by fact: right before the run and wrong after it is 1, the other way round -1. The runs of
a study ask the same held-out facts under the same seeds, and each number that a rule looks at is linear in these
losses. It is taken for each seed and fact, and its interval is that of a mean over both: see `random_effects`. Runs
are paired this way, and other seeds are covered, as far as several were run.
"""

from enum import Enum
from typing import NamedTuple

import numpy as np

from ...hallucination.bootstrap import Interval
from ..random_effects import random_effects_interval


# A cause that explains less than this share of what it has to explain is not the one
MIN_SHARE = 0.5
# What was not learnt has taken no room: below this share of new facts learnt, nothing follows for capacity
MIN_LEARNT = 0.5
WHOLE = "Each comparison holds only if its whole interval does."


class Verdict(str, Enum):
    """What the numbers say about a prediction."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"


class Finding(NamedTuple):
    """
    A hypothesis against the numbers.

    Args:
        hypothesis (`str`): Its name.
        verdict ([`Verdict`]): By the rule.
        rule (`str`): The rule in words.
        numbers (`dict[str, Interval]`): What it looked at, by a description.
        learnt (`dict[str, float]`): Share of the new facts that were learnt, by a description of the run.
    """

    hypothesis: str
    verdict: Verdict
    rule: str
    numbers: dict[str, Interval]
    learnt: dict[str, float]


def least_squares_slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """
    The slope of the least-squares line through points.

    ```python
    >>> float(least_squares_slope(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.1, 0.2])))
    0.2
    ```

    Args:
        x (`np.ndarray` of shape `(num_points,)`): At least two different numbers.
        y (`np.ndarray` of shape `(..., num_points)`): The other coordinate.
    """
    centred = x - x.mean()
    return (y @ centred) / (centred @ centred)


class LossTable:
    """
    What each run lost, of each held-out fact under each seed.

    Args:
        losses (`dict[str, np.ndarray]`): Of each run, shape `(num_seeds, num_facts)`, the same seeds and facts in the
            same order: right before minus right after, in [-1, 1].

    Raises:
        `ValueError`: If the runs are not of as many seeds and facts.
    """

    def __init__(self, losses: dict[str, np.ndarray]):
        shapes = {name: values.shape for name, values in losses.items()}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"`losses` must be of the same seeds and facts in each run, got shapes {shapes}.")
        self.losses = losses
        [(self.num_seeds, self.num_facts)] = set(shapes.values())

    def loss(self, run: str) -> Interval:
        """Held-out accuracy before minus after."""
        return random_effects_interval(self.losses[run])

    def beyond(self, run: str, baseline: str) -> np.ndarray:
        """What `run` lost more than `baseline`, shape `(num_seeds, num_facts)`."""
        return self.losses[run] - self.losses[baseline]

    def slope(self, runs: list[str], x: np.ndarray) -> np.ndarray:
        """The slope of the least-squares line through the runs' losses over `x`, `(num_seeds, num_facts)`."""
        return least_squares_slope(x, np.stack([self.losses[run] for run in runs], axis=-1))


class _Share(NamedTuple):
    """Whether what a hypothesis names is [`MIN_SHARE`] of what it has to explain."""

    part: Interval
    whole: Interval
    surplus: Interval  # part - MIN_SHARE * whole

    @classmethod
    def of(cls, part: np.ndarray, whole: np.ndarray) -> "_Share":
        """Of numbers for each seed and fact."""
        return cls(*map(random_effects_interval, (part, whole, part - MIN_SHARE * whole)))

    def verdict(self) -> Verdict:
        """Where there is something to explain: supported if part and surplus are above 0, contradicted if below."""
        if self.whole.low <= 0:
            return Verdict.UNDECIDED
        if self.part.low > 0 and self.surplus.low > 0:
            return Verdict.SUPPORTED
        return Verdict.CONTRADICTED if self.surplus.high < 0 else Verdict.UNDECIDED


def judge_capacity(
    table: LossTable, sizes: list[int], name_like: list[str], foreign: list[str], learnt: dict[str, float]
) -> Finding:
    """
    Capacity: does the loss grow with the number of facts, as much for keys that look like nothing known?

    Args:
        table ([`LossTable`]): The losses.
        sizes (`list[int]`): Numbers of facts, ascending.
        name_like (`list[str]`), foreign (`list[str]`): The runs with name-like and with UUID keys of those sizes.
        learnt (`dict[str, float]`): Of each run, the share of its new facts that were learnt.
    """
    x = np.log10(sizes)
    share = _Share.of(table.slope(foreign, x), table.slope(name_like, x))
    stored = {f"{keys} keys": learnt[runs[-1]] for keys, runs in (("name-like", name_like), ("UUID", foreign))}
    missing = [f"{value:.1%} of those with {keys}" for keys, value in stored.items() if value < MIN_LEARNT]
    rule = (
        "Supported if the loss grows with log10 of the number of facts for both kinds of keys, and for UUID keys more "
        f"than {MIN_SHARE:.0%} as steeply as for name-like ones. Contradicted if it grows for name-like keys, and for "
        f"UUID keys less than {MIN_SHARE:.0%} as steeply. Undecided in any case if less than {MIN_LEARNT:.0%} of the "
        f"new facts of either kind were learnt at the largest number, as what is not learnt takes no room. {WHOLE}"
    )
    if missing:
        rule += f" Learnt of {sizes[-1]:,} facts were only {' and '.join(missing)}."
    numbers = {
        "loss per tenfold number of facts, name-like keys": share.whole,
        "loss per tenfold number of facts, UUID keys": share.part,
        f"the latter minus {MIN_SHARE:.0%} of the former": share.surplus,
    }
    return Finding("capacity", Verdict.UNDECIDED if missing else share.verdict(), rule, numbers, stored)


def judge_behaviour_cloning(
    table: LossTable, known_only: str, name_like: str, without_overlap: dict[str, str], learnt: dict[str, float]
) -> Finding:
    """
    Behaviour cloning: is as much lost on unknown facts whose keys share nothing with known names?

    Args:
        table ([`LossTable`]): The losses.
        known_only (`str`): The run on Known facts alone.
        name_like (`str`): The run with name-like keys.
        without_overlap (`dict[str, str]`): By kind of keys without tokens of names, the run with as many facts.
        learnt (`dict[str, float]`): Of each run with new facts, the share of them that were learnt.
    """
    whole = table.beyond(name_like, known_only)
    shares = {keys: _Share.of(table.beyond(run, known_only), whole) for keys, run in without_overlap.items()}
    verdicts = {share.verdict() for share in shares.values()}
    rule = (
        f"Supported if name-like keys and each kind without overlap ({', '.join(shares)}) cost more than Known facts "
        f"alone, the latter by more than {MIN_SHARE:.0%} of what name-like ones cost beyond these. Contradicted if "
        "name-like ones cost more than Known facts alone, and those of each kind without overlap less than "
        f"{MIN_SHARE:.0%} of it. Learnt or not, they are trained on, which is what the hypothesis blames. {WHOLE}"
    )
    numbers = {"loss beyond that of Known facts alone, name-like keys": random_effects_interval(whole)}
    for keys, share in shares.items():
        numbers[f"the same, {keys}"] = share.part
        numbers[f"the same, {keys}, minus {MIN_SHARE:.0%} of that of name-like keys"] = share.surplus
    stored = {keys: learnt[run] for keys, run in {"name-like keys": name_like, **without_overlap}.items()}
    verdict = verdicts.pop() if len(verdicts) == 1 else Verdict.UNDECIDED
    return Finding("behaviour cloning", verdict, rule, numbers, stored)


def judge_interference(
    table: LossTable, known_only: str, overlaps: list[float], runs: list[str], learnt: dict[str, float]
) -> Finding:
    """
    Interference: does the loss grow with the share of tokens that new keys have in common with known names?

    Args:
        table ([`LossTable`]): The losses.
        known_only (`str`): The run on Known facts alone.
        overlaps (`list[float]`): The shares, ascending.
        runs (`list[str]`): The runs with those shares, of the same number of facts and the same lengths of keys.
        learnt (`dict[str, float]`): Of each run with new facts, the share of them that were learnt.
    """
    x = np.array(overlaps)
    slope = table.slope(runs, x)
    mean = np.mean([table.beyond(run, known_only) for run in runs], axis=0)
    # What the line says of full overlap has to be mostly slope, or most of the loss has another cause
    share = _Share.of(slope, mean + (1 - x.mean()) * slope)
    rule = (
        "Looked at is the least-squares line of the loss beyond that of Known facts alone over the overlap, and its "
        "value at overlap 1. Supported if both are above 0, and its slope more than "
        f"{MIN_SHARE:.0%} of that value. Contradicted if that value is above 0, and the slope less than "
        f"{MIN_SHARE:.0%} of it. Learnt or not: steps towards a fact that is not stored overwrite as well. {WHOLE}"
    )
    numbers = {
        "slope of the loss from overlap 0 to 1": share.part,
        "value of the line at overlap 1": share.whole,
        f"the former minus {MIN_SHARE:.0%} of the latter": share.surplus,
    }
    stored = {f"overlap {overlap:g}": learnt[run] for overlap, run in zip(overlaps, runs, strict=True)}
    return Finding("interference", share.verdict(), rule, numbers, stored)
