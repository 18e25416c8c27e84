# SPDX-License-Identifier: Apache-2.0
import re
from itertools import combinations

import pytest
from PIL import Image
from study_records import fading_outcomes, make_records, write_result

from trl_selfdistill.hallucination import score_hallucinations
from trl_selfdistill.studies.figures import label_ends, page_figure
from trl_selfdistill.studies.markdown import format_interval
from trl_selfdistill.studies.results import plot_curves, read_result, render_findings, render_table
from trl_selfdistill.studies.stages import report_stage


@pytest.fixture
def folders(tmp_path):
    """Three results: the baseline forgets much, the second hardly anything, the third about as much as the first."""
    new = fading_outcomes(20, [0.0, 0.5, 0.85])
    curves = {"sft": [0.9, 1.0, 0.7], "selfdistill": [0.9, 1.0, 0.975], "frozen": [0.9, 1.0, 0.725]}
    records = {name: make_records(fading_outcomes(80, curve), new) for name, curve in curves.items()}
    return [write_result(tmp_path / name, of_name) for name, of_name in records.items()]


def read(folders) -> list:
    return [read_result(folder) for folder in folders]


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, split as Markdown does."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]


def test_table_holds_the_numbers_of_the_records(folders):
    results = read(folders)
    header, rule, *rows = cells(render_table(results))
    assert header[0] == "variant" and header[3] == "difference from SFT [95 % CI]" and set("".join(rule)) == {"-"}
    assert [row[0] for row in rows] == ["SFT", "Self-distillation", "Frozen groups"]
    assert [row[1] for row in rows] == [f"0.900 / 1.000 / {end}" for end in ("0.700", "0.975", "0.725")]
    assert [row[2][:6] for row in rows] == ["0.300 ", "0.025 ", "0.275 "]
    assert rows[0][3] == "-" and rows[1][3].startswith("-0.275 [-0.") and rows[2][3].startswith("-0.025 [-0.")
    assert [row[4] for row in rows] == ["0.225 / 0.075", "0.013 / 0.013", "0.200 / 0.075"]
    assert rows[0][5:] == ["0.850", "1.000", "1.25", "5.0 M (25%)"]
    for result, row in zip(results, rows, strict=True):
        assert row[2] == format_interval(result.forgetting())


def test_hallucination_rates_are_those_of_the_metric(folders):
    for result in read(folders):
        texts = [[answer.text for answer in record.answers["heldout"].values()] for record in result.records]
        scores = score_hallucinations(texts[-1], ["Peru"] * 80, baseline_predictions=texts[0])
        rates = result.summary()
        names = ("hallucination_rate", "abstention_rate", "induced_hallucination_rate")
        assert all(scores[name] == rates[name] for name in names)
    assert 0 < rates["induced_hallucination_rate"] < rates["hallucination_rate"]
    alone = result._replace(training=result.training | {"started_from": None})
    assert alone.summary()["induced_hallucination_rate"] is None


def test_findings_follow_from_the_intervals(folders):
    less, unclear = render_findings(read(folders)).splitlines()
    assert less.startswith("- Self-distillation forgets clearly less than SFT: it lost 0.025") and "0.300" in less
    assert unclear.startswith("- Frozen groups does not forget clearly more or less than SFT")
    (more, _) = render_findings(read([folders[1], folders[0], folders[2]])).splitlines()
    assert more.startswith("- SFT forgets clearly more than Self-distillation: it lost 0.300")


def test_a_run_without_a_timed_step_has_no_seconds_and_an_unfinished_one_is_named(tmp_path):
    records = make_records(fading_outcomes(10, [1.0, 0.5]))
    folder = write_result(tmp_path / "sft", records, seconds_per_step=None)
    assert cells(render_table(read([folder])))[2][7] == "-"
    (folder / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match="sft holds no finished run: training.json is missing"):
        read([folder])


def test_variants_that_cannot_be_compared_are_refused(folders, tmp_path):
    other = write_result(tmp_path / "other", make_records(fading_outcomes(81, [1.0, 0.5])))
    with pytest.raises(ValueError, match="sft were asked different held-out facts"):
        report_stage([folders[0], other], tmp_path / "report")
    twin = write_result(tmp_path / "more" / "sft", make_records(fading_outcomes(80, [1.0, 0.5])))
    with pytest.raises(ValueError, match="names of their folders.*Rename"):
        report_stage([folders[0], twin], tmp_path / "report")


@pytest.mark.parametrize("file", ["report/curves.png", "selfdistill/README.md", "selfdistill/model_card.json"])
def test_a_figure_or_a_card_that_cannot_be_written_keeps_nothing_else(folders, tmp_path, file, caplog):
    (tmp_path / file).mkdir(parents=True)
    report_stage(folders, tmp_path / "report")
    assert f"Going on without {tmp_path / file}: IsADirectoryError" in caplog.text
    written = [*("report/report.md", "report/results.json"), *(f"{folder.name}/README.md" for folder in folders)]
    assert all((tmp_path / name).is_file() for name in {*written} - {file})


HOSTILE = "a|b <script>alert(1)</script>\n| c | $\\frac{$"


def test_no_name_breaks_the_table_or_the_figure(folders, tmp_path):
    results = [result._replace(name=f"{HOSTILE}{i}") for i, result in enumerate(read(folders))]
    rows = cells(render_table(results))
    assert [len(row) for row in rows] == [9] * 5
    assert "<script>" not in render_table(results) + render_findings(results)
    assert len(render_findings(results).splitlines()) == 2
    plot_curves(results, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.size == (1400, 560)  # 7 inches wide


def test_lines_have_names_of_their_colours_which_do_not_overlap(tmp_path):
    with page_figure(tmp_path / "figure.png") as figure:
        axis = figure.subplots()
        for name, end in {"a": 0.9, "b": 0.89, "c": 0.88, "_": 0.7}.items():
            axis.plot([0, 1], [0.5, end], label=name)
        label_ends(axis)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 3 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(text.get_color() == line.get_color() for text, line in zip(axis.texts, axis.get_lines(), strict=False))
