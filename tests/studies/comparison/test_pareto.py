# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from scipy import stats

from trl_selfdistill.studies.comparison.pareto import MethodOutcome, accuracy_interval, find_tradeoffs
from trl_selfdistill.studies.comparison.report import (
    SELF_DISTILLATION,
    WITH_OWN_ANSWERS,
    render_comparison,
    render_verdict,
)


def outcome(label: str, old: float, new: float, family: str = "") -> MethodOutcome:
    facts = np.arange(100) < 100 * np.array([[old], [new]])
    return MethodOutcome(label, *(np.tile(row, (3, 1)).astype(float) for row in facts), family)


def test_who_is_worse_in_nothing_and_better_in_something_dominates():
    points = find_tradeoffs(
        [
            outcome(*point)
            for point in (("a", 0.9, 0.5), ("b", 0.8, 0.9), ("c", 0.8, 0.8), ("d", 0.9, 0.5), ("e", 0.7, 0.4))
        ]
    )
    assert {point.label: point.dominated_by for point in points} == {
        "a": [],
        "b": [],
        "c": ["b"],
        "d": [],  # equals do not dominate each other
        "e": ["a", "b", "c", "d"],
    }
    assert points[0].stability.value == 0.9 and points[0].plasticity.value == 0.5


def test_the_front_is_what_brute_force_finds():
    generator = np.random.default_rng(0)
    points = generator.integers(0, 8, size=(30, 2)) / 8
    found = find_tradeoffs([outcome(str(i), *point) for i, point in enumerate(points)])
    for point, tradeoff in zip(points, found, strict=True):
        better = [i for i, other in enumerate(points) if (other >= point).all() and (other > point).any()]
        assert tradeoff.dominated_by == [str(i) for i in better]


@pytest.mark.parametrize("seed_effect", [0.0, 0.3])
def test_intervals_of_three_seeds_hold_the_truth_as_often_as_they_say(seed_effect):
    """Whether seeds differ or not, 95 % of the intervals should hold the mean (a bootstrap's: 82 % where they do)."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        seeds, facts, noise = (generator.normal(0, 1, shape) for shape in ((3, 1), (1, 300), (3, 300)))
        interval = accuracy_interval((seed_effect * seeds + 0.5 * facts + noise > 0).astype(float))
        held += interval.low <= 0.5 <= interval.high
    assert 930 <= held <= 990


@pytest.mark.parametrize("right", [30, 50, 97, 100, 0])
def test_with_one_seed_the_interval_is_that_of_facts(right):
    """Student's, and where few are right or wrong Wilson's, too: a sample without a wrong answer proves nothing."""
    outcomes = (np.arange(100) < right).astype(float)[None]
    wilson = stats.binomtest(right, 100).proportion_ci(method="wilson")
    student = stats.ttest_1samp(outcomes[0], 0).confidence_interval() if 0 < right < 100 else wilson
    low, high = student
    if min(right, 100 - right) < 10:
        low, high = max(0, min(low, wilson.low)), min(1, max(high, wilson.high))
    assert accuracy_interval(outcomes) == pytest.approx((right / 100, low, high), abs=1e-12)


def test_the_interval_stays_between_0_and_1_and_needs_two_facts():
    almost = accuracy_interval((np.arange(20) < 19).astype(float)[None])
    assert almost.high == 1.0 and almost.low < 0.9
    with pytest.raises(ValueError, match="at least 2 facts for an interval, got 1"):
        accuracy_interval(np.ones((3, 1)))


def test_more_variation_over_seeds_makes_a_wider_interval():
    facts = (np.arange(100) < 50).astype(float)
    alike, apart = np.tile(facts, (4, 1)), np.stack([np.zeros(100), facts, facts, np.ones(100)])
    widths = [(interval := accuracy_interval(outcomes)).high - interval.low for outcomes in (alike, apart)]
    assert alike.mean() == apart.mean() and widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        ((0.95, 0.5), "Self-distillation is on the front with 1 of 1 settings"),
        ((0.8, 0.5), "Self-distillation is not on the front with any of its 1 settings"),
    ],
)
def test_the_report_says_whether_self_distillation_is_on_the_front(ours, sentence):
    points = find_tradeoffs(
        [outcome("SFT", 0.7, 0.9), outcome("LoRA", 0.9, 0.6), outcome("λ = 1", *ours, SELF_DISTILLATION)]
    )
    text = "\n".join(render_verdict(points))
    assert sentence in text and ("is dominated by LoRA" in text) == (ours[0] < 0.9)
    [before] = find_tradeoffs([outcome("before", 1.0, 0.0)])
    report = render_comparison(points, before, "a model", 3)
    assert sentence in report and "| SFT " in report and "0.700 [" in report


def test_own_answers_do_not_put_self_distillation_itself_on_the_front():
    points = [outcome("plain", 0.8, 0.8, SELF_DISTILLATION), outcome("helped", 0.9, 0.9, WITH_OWN_ANSWERS)]
    assert render_verdict(find_tradeoffs(points))[1:] == [
        "- Self-distillation is not on the front with any of its 1 settings.",
        "- plain is dominated by helped.",
        "- Self-distillation with own answers is on the front with 1 of 1 settings: helped.",
    ]
