# SPDX-License-Identifier: Apache-2.0
"""Forgetting, with its uncertainty: how far held-out accuracy ends below its peak (arXiv 2604.15574).

The unit of resampling is the fact: every arm answered the same held-out facts, so arms are compared fact by fact.
"""

import numpy as np
from scipy.stats import bootstrap

from ..hallucination.bootstrap import Interval
from .fact_accuracy import AccuracyRecord


def forgetting(
    records: list[AccuracyRecord], name: str = "heldout", resamples: int = 10_000, seed: int = 0
) -> Interval:
    """
    Peak minus final accuracy on the set `name` over a run's `records`.

    The peak is taken within each resample, as within the run: picking the best of several noisy evaluations inflates
    it by about its standard error, in every arm alike.
    """
    return _interval([_outcomes(records, name)], lambda index, outcomes: _drop(outcomes[:, index]), resamples, seed)


def forgetting_difference(
    records: list[AccuracyRecord],
    baseline: list[AccuracyRecord],
    name: str = "heldout",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """
    Forgetting of a run minus that of `baseline`, on the same facts: below 0, the run forgets less.

    Raises:
        ValueError: If the two runs did not answer the same facts.
    """
    pair = [_outcomes(records, name), _outcomes(baseline, name)]
    if records[0].correct[name].keys() != baseline[0].correct[name].keys():
        raise ValueError(f"The runs answered different facts in the set {name!r}; evaluate both on the same mix.")
    return _interval(
        pair, lambda index, ours, theirs: _drop(ours[:, index]) - _drop(theirs[:, index]), resamples, seed
    )


def _outcomes(records: list[AccuracyRecord], name: str) -> np.ndarray:
    """Right (1) or wrong (0) of shape `(num_evaluations, num_facts)`, the facts in the order of their ids."""
    order = sorted(records[0].correct[name])
    return np.array([[record.correct[name][fact_id] for fact_id in order] for record in records], dtype=np.float64)


def _drop(outcomes: np.ndarray) -> np.ndarray:
    """Peak minus final accuracy of outcomes `(num_evaluations, ..., num_facts)`, over the last axis."""
    accuracy = outcomes.mean(-1)
    return accuracy.max(0) - accuracy[-1]


def _interval(arms: list[np.ndarray], statistic, resamples: int, seed: int) -> Interval:
    # Facts are resampled by their index, the same for all arms and evaluations: that is what pairs them.
    index = np.arange(arms[0].shape[1])
    result = bootstrap(
        (index,),
        lambda index, axis: statistic(np.asarray(index), *arms),
        n_resamples=resamples,
        batch=200,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(statistic(index, *arms)), float(low), float(high))
