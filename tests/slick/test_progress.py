# SPDX-License-Identifier: Apache-2.0
"""Progress in a file: whole lines, one at the beginning and the end, others when time has passed."""

import io

import pytest

from trl_selfdistill.slick import progress


@pytest.mark.parametrize(("seconds", "expected"), [(30, ["0", "3"]), (0, ["0", "1", "2", "3", "3"])])
def test_a_file_gets_lines_and_a_terminal_a_bar(monkeypatch, seconds, expected):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", seconds)
    file, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for output in (file, terminal):
        with progress.Progress(total=3, desc="work", unit="step", file=output) as bar:
            for _ in range(3):
                bar.update()
                bar.set_postfix(loss=0.5, refresh=False)
    lines = file.getvalue().splitlines()
    assert [line.split(" of 3 steps")[0] for line in lines] == [f"work: {n}" for n in expected]
    assert "\r" not in file.getvalue() and lines[-1].endswith("to go, loss=0.5")
    assert "\r" in terminal.getvalue() and "100%" in terminal.getvalue()
