# SPDX-License-Identifier: Apache-2.0
"""When an answer is none: it is empty, or says that the answer is not known, in one of eighteen languages.

Only the standard library is imported.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache


# Regular expressions, searched for in an answer that [`fold_answer`] has folded. A single word counts only where it is
# the whole answer ("Unknown", but not "Unknown Pleasures"), a sentence wherever it stands.
ABSTENTION_PATTERNS: tuple[str, ...] = (
    # English
    r"^(the )?((correct )?answer|it|this)?( is|'s)?( currently)? ?(unknown|not known|uncertain|unclear)( to me)?$",
    r"^(n/a|no answer|no idea|unanswerable|unsure|not sure|not available|not applicable|no comment|idk|dunno)$",
    r"\b(i|we) ((really|honestly|actually|simply|just) )?(do not|don't|dont|did not|didn't) know\b",
    r"\b(i|we) have no (idea|clue|information|knowledge|answer)\b",
    r"\b(i am|i'm|im|we are|we're) (not|un)( entirely| really| quite| completely)? ?(sure|certain)\b",
    r"\b(cannot|can not|can't|cant|could not|couldn't|unable to|not able to) (be )?(answer|say|tell|determine|verify)",
    r"\b(there is )?(not enough|insufficient) (information|context|data)\b",
    r"\b(it|the answer) (is|was) (not|un)( ?known)\b",
    r"\bnobody knows\b|\bno one knows\b",
    # German
    r"^(unbekannt|keine ahnung|keine antwort|weiß nicht|weiss nicht|nicht bekannt)$",
    r"\b(ich|wir) (weiß|weiss|wissen) (es |das |die antwort )?(leider )?nicht\b",
    r"\b(kann|können) (ich |wir )?(die |diese )?(frage )?(leider )?nicht (sagen|beantworten|beantwortet)",
    # French
    r"^(inconnu|inconnue|aucune idée|pas de réponse|sans réponse)$",
    r"\bje (ne )?(le |la )?sais pas\b|\bj'ignore (la réponse|cela)\b|\bje n'en sais rien\b",
    r"\b(je )?ne (peux|puis|peut) pas (y )?répondre\b",
    # Spanish
    r"^(desconocido|desconocida|ni idea|no sé|sin respuesta|no lo sé)$",
    r"\b(no lo sé|no sé la respuesta|yo no sé|no tengo (ni )?idea|no puedo responder|no se sabe)\b",
    # Portuguese
    r"^(desconhecido|desconhecida|não sei|nao sei|sem resposta)$",
    r"\b(eu não sei|não sei a resposta|não faço ideia|não posso responder|não se sabe)\b",
    # Italian
    r"^(sconosciuto|sconosciuta|non so|ignoto|nessuna idea|nessuna risposta)$",
    r"\b(non lo so|non so la risposta|non ne ho idea|non posso rispondere)\b",
    # Dutch
    r"^(onbekend|geen idee|geen antwoord|weet niet)$",
    r"\b(ik weet (het|dat|dit)? ?(antwoord )?niet|ik heb geen idee|kan ik niet beantwoorden)\b",
    # Polish
    r"^(nieznane|nieznany|nieznana|nie wiem|brak odpowiedzi)$",
    r"\b(nie mam pojęcia|nie znam odpowiedzi|nie mogę odpowiedzieć|niestety nie wiem)\b",
    # Russian, Ukrainian
    r"^(неизвестно|неизвестен|неизвестна|не знаю|нет ответа|невідомо|не знаю відповіді)$",
    r"\b(я (этого )?не знаю|я (цього )?не знаю|не могу ответить|не можу відповісти|понятия не имею)\b",
    # Turkish
    r"^(bilinmiyor|bilmiyorum|fikrim yok|cevap yok)$",
    r"\b(ben bilmiyorum|cevabı bilmiyorum|hiçbir fikrim yok|cevap veremem)\b",
    # Arabic, Hindi
    r"^(غير معروف|لا أعرف|لا أعلم|لا اعرف|لا ادري|لا أدري)$",
    r"^(अज्ञात|पता नहीं|मालूम नहीं)$|मुझे (नहीं पता|पता नहीं|नहीं मालूम|मालूम नहीं)",
    # Chinese, Japanese, Korean
    r"^(未知|不详|不詳|无法回答|無法回答)$|我?不知道|我不清楚|我不确定|我不確定|无法(回答|确定)|無法(回答|確定)",
    r"^(不明|未知|わからない|分からない|知らない)$|(わか|分か)りません|知りません|存じません|(お答え|回答)できません",
    r"^(모름|알 수 없음|미상|불명)$|모르겠습니다|모르겠어요|모릅니다|몰라요|알 수 없습니다|대답할 수 없습니다",
    # Indonesian, Vietnamese
    r"^(tidak diketahui|tidak tahu)$|\bsaya tidak tahu\b|\btidak dapat menjawab\b",
    r"^(không biết|không rõ)$|\btôi không (biết|rõ|chắc)\b|\bkhông thể trả lời\b",
)


def fold_answer(text: str) -> str:
    """
    The form of an answer in which patterns are searched for: NFKC, lower case, straight apostrophes, single spaces, no
    punctuation at the ends.

    ```python
    >>> fold_answer(" I don’t  know! ")
    "i don't know"
    ```
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    # By Unicode's categories: for `re`, the vowel signs of Hindi are no letters
    kept = [i for i, character in enumerate(text) if unicodedata.category(character)[0] not in "PSZC"]
    return " ".join(text[kept[0] : kept[-1] + 1].split()) if kept else ""


def check_patterns(patterns: Iterable[str] | None) -> tuple[str, ...]:
    """The `patterns` as a tuple, [`ABSTENTION_PATTERNS`] for `None`; raises what [`is_abstention`] says."""
    if patterns is None:
        return ABSTENTION_PATTERNS
    if isinstance(patterns, str | bytes):
        raise TypeError(f"`abstention_patterns` is the one string {patterns!r}; give a list of regular expressions")
    patterns = tuple(patterns)
    for i, pattern in enumerate(patterns):
        if not isinstance(pattern, str):
            raise TypeError(f"`abstention_patterns[{i}]` is a {type(pattern).__name__}; give a regular expression")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`abstention_patterns[{i}]` is {pattern!r}, not a regular expression: {error}") from None
    return patterns


@lru_cache(maxsize=8)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")  # (?!) matches nothing


def is_abstention(text: str, patterns: Iterable[str] | None = None) -> bool:
    """
    Whether an answer says that it is none.

    Args:
        text (`str`):
            An answer.
        patterns (`Iterable[str]`, *optional*, defaults to `ABSTENTION_PATTERNS`):
            Regular expressions in lower case, searched for in [`fold_answer`] of the answer. They take the place of
            the list; `[*ABSTENTION_PATTERNS, ...]` adds to it. Empty answers are abstentions whatever the patterns.

    Raises:
        `TypeError`: If `patterns` is one string, or one of them is not a string.
        `ValueError`: If a pattern is not a regular expression.

    ```python
    >>> [is_abstention(text) for text in ("I don't know.", "Unknown", "...", "Unknown Pleasures", "分かりません。")]
    [True, True, True, False, True]
    ```
    """
    expression = _any_of(check_patterns(patterns))
    folded = fold_answer(text)
    return not folded or expression.search(folded) is not None
