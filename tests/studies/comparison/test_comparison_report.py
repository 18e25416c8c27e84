# SPDX-License-Identifier: Apache-2.0
"""What the comparison's report says of made-up outcomes."""

import numpy as np
import pytest
from PIL import Image

from trl_selfdistill.studies.comparison.report import (
    _COLOURS,
    Outcome,
    dominators,
    plot_comparison,
    render_comparison,
    share_of_forgetting,
)


def outcome(label: str, old: int, new: int, group: str = "", cost: float | None = None) -> Outcome:
    """Three seeds alike, of which the first `old` and `new` of 100 facts are right."""
    rows = [np.tile((np.arange(100) < right).astype(float), (3, 1)) for right in (old, new)]
    return Outcome(label, *rows, group, cost)


@pytest.fixture
def before() -> Outcome:
    return outcome("before", 100, 0)


@pytest.fixture
def sft() -> Outcome:
    return outcome("SFT", 50, 100, "SFT", 40.0)


def test_who_is_worse_in_nothing_and_better_in_something_dominates():
    points = {"a": (90, 50), "b": (80, 90), "c": (80, 80), "d": (90, 50), "e": (70, 40)}
    outcomes = [outcome(label, *point) for label, point in points.items()]
    # Equals do not dominate each other
    expected = {"a": "", "b": "", "c": "b", "d": "", "e": "abcd"}
    assert {o.label: "".join(other.label for other in dominators(o, outcomes)) for o in outcomes} == expected


def test_the_share_of_forgetting_is_paired_by_fact(before, sft):
    """Half the facts that SFT loses, or as many others: the same ratio, and only the pairs are as uncertain."""
    same, other = outcome("same", 75, 100), outcome("other", 75, 100)
    other = other._replace(old=other.old[:, ::-1])
    shares = [share_of_forgetting(one, before, sft) for one in (same, other, sft, before)]
    assert [share.value for share in shares] == [0.5, 0.5, 1, 0]
    widths = [share.high - share.low for share in shares]
    assert 0 < widths[0] < widths[1] and widths[2:] == [0, 0]
    # SFT that forgets a fact does not clearly forget, and one that forgets none gives no share
    one, none = (share_of_forgetting(same, before, outcome("SFT", old, 100)) for old in (99, 100))
    assert one.value == 25 and np.isnan([one.low, one.high, none.value]).all()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (98, 99, "- KL (clearly), cost 1.50\n"),
        (90, 95, "- KL, cost 1.50\n"),  # on both bounds
        (98, 95, "- KL, cost 1.50\n"),
        (90, 99, "- KL, cost 1.50\n"),
        (89, 100, "- none; the nearest is KL, cost 1.50\n"),
        (100, 94, "- none; the nearest is KL, cost 1.50\n"),
        (50, 100, "- none; nothing forgets less than SFT\n"),
    ],
)
def test_who_reaches_the_aim(before, sft, old, new, sentence):
    report = render_comparison([sft, outcome("KL", old, new, "KL on anchors", 60.0)], before, "a model")
    assert report.endswith(f":\n\n{sentence}") and "at least 0.95 of SFT's new facts at no more than 0.2" in report


def test_table_and_figure_have_the_methods_of_a_group_together(before, sft, tmp_path):
    names = [*_COLOURS, "another"]
    others = [outcome(f"{group} {i}", 60 + i, 90 - i, group, 60.0) for i, group in enumerate(names)]
    outcomes = [sft, *others, outcome("stopped", 100, 0, "SFT")]
    report = render_comparison(outcomes, before, "a model")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["SFT"] * 3 + names[1:]
    assert rows[2] == ["SFT", "SFT", "0.500 [0.400, 0.600]", "1.000 [0.963, 1.000]", "1.000", "1.00", "yes"]
    assert rows[4] == ["SFT", "stopped", "1.000 [0.963, 1.000]", "0.000 [0.000, 0.037]", "0.000", "-", "yes"]
    assert rows[5][4:] == ["0.780 [0.663, 0.897]", "1.50", "yes"]
    plot_comparison(outcomes, before, "a model", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width == 1400  # 7 inches
