# SPDX-License-Identifier: Apache-2.0
"""Exact match of answers, as a person or SQuAD's script would match them. Only the standard library is used."""

import re
import string
import unicodedata
from collections.abc import Iterable
from functools import cache


# Typed one for the other, or the same letter in two encodings
_APOSTROPHES = "`\u00b4\u2018\u2019\u201b\u2032\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\ua78c\u055a\u05f3"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_SIGNS = dict.fromkeys(_APOSTROPHES, "'") | dict.fromkeys(_DASHES, "-") | {"\u2044": "/", "\u2215": "/", "\u066b": "."}
_SIGNS |= {"\u1361": " ", "\u266f": "#"}  # Ethiopic, between words; sharp
# Cedilla for comma below (Romanian), dotless i, ligature, Persian for Arabic letters
_LETTERS = {"\u015f": "\u0219", "\u0163": "\u021b", "\u0131": "i", "\u0153": "oe"}
_LETTERS |= {"\u06cc": "\u064a", "\u06a9": "\u0643"}
_LETTERS |= {"æ": "ae", "\u09ce": "\u09a4\u09cd", "\u05f0": "וו", "\u05f1": "וי", "\u05f2": "יי"}  # Bengali; Yiddish
_CHILLUS = dict(zip("ണനരലളക", "ൺൻർൽൾൿ", strict=True))  # Malayalam's, which older texts write with a joiner
# Variation selectors, blanks that are no spaces, trade marks; and vowel points that readers of Hebrew and Arabic do
# without, with tatweel. The marks of other scripts are letters
_UNSEEN = "\ufe00-\ufe0f\U000e0100-\U000e01ef\u034f\u115f\u1160\u3164\uffa0\u2800\u17b4\u17b5\u180b-\u180d\u180f©®™"
_UNSEEN += "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0670\u06d6-\u06ed"
_STRESS = re.compile("(?<=[аеиоуыэюяієαεηιουω])\u0301+")  # of Cyrillic in dictionaries, of Greek not in capitals
_TONES = re.compile("([ou])([\u0300\u0301\u0303\u0309\u0323])([aey])(?!\\w)")  # Vietnamese, on either vowel
_ACCENTS = re.compile("[\u0300-\u036f]")  # of Latin, Greek and Cyrillic
_ARTICLES = re.compile(r"\b(a|an|the)\b(?![+#-])")
_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A sign before a number and a separator within one (not the comma of thousands)
_IN_NUMBERS = r"(?<=\d)[./:^-](?=\d)|(?<![\w.])-(?=\.?\d)"
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?: \d{3})+(?!\d)")
_IN_NAMES = r"(?<=[^\W_])(?:[+#]+|-(?![\w+#]))"  # C++ and C# are not C, nor are blood types O+ and O- O
# Where words end in a text for `contains`: not at hyphens and full stops, nor in "1,789"
_BREAKS = re.compile(r"[—―…,;:!?/|=<>→“”{}()\[\]、。・،؛]+(?!\d)|['’](?=s\b)|(?<=\b[LlDd])['’]|(?<=ll)['’]")


@cache
def _as_seen(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return " "
    if category in ("Cc", "Cf") or re.match(f"[{_UNSEEN}]", character):
        return ""
    return str(unicodedata.decimal(character)) if category == "Nd" else _SIGNS.get(character, character)


@cache
def _as_word(character: str) -> str:
    is_punctuation = character in string.punctuation or unicodedata.category(character)[0] == "P"
    return "" if is_punctuation else _LETTERS.get(character, character)


def as_seen(text: str) -> str:
    """The text as a reader sees it: NFKC, no invisible characters, one kind of apostrophe, dash, digit and blank."""
    # After a digit NFKC would make 512 of 5½ and 106 of 10⁶
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", re.sub(r"(?<=\d)(?=[²³¹⁰⁴-⁹])", "^", text))
    text = re.sub(f"([{''.join(_CHILLUS)}])\u0d4d\u200d", lambda match: _CHILLUS[match[1]], text)
    return re.sub(r"(?<=\d) - (?=\d)", "-", unicodedata.normalize("NFKC", "".join(map(_as_seen, text))))


def normalize_answer(
    text: str, *, squad: bool = False, strip_accents: bool = False, exact_numbers: bool = False
) -> str:
    """
    Returns the form in which answers are compared: without case, punctuation, English articles beside other words and
    invisible characters, with single spaces. What differs in Unicode alone (full-width letters, composed accents,
    kinds of apostrophes and digits, Arabic and Hebrew vowel points) is the same.

    Args:
        text (`str`): An answer.
        squad (`bool`, *optional*, defaults to `False`):
            Whether to do what SQuAD's script does and no more: lower case, no ASCII punctuation, no English articles.
        strip_accents (`bool`, *optional*, defaults to `False`):
            Whether Latin, Greek and Cyrillic letters lose their accents ("São Tomé" is "sao tome"). Letters of their
            own, such as the first of "Łódź", stay.
        exact_numbers (`bool`, *optional*, defaults to `False`):
            Whether numbers keep their signs, decimal points and the separators of dates. SQuAD's script drops them, so
            that "17.89" is "1789". A comma goes either way: "1,789" is "1789".
    """
    if not squad:
        text = as_seen(as_seen(text).casefold()).replace("i\u0307", "i")  # what is left of a dotted capital
        text = text.replace("\u0565\u0582", "\u0565\u057e")  # Armenian "and", as a ligature and in two letters
        text = unicodedata.normalize("NFC", _STRESS.sub("", unicodedata.normalize("NFD", text)))
    if strip_accents:
        text = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text)))
    kept = [pattern for pattern, is_kept in ((_IN_NUMBERS, exact_numbers), (_IN_NAMES, not squad)) if is_kept]
    parts = re.split(f"({'|'.join(kept)})", text.lower()) if kept else [text.lower()]
    for i in range(0, len(parts), 2):  # the others are in numbers and names
        parts[i] = parts[i].translate(_SQUAD_PUNCTUATION) if squad else "".join(map(_as_word, parts[i]))
    if squad:
        return " ".join(_ARTICLES.sub(" ", "".join(parts)).split())
    text = unicodedata.normalize("NFC", _TONES.sub(r"\1\3\2", unicodedata.normalize("NFD", "".join(parts))))
    text = " ".join(_ARTICLES.sub(" ", text).split() or text.split())  # an answer may be an article: blood type "A"
    return _THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)


# Beginnings of the names of characters whose scripts put no spaces between words
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_UNSPACED += ("JAVANESE", "BALINESE", "TAI ", "NEW TAI", "YI ")
# What follows a Korean noun without a space
_PARTICLES = re.compile(
    "(은|는|이|가|을|를|의|에서?|으?로|와|과|도|만)?(이?(다|고|며|[었였].*)|입니다|이?에요|예요)?( |$)"
)


def part_words(text: str) -> str:
    """The text with blanks for dashes, commas and brackets between words, and for the apostrophes of `l'` and `'s`."""
    return _BREAKS.sub(" ", unicodedata.normalize("NFKC", text))


def contains_words(text: str, words: str) -> bool:
    """
    Whether normalized `words` are among those of a normalized `text`, as whole words. Beside a letter of a script
    without spaces (Chinese, Japanese, Thai ...) any word may end, but within katakana, and before a Korean particle.
    """
    ends = ((match.start(), match.start() + len(words)) for match in re.finditer(f"(?={re.escape(words)})", text))
    return any(_may_part(text, a) and (_may_part(text, b) or bool(_PARTICLES.match(text, b))) for a, b in ends)


def _may_part(text: str, position: int) -> bool:
    if position in (0, len(text)) or " " in text[position - 1 : position + 1]:
        return True
    before, after = text[position - 1 : position + 1]
    scripts = [unicodedata.name(character, "") for character in (before, after)]
    is_katakana, is_korean = ([script.startswith(name) for script in scripts] for name in ("KATAKANA", "HANGUL"))
    # A mark on the character before it, one number, or one foreign name
    if unicodedata.category(after)[0] == "M" or (before.isnumeric() and after.isnumeric()) or all(is_katakana):
        return False
    return any(script.startswith(_UNSPACED) for script in scripts) or is_korean == [False, True]


def exact_match(prediction: str, accepted: Iterable[str]) -> bool:
    """Whether `prediction` and one of `accepted` are equal, and not empty, after [`normalize_answer`]."""
    answers = {normalize_answer(text) for text in with_parted(prediction)} - {""}
    return any(normalize_answer(text) in answers for form in accepted for text in with_parted(form))


def with_parted(text: str) -> set[str]:
    """The text, and the same with blanks for hyphens between letters: "Guinea-Bissau" is "Guinea Bissau", too."""
    return {text, re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", as_seen(text))}


def spellings(form: str) -> list[str]:
    """The form, and that with the other case of its last word's first letter: models write "Swiss franc" as well."""
    before, space, last = form.rpartition(" ")
    other = before + space + last[:1].swapcase() + last[1:]
    # Some letters have no other case, and that of "\u00df" is two letters, which exact match tells from the one.
    return [form] if other == form or other.lower() != form.lower() else [form, other]
