# SPDX-License-Identifier: Apache-2.0
"""Pieces of Markdown that reports and cards are made of."""

import html
from collections.abc import Iterable, Sequence

from ..hallucination.intervals import Interval


def escape_markdown(value: object) -> str:
    """
    A value for a line or a cell of Markdown: nothing in it can end the cell, or become HTML, a link or an image.

    ```python
    >>> escape_markdown("[a|b]\\n<i>")
    '&#91;a\\\\|b&#93; &lt;i&gt;'
    ```
    """
    text = ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
    text = html.escape(text, quote=False)
    for character in "`*[]":
        text = text.replace(character, f"&#{ord(character)};")
    return " ".join(text.replace("|", "\\|").split())


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
