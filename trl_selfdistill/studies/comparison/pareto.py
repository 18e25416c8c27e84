# SPDX-License-Identifier: Apache-2.0
"""Stability against plasticity: what each method keeps of the old facts and learns of the new ones, with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from ...hallucination.bootstrap import Interval
from ..random_effects import random_effects_interval


_FEW = 10  # right or wrong answers


class MethodOutcome(NamedTuple):
    """
    What a method did, over seeds.

    Args:
        label (`str`): Its name for readers.
        old (`np.ndarray` of shape `(num_seeds, num_old_facts)`):
            Right (1) or wrong (0) after training, on old facts that were not trained on.
        new (`np.ndarray` of shape `(num_seeds, num_new_facts)`): The same of the new facts.
        family (`str`, *optional*): What it is a setting of, where the report speaks of that as a whole.
    """

    label: str
    old: np.ndarray
    new: np.ndarray
    family: str = ""


class Tradeoff(NamedTuple):
    """
    A method as a point, in fractions.

    Args:
        label (`str`): The method.
        stability (`Interval`): Accuracy on the old facts.
        plasticity (`Interval`): Accuracy on the new facts.
        dominated_by (`list[str]`): Methods that are at least as good on both and better on one; empty on the front.
        family (`str`, *optional*): What it is a setting of.
    """

    label: str
    stability: Interval
    plasticity: Interval
    dominated_by: list[str]
    family: str = ""


def accuracy_interval(outcomes: np.ndarray) -> Interval:
    """
    Mean accuracy with a 95 % interval over seeds and facts, cut off at 0 and 1: see
    [`~trl_selfdistill.studies.random_effects.random_effects_interval`]. Where fewer than ten facts are right, or
    wrong, which is too few for it, the interval holds Wilson's (1927) for as many facts, too.

    Args:
        outcomes (`np.ndarray` of shape `(num_seeds, num_facts)`): Right or wrong.

    Raises:
        `ValueError`: fewer than two facts.
    """
    value, low, high = random_effects_interval(outcomes)
    num_facts = outcomes.shape[1]
    if min(value, 1 - value) * num_facts < _FEW:
        wilson = binomtest(round(value * num_facts), num_facts).proportion_ci(method="wilson")
        low, high = min(low, wilson.low), max(high, wilson.high)
    return Interval(value, max(low, 0.0), min(high, 1.0))


def find_tradeoffs(outcomes: Sequence[MethodOutcome]) -> list[Tradeoff]:
    """Each method's point, and which others dominate it, by the means."""
    points = [(outcome.old.mean(), outcome.new.mean()) for outcome in outcomes]
    return [
        Tradeoff(
            outcome.label,
            accuracy_interval(outcome.old),
            accuracy_interval(outcome.new),
            [
                other.label
                for other, (old, new) in zip(outcomes, points, strict=True)
                if old >= point[0] and new >= point[1] and (old, new) != point
            ],
            outcome.family,
        )
        for outcome, point in zip(outcomes, points, strict=True)
    ]


def as_json(point: Tradeoff) -> dict:
    """The point as JSON values, fractions."""
    intervals = {"stability": point.stability._asdict(), "plasticity": point.plasticity._asdict()}
    return {**point._asdict(), **intervals}
