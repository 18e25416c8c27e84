# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from study_records import fading_outcomes, make_records

from trl_selfdistill.studies.forgetting import Interval, forgetting, forgetting_difference


def naive_interval(statistic, num_facts: int, resamples: int = 4_000, seed: int = 1) -> tuple[float, float]:
    """The bootstrap as it is written in textbooks, one resample at a time."""
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(num_facts, size=num_facts)) for _ in range(resamples)]
    return tuple(np.percentile(values, [2.5, 97.5]))


def drop(outcomes: np.ndarray, index) -> float:
    accuracy = outcomes[:, index].mean(1)
    return accuracy.max() - accuracy[-1]


@pytest.fixture(scope="module")
def outcomes():
    return fading_outcomes(90, [0.9, 0.95, 0.8, 0.7])


def test_value_is_the_peak_minus_the_end(outcomes):
    assert forgetting(make_records(outcomes), resamples=10).value == pytest.approx((86 - 63) / 90)
    rising = fading_outcomes(90, [0.1, 0.5, 0.9])
    assert forgetting(make_records(rising), resamples=100) == Interval(0.0, 0.0, 0.0)


def test_the_set_that_is_asked_for_counts(outcomes):
    records = make_records(outcomes, new=fading_outcomes(10, [0.0, 1.0, 1.0, 0.5]))
    assert forgetting(records, "new", resamples=10).value == pytest.approx(0.5)


def test_interval_is_that_of_a_naive_bootstrap(outcomes):
    interval = forgetting(make_records(outcomes))
    naive = naive_interval(lambda index: drop(outcomes, index), outcomes.shape[1])
    # The end points are multiples of 1/90, and those of 4000 resamples vary by less than two of them
    assert interval.low == pytest.approx(naive[0], abs=0.02) and interval.high == pytest.approx(naive[1], abs=0.02)
    assert interval.low < interval.value < interval.high and interval.high - interval.low > 0.1


def test_interval_of_the_difference_is_that_of_a_naive_paired_bootstrap(outcomes):
    other = fading_outcomes(90, [0.9, 0.95, 0.95, 0.9], seed=3)
    interval = forgetting_difference(make_records(other), make_records(outcomes))
    naive = naive_interval(lambda index: drop(other, index) - drop(outcomes, index), 90)
    assert interval.value == pytest.approx((86 - 81) / 90 - (86 - 63) / 90)
    assert interval.low == pytest.approx(naive[0], abs=0.025) and interval.high == pytest.approx(naive[1], abs=0.025)


def test_pairing_makes_the_difference_of_equal_arms_exactly_zero(outcomes):
    interval = forgetting_difference(make_records(outcomes), make_records(outcomes))
    assert interval == Interval(0.0, 0.0, 0.0) and not interval.excludes_zero()


def test_a_clear_difference_excludes_zero_and_its_sign_tells_the_direction(outcomes):
    kept = fading_outcomes(90, [0.9, 0.95, 0.95, 0.95])
    less = forgetting_difference(make_records(kept), make_records(outcomes))
    more = forgetting_difference(make_records(outcomes), make_records(kept))
    assert less.excludes_zero() and less.high < 0 and more.excludes_zero() and more.low > 0


def test_a_difference_that_is_luck_includes_zero():
    first, second = (fading_outcomes(40, [0.9, 0.8], seed) for seed in (0, 1))
    second[-1][np.flatnonzero(second[-1])[0]] = False  # one more fact is lost
    interval = forgetting_difference(make_records(second), make_records(first))
    assert interval.value == pytest.approx(1 / 40) and not interval.excludes_zero()


def test_facts_are_paired_by_id_not_by_order(outcomes):
    records = make_records(outcomes)
    turned = [
        record._replace(correct={n: dict(reversed(c.items())) for n, c in record.correct.items()})
        for record in records
    ]
    assert forgetting_difference(records, turned) == Interval(0.0, 0.0, 0.0)
    assert forgetting(turned) == forgetting(records)


def test_seed_makes_it_repeatable(outcomes):
    records = make_records(outcomes)
    assert forgetting(records, seed=0) == forgetting(records, seed=0)
    assert forgetting(records, resamples=300, seed=0) != forgetting(records, resamples=300, seed=1)


def test_runs_on_different_facts_cannot_be_compared(outcomes):
    with pytest.raises(ValueError, match="different facts in the set 'heldout'; evaluate both on the same mix"):
        forgetting_difference(make_records(outcomes), make_records(outcomes[:, 1:], new=outcomes))


@pytest.mark.parametrize(
    "low, high, excludes", [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.2, False)]
)
def test_excludes_zero(low, high, excludes):
    assert Interval(0.0, low, high).excludes_zero() is excludes
