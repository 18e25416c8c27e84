# SPDX-License-Identifier: Apache-2.0
"""What the comparison's report says of made-up outcomes."""

import numpy as np
import pytest
from PIL import Image

from trl_selfdistill.hallucination.intervals import mean_interval
from trl_selfdistill.studies.comparison.report import (
    Outcome,
    dominators,
    plot_comparison,
    render_comparison,
    render_verdict,
)
from trl_selfdistill.studies.comparison.rivals import SELF_DISTILLATION, WITH_OWN_ANSWERS


def outcome(label: str, old: int, new: int, family: str = "") -> Outcome:
    """Three seeds alike, of which the first `old` and `new` of 100 facts are right."""
    rows = [np.tile((np.arange(100) < right).astype(float), (3, 1)) for right in (old, new)]
    return Outcome(label, *rows, family)


def test_who_is_worse_in_nothing_and_better_in_something_dominates():
    points = {"a": (90, 50), "b": (80, 90), "c": (80, 80), "d": (90, 50), "e": (70, 40)}
    outcomes = [outcome(label, *point) for label, point in points.items()]
    # Equals do not dominate each other
    expected = {"a": "", "b": "", "c": "b", "d": "", "e": "abcd"}
    assert {o.label: "".join(other.label for other in dominators(o, outcomes)) for o in outcomes} == expected


@pytest.mark.parametrize(
    ("worse", "where"),
    [((40, 50), "held-out"), ((90, 20), "new"), ((40, 20), "held-out and new"), ((89, 50), "neither")],
)
def test_a_lead_is_clear_where_the_interval_of_the_paired_difference_is_above_zero(worse, where):
    better, worse = outcome("better", 90, 50), outcome("worse", *worse)
    assert (" and ".join(better.clear_leads(worse)) or "neither") == where
    report = render_comparison([better, worse], better, "a model")
    assert f"no: better is better (clear: {where}) " in report and "point estimates" in report


def test_what_is_paired_is_the_fact():
    """One variant is right where the other is and on ten facts more: clear by pairs, not by their own intervals."""
    better, worse = outcome("better", 60, 50), outcome("worse", 50, 50)
    assert mean_interval(better.old == 1).low < mean_interval(worse.old == 1).high
    assert better.clear_leads(worse) == ["held-out"]


def test_of_several_better_ones_the_clearest_is_named():
    outcomes = [outcome("by a hair", 41, 50), outcome("worse", 40, 50), outcome("by far", 90, 50)]
    assert "no: by far is better (clear: held-out)" in render_comparison(outcomes, outcomes[0], "a model")


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        ((95, 50), "Self-distillation is on the front with 1 of 1 settings"),
        ((80, 50), "Self-distillation is not on the front with any of its 1 settings"),
    ],
)
def test_the_report_says_whether_self_distillation_is_on_the_front(ours, sentence, tmp_path):
    outcomes = [outcome("SFT", 70, 90), outcome("LoRA", 90, 60), outcome("λ = 1", *ours, SELF_DISTILLATION)]
    before = outcome("before", 100, 0)
    report = render_comparison(outcomes, before, "a model")
    assert sentence in report and ("is dominated by LoRA" in report) == (ours[0] < 90)
    assert "| SFT " in report and "0.700 [" in report and "Before: 1.000 of the held-out facts" in report
    plot_comparison(outcomes, before, "a model", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width == 1800


def test_own_answers_do_not_put_self_distillation_itself_on_the_front():
    outcomes = [outcome("plain", 80, 80, SELF_DISTILLATION), outcome("helped", 90, 90, WITH_OWN_ANSWERS)]
    assert render_verdict(outcomes)[1:] == [
        "- Self-distillation is not on the front with any of its 1 settings.",
        "- plain is dominated by helped.",
        "- Self-distillation with own answers is on the front with 1 of 1 settings: helped.",
    ]
