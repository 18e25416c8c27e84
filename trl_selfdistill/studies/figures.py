# SPDX-License-Identifier: Apache-2.0
"""What all figures share: the style file beside this one, and names at the ends of lines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


STYLE = Path(__file__).with_suffix(".mplstyle")


@contextmanager
def page_figure(path: Path, height: float = 2.8) -> Iterator:
    """A matplotlib `Figure` as wide as a page, 7 inches, and `height` inches high, in our style. Saved at the end."""
    from matplotlib import rc_context  # of the extra `study`, which training does without
    from matplotlib.figure import Figure

    with rc_context(fname=STYLE):
        figure = Figure(figsize=(7, height))
        yield figure
        figure.savefig(path)


def label_ends(axis) -> None:
    """Names each line with a label beside its right end, in its colour. Names keep a line's height apart."""
    low, high = axis.get_ylim()
    place = float("inf")
    for line in sorted(axis.get_lines(), key=lambda line: -line.get_ydata()[-1]):
        if not line.get_label().startswith("_"):
            place = min((line.get_ydata()[-1] - low) / (high - low), place - 0.09)
            axis.text(1.02, place, line.get_label(), color=line.get_color(), va="center", transform=axis.transAxes)
