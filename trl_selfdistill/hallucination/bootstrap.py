# SPDX-License-Identifier: Apache-2.0
"""Uncertainty of paired outcomes, with numpy alone: the bootstrap interval of a mean and McNemar's exact test."""

import numpy as np

from .intervals import Interval


def mean_interval(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Interval:
    """
    The mean of `values` with its 95 % bootstrap percentile interval.

    A resample is drawn as how often each distinct value comes up, a multinomial draw. This is the bootstrap itself,
    not an approximation, and its cost does not grow with the number of values.

    Args:
        values (`np.ndarray` of shape `(num_values,)`): At least one number; fast where few are distinct.
        resamples (`int`, *optional*, defaults to `10_000`): Resamples, at least 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the resampling.

    ```python
    >>> mean_interval(np.array([1, 0, 0, 1]), seed=0)
    Interval(value=0.5, low=0.0, high=1.0)
    ```
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    size = counts.sum()
    draws = np.random.default_rng(seed).multinomial(size, counts / size, size=resamples)
    low, high = np.percentile(draws @ distinct / size, [2.5, 97.5])
    return Interval(float(counts @ distinct / size), float(low), float(high))


def mcnemar_exact(num_lost: int, num_gained: int) -> float:
    """
    The two-sided p-value of McNemar's exact test: the discordant pairs against a fair coin (McNemar 1947).

    Args:
        num_lost (`int`): Pairs that were right before and are not now.
        num_gained (`int`): Pairs that were not right before and are now.

    ```python
    >>> mcnemar_exact(5, 0), mcnemar_exact(0, 0)
    (0.0625, 1.0)
    ```
    """
    total, fewer = num_lost + num_gained, min(num_lost, num_gained)
    # log of the binomial coefficients C(total, 0..fewer): their products would overflow
    k = np.arange(1, fewer + 1)
    log_coefficients = np.concatenate([[0.0], np.cumsum(np.log((total - k + 1) / k))])
    largest = log_coefficients.max()
    log_tail = largest + np.log(np.exp(log_coefficients - largest).sum()) - total * np.log(2.0)
    return float(min(1.0, 2.0 * np.exp(log_tail)))
