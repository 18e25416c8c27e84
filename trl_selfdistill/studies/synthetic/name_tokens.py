# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer makes of real names in their prompt, and which tokens of its vocabulary they leave unused."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import islice
from typing import NamedTuple

from .token_pairs import whole_tokens


# Latin letters without accents, after one of the two marks of a space in vocabularies: what can be joined into words
# that differ in more than case and accents. In byte-level vocabularies, other letters are parts of characters.
_BEGINS_WORD = re.compile("[Ġ▁][A-Z][a-z]*")
_GOES_ON = re.compile("[a-z]+")


class NameTokens(NamedTuple):
    """
    The tokens of real names, those of other words, and how the names are made of them.

    Args:
        used (`frozenset[int]`):
            The ids of all tokens of the names.
        shapes (`dict[tuple[bool, ...], int]`):
            How many names have so many tokens, of which those that are `True` begin a word. Only names of letters, in
            two tokens or more.
        real (`tuple[dict[int, str], dict[int, str]]`):
            The names' tokens of letters, as the vocabulary spells them, by id: those that begin a word, and others.
        other (`tuple[dict[int, str], dict[int, str]]`):
            As many that no name uses, or fewer where there are no more: the first of the vocabulary, which are its
            most frequent ones.
    """

    used: frozenset[int]
    shapes: dict[tuple[bool, ...], int]
    real: tuple[dict[int, str], dict[int, str]]
    other: tuple[dict[int, str], dict[int, str]]


class PromptSlot:
    """
    The place of a name in a prompt, and what the tokenizer makes of a name there.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Any fast tokenizer of transformers.
        prompt (`str`):
            Text with `{subject}` where the name belongs.

    Raises:
        `ValueError`: a slow tokenizer, or a prompt in which the name is not a word of its own.
    """

    def __init__(self, tokenizer, prompt: str):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer must be a fast one of transformers, got {type(tokenizer).__name__}; load it with "
                "AutoTokenizer.from_pretrained"
            )
        before, slot, after = prompt.partition("{subject}")
        if not slot or not before.endswith(" ") or after[:1].isalnum():
            raise ValueError(
                f"the question must hold its subject as words of its own, after a space, got the prompt {prompt!r}; "
                "rewrite the question"
            )
        self._tokenizer = tokenizer
        self._before, self._after = before, after
        [before_ids] = self._encode([before[:-1]])
        [around_ids] = self._encode([before[:-1] + after])
        self._num_before, self._num_around = len(before_ids), len(around_ids)

    def name_ids(self, names: Iterable[str]) -> list[list[int]]:
        """The ids of each name's tokens after what stands before it."""
        return [ids[self._num_before :] for ids in self._encode([self._before + name for name in names])]

    def stay(self, names: Sequence[str], name_ids: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the tokenizer makes just `name_ids` of each name in the whole prompt."""
        encoded = self._encode([f"{self._before}{name}{self._after}" for name in names])
        start = self._num_before
        return [
            ids[start : start + len(expected)] == [*expected] and len(ids) == self._num_around + len(expected)
            for ids, expected in zip(encoded, name_ids, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def tokens_of_names(
    names: Iterable[str],
    tokenizer,
    slot: PromptSlot,
    merges: list[tuple[str, str]] | None,
    apart_from: Iterable[str] = (),
) -> NameTokens:
    """
    Reads the tokens of names.

    Args:
        names (`Iterable[str]`):
            Real names.
        tokenizer (`PreTrainedTokenizerFast`):
            Any fast tokenizer of transformers that marks where a word begins.
        slot ([`PromptSlot`]):
            Where the names stand.
        merges (`list[tuple[str, str]]`, *optional*):
            Those of [`~trl_selfdistill.studies.synthetic.token_pairs.bpe_merges`]: tokens that they do not make are
            left out.
        apart_from (`Iterable[str]`, *optional*):
            Further names, whose tokens are left out of `other`.

    Raises:
        `ValueError`: no name of letters has two tokens.
    """
    encoded = slot.name_ids(sorted(set(names)))
    used = frozenset(token for ids in encoded for token in ids)
    begin, go_on = _letter_tokens(tokenizer)
    shapes = Counter(
        tuple(token in begin for token in ids)
        for ids in encoded
        if len(ids) > 1 and ids[0] in begin and all(token in begin or token in go_on for token in ids)
    )
    if not shapes:
        raise ValueError(
            f"facts: none of the {len(encoded)} names is of two tokens or more that are Latin letters without accents "
            "and mark where a word begins; give more names, or take UUID keys"
        )
    real = tuple({token: text for token, text in tokens.items() if token in used} for tokens in (begin, go_on))
    kept_apart = used.union(*slot.name_ids(sorted(set(apart_from))))
    other = tuple(
        dict(islice(_unused(tokens, kept_apart, merges), len(real_tokens)))
        for tokens, real_tokens in zip((begin, go_on), real, strict=True)
    )
    return NameTokens(used, dict(sorted(shapes.items())), real, other)


def token_overlap(key_ids: Sequence[int], name_tokens: Set[int]) -> float:
    """
    The share of a key's tokens that real names use, in [0, 1].

    ```python
    >>> token_overlap([5, 8, 5, 9], {5, 6, 7})
    0.5
    ```

    Args:
        key_ids (`Sequence[int]`):
            What the tokenizer makes of the key, one token or more.
        name_tokens (`Set[int]`):
            The tokens of real names, such as [`NameTokens`]'s `used`.
    """
    return sum(token in name_tokens for token in key_ids) / len(key_ids)


def _letter_tokens(tokenizer) -> tuple[dict[int, str], dict[int, str]]:
    """The tokens of letters that begin a word, and those that go on with one. Added tokens are neither."""
    added = set(tokenizer.get_added_vocab().values())
    vocabulary = {index: text for text, index in tokenizer.get_vocab().items() if index not in added}
    ordered = sorted(vocabulary.items())
    begin = {index: text for index, text in ordered if _BEGINS_WORD.fullmatch(text)}
    return begin, {index: text for index, text in ordered if _GOES_ON.fullmatch(text)}


def _unused(tokens: dict[int, str], used: Set[int], merges: list[tuple[str, str]] | None) -> Iterator[tuple[int, str]]:
    ids = {text: index for index, text in tokens.items() if index not in used}
    return ((ids[text], text) for text in whole_tokens(ids, merges))
