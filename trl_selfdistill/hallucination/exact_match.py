# SPDX-License-Identifier: Apache-2.0
"""Exact match of answers after SQuAD's normalization. Only the standard library is imported."""

import re
import string
import unicodedata
from collections.abc import Iterable


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Punctuation, but for a sign before a number and a separator within one (not the comma of thousands)
_PUNCTUATION_OUTSIDE_NUMBERS = re.compile(
    rf"((?<=\d)[./:-](?=\d)|(?<![\w.])-(?=\d))|[{re.escape(string.punctuation)}]"
)
# Latin, Greek and Cyrillic accents; the marks of other scripts are letters, not decoration
_ACCENTS = re.compile("[\u0300-\u036f]")


def normalize_answer(
    text: str, *, fold_width: bool = True, strip_accents: bool = False, exact_numbers: bool = False
) -> str:
    """
    Normalizes as SQuAD's evaluation script does: lower case, no ASCII punctuation, no English articles, single spaces.

    Args:
        text (`str`): An answer.
        fold_width (`bool`, *optional*, defaults to `True`):
            Whether to apply Unicode's NFKC first, which folds full-width letters and composed accents. SQuAD's script
            does not.
        strip_accents (`bool`, *optional*, defaults to `False`):
            Whether Latin, Greek and Cyrillic letters lose their accents ("São Tomé" is "sao tome"). Letters of their
            own, such as the first of "Łódź", stay.
        exact_numbers (`bool`, *optional*, defaults to `False`):
            Whether numbers keep their signs, decimal points and the separators of dates. SQuAD's script drops them, so
            that "17.89" is "1789". A comma goes either way: "1,789" is "1789".
    """
    if fold_width:
        text = unicodedata.normalize("NFKC", text)
    if strip_accents:
        text = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text)))
    text = text.lower()
    if exact_numbers:
        text = _PUNCTUATION_OUTSIDE_NUMBERS.sub(lambda match: match[1] or "", text)
    else:
        text = text.translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, accepted: Iterable[str]) -> bool:
    """
    Whether `prediction` equals one of the `accepted` forms of the answer (the answer and its aliases) after
    [`normalize_answer`]. A prediction of which nothing is left never matches.
    """
    normalized = normalize_answer(prediction)
    return bool(normalized) and any(normalized == normalize_answer(form) for form in accepted)


def spellings(form: str) -> list[str]:
    """
    The form, and the form with the other case of the first letter of its last word. Exact match ignores case, and of
    the right answers that models gave to 250 facts this was the only other spelling (docs/slick.md).

    ```python
    >>> spellings("Swiss Franc")
    ['Swiss Franc', 'Swiss franc']
    ```
    """
    before, space, last = form.rpartition(" ")
    other = before + space + last[:1].swapcase() + last[1:]
    # Some letters have no other case, and that of "\u00df" is two letters, which exact match tells from the one.
    return [form] if other == form or other.lower() != form.lower() else [form, other]
