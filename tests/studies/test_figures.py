# SPDX-License-Identifier: Apache-2.0
from itertools import combinations

from trl_selfdistill.studies.figures import label_ends, page_figure


def test_lines_have_names_of_their_colours_which_do_not_overlap(tmp_path):
    names = ("a", "price: 5$ or 6$", "b", "c")
    with page_figure(tmp_path / "figure.png") as figure:
        axis = figure.subplots()
        for i, name in enumerate(names):
            axis.plot([0, 1], [0.5, 0.9 - 0.01 * i], label=name)
        axis.plot([0, 1], [0, 1])
        label_ends(axis)
        figure.draw_without_rendering()
        boxes = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert tuple(boxes) == names and not any(a.overlaps(b) for a, b in combinations(boxes.values(), 2))
    assert [text.get_color() for text in axis.texts] == [line.get_color() for line in axis.get_lines()[:4]]
