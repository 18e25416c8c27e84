# SPDX-License-Identifier: Apache-2.0
"""Pieces of Markdown that reports are made of."""

from collections.abc import Iterable, Sequence

from ..hallucination.intervals import Interval


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    A table of cells that are Markdown already. It also reads well in a terminal: columns are padded to their width.

    ```python
    >>> print(markdown_table(["method", "kept"], [["SFT", "0.380"]]))
    | method | kept  |
    | ------ | ----- |
    | SFT    | 0.380 |
    ```
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def format_interval(interval: Interval, signed: bool = False) -> str:
    """
    `value [low, high]` to three digits, with a sign for differences.

    ```python
    >>> format_interval(Interval(0.1, 0.05, 0.15), signed=True)
    '+0.100 [+0.050, +0.150]'
    ```
    """
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
