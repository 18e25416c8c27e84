# SPDX-License-Identifier: Apache-2.0
"""Whether a model lost more of the facts than is tolerated, and how many facts it takes to tell."""

from typing import Literal, NamedTuple

from .intervals import Interval, balance_interval


_MOST_FACTS = 1_000_000


class Verdict(NamedTuple):
    """Whether the loss of accuracy is tolerated."""

    outcome: Literal["within", "beyond", "undecided"]  # too few facts to tell
    loss: Interval  # the accuracy before minus that after, on the same facts, in [-1, 1]
    num_needed: int | None  # facts that would tell, lost and gained in the same shares; None if a million would not


def judge_loss(num_lost: int, num_gained: int, num_facts: int, tolerance: float) -> Verdict:
    """
    Holds the 95 % interval of the loss ([`balance_interval`]) against a tolerance: within it if the whole interval is,
    beyond it if no part of the interval is within.

    Args:
        num_lost (`int`): Facts that were right before and are not right now.
        num_gained (`int`): Facts that were not right before and are right now.
        num_facts (`int`): All facts that were asked.
        tolerance (`float`): The largest loss that is tolerated, a fraction in [0, 1).

    ```python
    >>> judge_loss(0, 0, 100, 0.02).outcome, judge_loss(0, 0, 100, 0.02).num_needed
    ('undecided', 190)
    >>> judge_loss(12, 2, 100, 0.02).outcome
    'beyond'
    ```
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"`tolerance` is {tolerance}; it must be a fraction in [0, 1), such as 0.02")

    def judged(num: int) -> tuple[str, Interval]:
        loss = balance_interval(num_lost * num / num_facts, num_gained * num / num_facts, num)
        return "within" if loss.high <= tolerance else "beyond" if loss.low > tolerance else "undecided", loss

    num_needed = num_facts
    while num_needed <= _MOST_FACTS and judged(num_needed)[0] == "undecided":
        num_needed = int(num_needed * 1.01) + 1
    return Verdict(*judged(num_facts), num_needed if num_needed <= _MOST_FACTS else None)
