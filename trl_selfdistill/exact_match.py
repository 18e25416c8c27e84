# SPDX-License-Identifier: Apache-2.0
"""The only judge of answers: exact match with any accepted form, after SQuAD's normalisation.

Only the standard library is imported: the metric and the scripts use it without torch.
"""

import re
import string
import unicodedata
from collections.abc import Iterable


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """
    Normalises as SQuAD's evaluation script does (lower case, no ASCII punctuation, no English articles, single
    spaces), after Unicode's NFKC, which folds full-width letters and composed accents.

    ```python
    >>> normalize_answer(" The  Hague. ")
    'hague'
    ```
    """
    text = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, accepted: Iterable[str]) -> bool:
    """
    Whether `prediction` equals any of the `accepted` forms of the answer (the answer and its aliases) after
    [`normalize_answer`]. A prediction that normalises to nothing never matches.

    ```python
    >>> exact_match("the Netherlands.", ["Netherlands", "Holland"])
    True
    ```
    """
    normalized = normalize_answer(prediction)
    return bool(normalized) and any(normalized == normalize_answer(form) for form in accepted)
