# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from PIL import Image
from study_records import fading_outcomes, make_records, write_arm

from trl_selfdistill.hub.markdown import escape_markdown
from trl_selfdistill.studies.report import load_arms, plot_curves, render_findings, render_table


@pytest.fixture
def folders(tmp_path):
    """Three arms: the baseline forgets much, the second hardly anything, the third about as much as the first."""
    new = fading_outcomes(20, [0.0, 0.5, 0.85])
    curves = {"sft": [0.9, 1.0, 0.7], "selfdistill": [0.9, 1.0, 0.975], "frozen": [0.9, 1.0, 0.725]}
    return [
        write_arm(tmp_path / name, make_records(fading_outcomes(80, curve), new)) for name, curve in curves.items()
    ]


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, split as Markdown does."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]


def test_table_holds_the_numbers_of_the_records(folders):
    arms = load_arms(folders)
    header, rule, *rows = cells(render_table(arms))
    assert header[0] == "arm" and header[3] == "difference from SFT [95 % CI]" and set("".join(rule)) == {"-"}
    assert [row[0] for row in rows] == ["SFT", "Self-distillation", "Frozen groups"]
    assert [row[1] for row in rows] == [f"0.900 / 1.000 / {end}" for end in ("0.700", "0.975", "0.725")]
    assert [row[2][:6] for row in rows] == ["0.300 ", "0.025 ", "0.275 "]
    assert rows[0][3] == "-" and rows[1][3].startswith("-0.275 [-0.") and rows[2][3].startswith("-0.025 [-0.")
    assert rows[0][4:] == ["0.850", "1.000", "1.25", "5.0 M (25%)"]
    for arm, row in zip(arms, rows, strict=True):
        assert row[2] == f"{arm.forgetting.value:.3f} [{arm.forgetting.low:.3f}, {arm.forgetting.high:.3f}]"
        assert arm.forgetting.low < arm.forgetting.value < arm.forgetting.high or arm.name == "selfdistill"


def test_findings_follow_from_the_intervals(folders):
    less, unclear = render_findings(load_arms(folders)).splitlines()
    assert less.startswith("- Self-distillation forgets clearly less than SFT: it lost 0.025") and "0.300" in less
    assert unclear.startswith("- Frozen groups does not forget clearly more or less than SFT")
    (more, _) = render_findings(load_arms([folders[1], folders[0], folders[2]])).splitlines()
    assert more.startswith("- SFT forgets clearly more than Self-distillation: it lost 0.300")


def test_summary_is_strict_json_in_fractions(folders):
    summary = load_arms(folders)[1].summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["heldout_curve"] == [0.9, 1.0, 0.975] and summary["epochs"] == [0.0, 1.0, 2.0]
    assert summary["num_facts"] == {"known": 1, "new": 20, "heldout": 80}
    assert summary["forgetting_difference"]["high"] < 0 and "log_history" not in summary


def test_an_arm_without_a_timed_step_has_no_seconds(tmp_path):
    records = make_records(fading_outcomes(10, [1.0, 0.5]))
    arms = load_arms([write_arm(tmp_path / "sft", records, seconds_per_step=None)])
    assert cells(render_table(arms))[2][6] == "-"


@pytest.mark.parametrize("missing", ["accuracy.jsonl", "training.json"])
def test_an_unfinished_arm_is_named(folders, missing):
    (folders[1] / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"selfdistill holds no finished arm: {missing} is missing"):
        load_arms(folders)


def test_arms_on_different_facts_are_refused(folders, tmp_path):
    other = write_arm(tmp_path / "other", make_records(fading_outcomes(81, [1.0, 0.5])))
    with pytest.raises(ValueError, match="different facts"):
        load_arms([folders[0], other])


def test_arms_of_the_same_name_are_refused(folders, tmp_path):
    twin = write_arm(tmp_path / "more" / "sft", make_records(fading_outcomes(80, [1.0, 0.5])))
    with pytest.raises(ValueError, match="names of their folders.*Rename"):
        load_arms([folders[0], twin])


HOSTILE = "a|b <script>alert(1)</script>\n| c | $\\frac{$"


def test_no_name_breaks_the_table_or_the_figure(folders, tmp_path):
    arms = [arm._replace(name=f"{HOSTILE}{i}") for i, arm in enumerate(load_arms(folders))]
    rows = cells(render_table(arms))
    assert [len(row) for row in rows] == [8] * 5
    assert "<script>" not in render_table(arms) + render_findings(arms)
    assert len(render_findings(arms).splitlines()) == 2
    plot_curves(arms, tmp_path / "curves.png", "title")


def test_escape_markdown():
    assert escape_markdown(["re:q|k", "<b>"]) == "re:q\\|k, &lt;b&gt;"
    assert escape_markdown("two\nlines") == "two lines" and escape_markdown(1e-4) == "0.0001"


def test_figure_shows_a_curve_of_each_arm(folders, tmp_path):
    path = tmp_path / "curves.png"
    plot_curves(load_arms(folders), path, "a title")
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG" and image.size == (1500, 600)
    with Image.open(path) as image:
        colours = {colour for count, colour in image.convert("RGB").getcolors(1 << 20) if count > 200}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)} <= colours
