# SPDX-License-Identifier: Apache-2.0
"""Values in Markdown, whatever they hold."""

import html
from collections.abc import Iterable


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
