# SPDX-License-Identifier: Apache-2.0
"""What an answer to a question of fact is: correct, abstained or hallucinated. Standard library only."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from .abstention import check_patterns, is_abstention
from .exact_match import normalize_answer


Outcome = Literal["correct", "abstained", "hallucinated"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "abstained", "hallucinated")


class AnswerJudge:
    """
    Judges answers by one set of rules, and normalises each text once.

    Args:
        match (`str`, *optional*, defaults to `"exact"`):
            `"exact"`: the whole answer is one of the accepted forms. `"contains"`: it has one of them among its words,
            whole words only ("17" is not in "1789"); for models that answer in sentences.
        fold_width (`bool`, *optional*, defaults to `True`):
            See [`~trl_selfdistill.hallucination.exact_match.normalize_answer`].
        strip_accents (`bool`, *optional*, defaults to `False`): As above.
        exact_numbers (`bool`, *optional*, defaults to `False`): As above.
        abstention_patterns (`Iterable[str]`, *optional*):
            See [`~trl_selfdistill.hallucination.abstention.is_abstention`].

    Raises:
        `ValueError`: If `match` is another word, or a pattern is not a regular expression.
        `TypeError`: If an option is of another type.

    ```python
    >>> judge = AnswerJudge()
    >>> [judge.outcome(answer, ["France"]) for answer in ("france.", "I don't know", "Spain")]
    ['correct', 'abstained', 'hallucinated']
    ```
    """

    def __init__(
        self,
        *,
        match: Literal["exact", "contains"] = "exact",
        fold_width: bool = True,
        strip_accents: bool = False,
        exact_numbers: bool = False,
        abstention_patterns: Iterable[str] | None = None,
    ):
        if match not in ("exact", "contains"):
            raise ValueError(f"`match` is {match!r}; it must be 'exact' or 'contains'")
        self.match = match
        self._options = {"fold_width": fold_width, "strip_accents": strip_accents, "exact_numbers": exact_numbers}
        for name, value in self._options.items():
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` is {value!r}; it must be True or False")
        self._patterns = check_patterns(abstention_patterns)
        self._normalized: dict[str, str] = {}
        self._abstained: dict[str, bool] = {}

    def normalize(self, text: str) -> str:
        """`text` as it is compared. An answer of nothing but articles ("A", a blood type) keeps them."""
        if text not in self._normalized:
            normalized = normalize_answer(text, **self._options)
            self._normalized[text] = normalized or normalize_answer(text, strip_articles=False, **self._options)
        return self._normalized[text]

    def outcome(self, prediction: str, accepted: Sequence[str]) -> Outcome:
        """
        `"correct"` if `prediction` matches any of the `accepted` forms, `"abstained"` if it says that it is no answer,
        else `"hallucinated"`.

        An accepted form may itself read like an abstention ("Unknown"): the exact match decides first. A sentence that
        contains the answer and abstains as well ("I don't know, France?") is an abstention.
        """
        answer = self.normalize(prediction)
        forms = [form for form in map(self.normalize, accepted) if form]
        if answer in forms:
            return "correct"
        if prediction not in self._abstained:
            self._abstained[prediction] = is_abstention(prediction, self._patterns)
        if self._abstained[prediction]:
            return "abstained"
        if self.match == "contains" and any(f" {form} " in f" {answer} " for form in forms):
            return "correct"
        return "hallucinated"

    def f1(self, prediction: str, accepted: Sequence[str]) -> float:
        """SQuAD's token F1 of `prediction` with the nearest of the `accepted` forms, in [0, 1]."""
        words = self.normalize(prediction).split()
        return max(_f1(words, self.normalize(form).split()) for form in accepted)


def _f1(words: list[str], others: list[str]) -> float:
    if words == others:
        return float(bool(words))
    num_same = sum((Counter(words) & Counter(others)).values())
    return 2 * num_same / (len(words) + len(others)) if num_same else 0.0
