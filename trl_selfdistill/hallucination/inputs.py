# SPDX-License-Identifier: Apache-2.0
"""The columns that the metric scores, checked before anything is computed. Only the standard library is imported."""

from collections.abc import Iterable, Mapping


# SLiCK's categories (arXiv 2405.05904), as `slick` writes them
SLICK_CATEGORIES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")


def check_texts(values: Iterable[str], name: str, num_rows: int | None = None) -> list[str]:
    """
    `values` as a list of strings.

    Args:
        values (`Iterable[str]`): A list, tuple, array or column.
        name (`str`): Name of the argument, for the errors.
        num_rows (`int`, *optional*): How many there must be, which is how many `predictions` there are.

    Raises:
        `TypeError`: If `values` or one of them has another type; the row is named.
        `ValueError`: If there are none, or not `num_rows`.

    ```python
    >>> check_texts(["France", None], "predictions")
    Traceback (most recent call last):
    TypeError: `predictions[1]` is None; it must be a string (an empty one for no answer)
    ```
    """
    rows = _rows(values, name, num_rows)
    for i, value in enumerate(rows):
        if not isinstance(value, str):
            raise TypeError(f"`{name}[{i}]` is {_shown(value)}; it must be a string (an empty one for no answer)")
    return rows


def check_references(values: Iterable[str | Iterable[str]], num_rows: int | None = None) -> list[list[str]]:
    """
    `values` as a list of lists of accepted answers. A row may be one string or a list of aliases, also mixed.

    Args:
        values (`Iterable`): A string or aliases for each row.
        num_rows (`int`, *optional*): How many there must be, which is how many `predictions` there are.

    Raises:
        `TypeError`: If a row is neither a string nor a list of strings; the row is named.
        `ValueError`: If a row has no answer, or there are not `num_rows`.

    ```python
    >>> check_references(["France", ["Netherlands", "Holland"]])
    [['France'], ['Netherlands', 'Holland']]
    ```
    """
    rows = []
    for i, value in enumerate(_rows(values, "references", num_rows)):
        if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
            raise TypeError(f"`references[{i}]` is {_shown(value)}; it must be a string or a list of strings")
        aliases = [value] if isinstance(value, str) else list(value)
        for j, alias in enumerate(aliases):
            if not isinstance(alias, str):
                raise TypeError(f"`references[{i}][{j}]` is {_shown(alias)}; it must be a string")
        if not aliases:
            raise ValueError(f"`references[{i}]` is empty; it must have at least one answer")
        rows.append(aliases)
    return rows


def check_categories(values: Iterable[str], num_rows: int) -> list[str]:
    """
    `values` as a list of names of SLiCK categories.

    Raises:
        `ValueError`: If a row has another name; it is named. And what [`check_texts`] raises.
    """
    rows = [str(getattr(value, "value", value)) for value in check_texts(values, "categories", num_rows)]
    for i, value in enumerate(rows):
        if value not in SLICK_CATEGORIES:
            raise ValueError(
                f"`categories[{i}]` is {value!r}; the SLiCK categories are {', '.join(SLICK_CATEGORIES)}. Pass other "
                "groups as `relations`."
            )
    return rows


def check_count(value: int, name: str) -> int:
    """`value` if it is an integer of at least 0; raises `TypeError` or `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` is {value!r}; it must be an integer")
    if value < 0:
        raise ValueError(f"`{name}` is {value}; it must be at least 0")
    return value


def _rows(values: Iterable, name: str, num_rows: int | None) -> list:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` is {_shown(values)}; it must be a list with one entry for each prediction")
    rows = list(values)
    if num_rows is None and not rows:
        raise ValueError(f"`{name}` is empty; there is nothing to score")
    if num_rows is not None and len(rows) != num_rows:
        short = min(len(rows), num_rows)
        raise ValueError(
            f"`{name}` has {len(rows)} rows and `predictions` {num_rows}: row {short} is the first without a partner"
        )
    return rows


def _shown(value) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if value is None or isinstance(value, str | list | tuple) else f"{text} ({type(value).__name__})"
