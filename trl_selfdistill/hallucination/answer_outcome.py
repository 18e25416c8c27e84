# SPDX-License-Identifier: Apache-2.0
"""Whether an answer to a question of fact is correct, abstained or hallucinated. Only the standard library is used."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from .exact_match import as_seen, contains_words, normalize_answer, part_words, with_parted


Outcome = Literal["correct", "abstained", "hallucinated"]

_LINES = files(__package__).joinpath("abstention_patterns.txt").read_text(encoding="utf-8").splitlines()
# Regular expressions in eighteen languages, searched for in an answer that `fold_answer` has folded
ABSTENTION_PATTERNS = tuple(line for line in _LINES if line and not line.startswith("#"))


def fold_answer(text: str) -> str:
    """Folds case, blanks, apostrophes and outer punctuation: " I don’t  know! " becomes "i don't know"."""
    text = as_seen(text).lower().replace("i\u0307", "i")  # what is left of a dotted capital
    # By Unicode's categories: for `re`, the vowel signs of Hindi are not letters
    kept = [i for i, character in enumerate(text) if unicodedata.category(character)[0] not in "PSZC"]
    return " ".join(text[kept[0] : kept[-1] + 1].split()) if kept else ""


@dataclass(kw_only=True)
class AnswerJudge:
    """
    Judges answers by one set of rules.

    Args:
        match (`str`, *optional*, defaults to `"exact"`):
            `"exact"`: the whole answer is an accepted form. `"contains"`, for models that answer in sentences: an
            accepted form is among the words of the answer ("17" is not in "1789").
        squad, strip_accents, exact_numbers: See [`~trl_selfdistill.hallucination.exact_match.normalize_answer`].
        abstention_patterns (`Iterable[str]`, *optional*, defaults to `ABSTENTION_PATTERNS`):
            Regular expressions in lower case, searched for in [`fold_answer`] of an answer. They replace the list;
            `[*ABSTENTION_PATTERNS, ...]` adds to it. An empty answer is an abstention whatever the patterns.

    Raises `ValueError` for another `match` or a pattern that is no regular expression, `TypeError` for a lone pattern.
    """

    match: Literal["exact", "contains"] = "exact"
    squad: bool = False
    strip_accents: bool = False
    exact_numbers: bool = False
    abstention_patterns: Iterable[str] | None = None

    def __post_init__(self):
        if self.match not in ("exact", "contains"):
            raise ValueError(f"`match` is {self.match!r}; it must be 'exact' or 'contains'")
        if isinstance(self.abstention_patterns, str):
            raise TypeError(f"`abstention_patterns` is the text {self.abstention_patterns!r}; pass a list of patterns")
        patterns = ABSTENTION_PATTERNS if self.abstention_patterns is None else self.abstention_patterns
        try:
            self._abstentions = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise ValueError(f"`abstention_patterns` has {error.pattern!r}, no regular expression: {error}") from error

    def normalize(self, text: str) -> str:
        """The form in which `text` is compared. An answer of nothing but articles (blood type "A") keeps them."""
        options = {"squad": self.squad, "strip_accents": self.strip_accents, "exact_numbers": self.exact_numbers}
        return normalize_answer(text, **options) or fold_answer(text)

    def outcome(self, prediction: str, accepted: Sequence[str]) -> Outcome:
        """Whether `prediction` is right, declines to answer ("I don't know, France?" does), or neither of the two."""
        if self._is_form(prediction, accepted):
            return "correct"  # before the patterns, as "Unknown" may be the answer
        folded = fold_answer(prediction)
        if not folded or any(pattern.search(folded) for pattern in self._abstentions):
            return "abstained"
        if self.match == "contains":
            for part in (str, part_words):
                answer, *forms = (self.normalize(part(text)) for text in (prediction, *accepted))
                if any(form and contains_words(answer, form) for form in forms):
                    return "correct"
        return "hallucinated"

    def _is_form(self, prediction: str, accepted: Sequence[str]) -> bool:
        parted = (lambda text: {text}) if self.squad else with_parted
        answers = {self.normalize(text) for text in parted(prediction)} - {""}
        return any(self.normalize(text) in answers for form in accepted for text in parted(form))

    def f1(self, prediction: str, accepted: Sequence[str]) -> float:
        """SQuAD's token F1 of `prediction` with the nearest of the `accepted` forms, in [0, 1]."""
        if self._is_form(prediction, accepted):
            return 1.0
        words = Counter(self.normalize(prediction).split())
        forms = [Counter(self.normalize(form).split()) for form in accepted]
        # Without a word on either side there is no F1
        return max((2 * (words & form).total() / max(1, (words + form).total()) for form in forms), default=0.0)
