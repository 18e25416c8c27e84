# SPDX-License-Identifier: Apache-2.0
"""Which of the hypotheses on forgetting the measured numbers support, by a rule that is written down here.

What is lost is counted fact by fact: right before the run and wrong after it is 1, the other way round -1. The runs of
a study ask the same held-out facts, so that a bootstrap over facts, drawn alike for all runs, carries the uncertainty
of each difference and slope. It does not cover other seeds; where there are several, a fact's loss is its mean over
them.
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import numpy as np

from .bootstrap import Interval


# A cause that explains less than this share of what name-like keys lose is not the one
MIN_SHARE = 0.5


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
    """

    hypothesis: str
    verdict: Verdict
    rule: str
    numbers: dict[str, Interval]


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
    What each run lost, of each held-out fact.

    Args:
        losses (`dict[str, np.ndarray]`): Of each run, shape `(num_facts,)`, the same facts in the same order: right
            before minus right after, in [-1, 1], as a mean over seeds.
        resamples (`int`, *optional*, defaults to `10_000`): Bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`): Their seed.

    Raises:
        `ValueError`: If the runs did not ask as many facts.
    """

    def __init__(self, losses: dict[str, np.ndarray], resamples: int = 10_000, seed: int = 0):
        sizes = {name: len(values) for name, values in losses.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"`losses` must be of the same facts in each run, got numbers of facts {sizes}.")
        [size] = set(sizes.values())
        generator = np.random.default_rng(seed)
        # How often each fact is drawn; the same draws for every run are what pairs them
        draws = generator.multinomial(size, np.full(size, 1 / size), size=resamples) / size
        self.value = {name: float(values.mean()) for name, values in losses.items()}
        self._resampled = {name: draws @ values for name, values in losses.items()}

    def interval(self, statistic: Callable[[dict], np.ndarray]) -> Interval:
        """The 95 % percentile interval of a function of the runs' mean losses, scalars or arrays alike."""
        low, high = np.percentile(statistic(self._resampled), [2.5, 97.5])
        return Interval(float(statistic({k: np.float64(v) for k, v in self.value.items()})), float(low), float(high))

    def loss(self, run: str) -> Interval:
        """Held-out accuracy before minus after."""
        return self.interval(lambda mean: mean[run])

    def slope(self, runs: list[str], x: np.ndarray) -> Interval:
        """The slope of a line through the runs' losses over `x`."""
        return self.interval(lambda mean: least_squares_slope(x, np.stack([mean[run] for run in runs], axis=-1)))


def judge_capacity(table: LossTable, sizes: list[int], name_like: list[str], foreign: list[str]) -> Finding:
    """
    Capacity: does the loss grow with the number of facts, as much for keys that look like nothing known?

    Args:
        table ([`LossTable`]): The losses.
        sizes (`list[int]`): Numbers of facts, ascending.
        name_like (`list[str]`), foreign (`list[str]`): The runs with name-like and with UUID keys of those sizes.
    """
    x = np.log10(sizes)
    names, others = table.slope(name_like, x), table.slope(foreign, x)

    def shortfall(mean: dict) -> np.ndarray:
        slopes = [least_squares_slope(x, np.stack([mean[run] for run in runs], -1)) for runs in (name_like, foreign)]
        return MIN_SHARE * slopes[0] - slopes[1]

    missing = table.interval(shortfall)
    verdict = Verdict.UNDECIDED
    if others.low > 0 and missing.value <= 0:
        verdict = Verdict.SUPPORTED
    elif names.low > 0 and missing.low > 0:
        verdict = Verdict.CONTRADICTED
    rule = (
        "Supported if the loss grows with log10 of the number of facts for UUID keys (interval above 0), at least "
        f"{MIN_SHARE:.0%} as steeply as for name-like keys. Contradicted if it grows for name-like keys, and for UUID "
        f"keys less than {MIN_SHARE:.0%} as steeply (interval of the shortfall above 0)."
    )
    numbers = {
        "loss per tenfold number of facts, name-like keys": names,
        "loss per tenfold number of facts, UUID keys": others,
        f"{MIN_SHARE:.0%} of the former minus the latter": missing,
    }
    return Finding("capacity", verdict, rule, numbers)


def judge_behaviour_cloning(table: LossTable, known_only: str, name_like: str, without_overlap: list[str]) -> Finding:
    """
    Behaviour cloning: is as much lost on unknown facts whose keys share nothing with known names?

    Args:
        table ([`LossTable`]): The losses.
        known_only (`str`): The run on Known facts alone.
        name_like (`str`): The run with name-like keys.
        without_overlap (`list[str]`): Runs with as many facts whose keys share no tokens with names.
    """
    names = table.interval(lambda mean: mean[name_like] - mean[known_only])

    def excess(mean: dict) -> np.ndarray:
        return np.mean([mean[run] for run in without_overlap], axis=0) - mean[known_only]

    others = table.interval(excess)
    missing = table.interval(lambda mean: MIN_SHARE * (mean[name_like] - mean[known_only]) - excess(mean))
    verdict = Verdict.UNDECIDED
    if others.low > 0 and missing.value <= 0:
        verdict = Verdict.SUPPORTED
    elif names.low > 0 and missing.low > 0:
        verdict = Verdict.CONTRADICTED
    rule = (
        "Supported if unknown facts without overlap cost more than Known facts alone (interval above 0), and at least "
        f"{MIN_SHARE:.0%} of what name-like ones cost. Contradicted if name-like ones cost something, and those "
        f"without overlap less than {MIN_SHARE:.0%} of it (interval of the shortfall above 0)."
    )
    numbers = {
        "loss beyond that of Known facts alone, name-like keys": names,
        "the same, keys without overlap": others,
        f"{MIN_SHARE:.0%} of the former minus the latter": missing,
    }
    return Finding("behaviour cloning", verdict, rule, numbers)


def judge_interference(table: LossTable, overlaps: list[float], runs: list[str]) -> Finding:
    """
    Interference: does the loss grow with the share of tokens that new keys have in common with known names?

    Args:
        table ([`LossTable`]): The losses.
        overlaps (`list[float]`): The shares, ascending.
        runs (`list[str]`): The runs with those shares, of the same number of facts and the same lengths of keys.
    """
    x = np.array(overlaps)
    slope = table.slope(runs, x)
    # What the line says of full overlap has to be mostly slope, or most of the loss has another cause
    mean_loss = table.interval(lambda mean: np.mean([mean[run] for run in runs], axis=0))
    floor = table.interval(
        lambda mean: (
            MIN_SHARE * np.mean([mean[run] for run in runs], axis=0)
            - least_squares_slope(x, np.stack([mean[run] for run in runs], -1))
        )
    )
    verdict = Verdict.UNDECIDED
    if slope.low > 0 and floor.value <= 0:
        verdict = Verdict.SUPPORTED
    elif mean_loss.low > 0 and floor.low > 0:
        verdict = Verdict.CONTRADICTED
    rule = (
        "Supported if the slope of the loss over the overlap is above 0 (whole interval) and at least "
        f"{MIN_SHARE:.0%} of the mean loss. Contradicted if facts are lost, and the slope is less than "
        f"{MIN_SHARE:.0%} of the mean loss (interval of the shortfall above 0)."
    )
    numbers = {
        "slope of the loss from overlap 0 to 1": slope,
        "mean loss over the overlaps": mean_loss,
        f"{MIN_SHARE:.0%} of the latter minus the former": floor,
    }
    return Finding("interference", verdict, rule, numbers)
