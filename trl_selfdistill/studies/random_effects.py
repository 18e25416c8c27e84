# SPDX-License-Identifier: Apache-2.0
"""The interval of a mean over seeds and facts under the two-way random-effects model: both are a sample of many."""

import numpy as np
from scipy.stats import t as student_t

from ..hallucination.bootstrap import Interval


def random_effects_interval(values: np.ndarray) -> Interval:
    """
    The grand mean of a table of seeds and facts, with a 95 % interval that holds for other seeds and other facts.

    With S seeds, F facts and the mean squares MS of the two-way analysis of variance, the variance of the mean is
    (MS_seeds + MS_facts - MS_error) / (S F), at least MS_facts / (S F); its degrees of freedom are Satterthwaite's
    (1946), at least S - 1 or F - 1, whichever is smaller. With one seed it is the t interval over facts, which says
    nothing about other seeds.

    In simulations of right and wrong answers, 0.91 to 0.99 of the intervals held the mean at 3 seeds and more, 0.87 to
    0.98 at 2: the smaller shares where accuracy differs by 20 points and more from seed to seed. Of a bootstrap that
    draws 3 seeds and the facts anew, 0.75 to 0.99 did. Near an accuracy of 0 or 1 it is too narrow, and of no width
    where all values are the same.

    ```python
    >>> interval = random_effects_interval(np.array([[0.0, 1.0, 1.0, 0.0]]))
    >>> [round(number, 3) for number in interval]
    [0.5, -0.419, 1.419]
    ```

    Args:
        values (`np.ndarray` of shape `(num_seeds, num_facts)`):
            A number for each seed and fact, the same facts in the same order under each seed.

    Raises:
        `ValueError`: fewer than two facts, which do not tell how much facts differ.
    """
    num_seeds, num_facts = values.shape
    if num_facts < 2:
        raise ValueError(f"`values` must be of at least 2 facts for an interval, got {num_facts}; ask more facts.")
    mean, of_seeds, of_facts = values.mean(), values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    freedom = np.array([num_facts - 1.0])
    squares = np.array([num_seeds * of_facts.var(ddof=1)])
    if num_seeds > 1:
        error_freedom = (num_seeds - 1) * (num_facts - 1)
        error = ((values - of_seeds - of_facts + mean) ** 2).sum() / error_freedom
        freedom = np.append(freedom, [num_seeds - 1, error_freedom])
        squares = np.append(squares, [num_facts * of_seeds.var(ddof=1), -error])
    total = max(squares.sum(), squares[0])
    if total == 0:
        return Interval(float(mean), float(mean), float(mean))
    degrees = max(total**2 / (squares**2 / freedom).sum(), freedom.min())
    spread = student_t.ppf(0.975, degrees) * np.sqrt(total / values.size)
    return Interval(float(mean), float(mean - spread), float(mean + spread))
