# SPDX-License-Identifier: Apache-2.0
"""What the comparison's report says of a lead, and its figure."""

import numpy as np
import pytest
from PIL import Image

from trl_selfdistill.studies.comparison.pareto import MethodOutcome, find_tradeoffs
from trl_selfdistill.studies.comparison.report import clear_lead, plot_tradeoffs, render_comparison


def outcome(label: str, old: int, new: int, num_facts: int = 100) -> MethodOutcome:
    """Three seeds alike, of which the first `old` and `new` of the facts are right."""
    rows = [np.tile((np.arange(num_facts) < right).astype(float), (3, 1)) for right in (old, new)]
    return MethodOutcome(label, *rows)


@pytest.mark.parametrize(
    ("worse", "where"),
    [((40, 50), "held-out"), ((90, 20), "new"), ((40, 20), "held-out and new"), ((89, 50), "neither")],
)
def test_a_lead_is_clear_where_the_interval_of_the_paired_difference_is_above_zero(worse, where):
    better, worse = outcome("better", 90, 50), outcome("worse", *worse)
    assert (" and ".join(clear_lead(better, worse)) or "neither") == where
    points = find_tradeoffs([better, worse])
    report = render_comparison(points, points[0], "a model", 3, [better, worse])
    assert f"no: better is better (clear: {where}) " in report and "point estimates" in report


def test_what_is_paired_is_the_fact():
    """One method is right where the other is and on ten facts more: clear by pairs, not by their own intervals."""
    better, worse = outcome("better", 60, 50), outcome("worse", 50, 50)
    points = find_tradeoffs([better, worse])
    assert points[0].stability.low < points[1].stability.high and clear_lead(better, worse) == ["held-out"]


def test_of_several_better_ones_the_clearest_is_named():
    outcomes = [outcome("by a hair", 41, 50), outcome("worse", 40, 50), outcome("by far", 90, 50)]
    points = find_tradeoffs(outcomes)
    assert points[1].dominated_by == ["by a hair", "by far"]
    assert "no: by far is better (clear: held-out)" in render_comparison(points, points[0], "a model", 3, outcomes)


@pytest.mark.parametrize(("new", "panels"), [((100, 99, 5), 2), ((100, 50, 5), 1), ((100, 99, 98), 1)])
def test_a_crowded_corner_gets_a_panel_of_its_own(tmp_path, new, panels):
    points = find_tradeoffs([outcome(str(i), 90 + i, learnt) for i, learnt in enumerate(new)])
    plot_tradeoffs(points, points[0], "a model", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width == 1500 + 750 * (panels - 1)
