# SPDX-License-Identifier: Apache-2.0
"""Names for entities that do not exist, made of tokens, of which a chosen share is from real names.

The paper (arXiv 2604.15574, section 5) compares such keys with UUIDs, which are longer and share few tokens.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from itertools import accumulate, islice


# Latin letters without accents, after one of the two marks of a space: in byte-level vocabularies, other letters are
# parts of characters.
_BEGINS_WORD = re.compile("[Ġ▁][A-Z][a-z]*")
_GOES_ON = re.compile("[a-z]+")
# After so many draws for one key there is hardly any choice left.
_MAX_DRAWS = 1000
# At most this share of all sequences of tokens is asked for: not all come back, and new keys are to be found quickly.
_MAX_FILL = 0.25


class TokenKeys:
    """
    Keys of one or more words, each in the shape of a real name: as many tokens, of which the same begin a word.

    A token is drawn evenly among those of the real names, or among as many that no name uses, the most frequent of the
    vocabulary. A key is kept if the tokenizer makes just these tokens of it in the prompt. The shapes depend on the
    names and the seed, not on the overlap.

    Args:
        names (`Iterable[str]`):
            Real names. Those of one token or of other characters than plain Latin letters lend no shapes.
        tokenizer (`PreTrainedTokenizerFast`): Any fast tokenizer that marks where a word begins.
        prompt (`str`): The text in which the keys will stand, with `{subject}` in their place.
        overlap (`float`):
            Share of tokens from real names, in [0, 1]. Of n tokens it is `overlap * n`, rounded up or down at random
            so that the mean is right.
        apart_from (`Iterable[str]`, *optional*): Further names, of whose tokens only those of `names` are used.

    Raises:
        ValueError: If a key is not a word of its own in the prompt, or no name is of letters.
    """

    def __init__(self, names: Iterable[str], tokenizer, prompt: str, overlap: float, apart_from: Iterable[str] = ()):
        self._tokenizer, self._overlap = tokenizer, overlap
        self._before, found, self._after = prompt.partition(" {subject}")
        if not found or self._after[:1].isalnum():
            raise ValueError(f"the question must hold its subject as words of its own, after a space, got {prompt!r}")
        around = tokenizer([self._before, self._before + self._after], add_special_tokens=False)["input_ids"]
        self._num_before, self._num_after = len(around[0]), len(around[1]) - len(around[0])
        names = sorted(set(names))
        ids_of_all = self._ids_in_prompt([*names, *apart_from])
        encoded = ids_of_all[: len(names)]
        begin, go_on = _letter_tokens(tokenizer)
        shapes = Counter(
            tuple(token in begin for token in ids)
            for ids in encoded
            if len(ids) > 1 and ids[0] in begin and all(token in begin or token in go_on for token in ids)
        )
        if not shapes:
            raise ValueError(
                f"facts: none of the {len(encoded)} names is of two tokens or more of plain Latin letters; give more "
                "names, or take UUID keys"
            )
        self._shapes = dict(sorted(shapes.items()))
        self._cumulative_counts = [*accumulate(self._shapes.values())]
        used = {token for ids in encoded for token in ids}
        apart = used.union(*ids_of_all)
        # Ids and texts, by whether they begin a word and whether they are of real names
        self._pools: dict[tuple[bool, bool], list[tuple[int, str]]] = {}
        for begins, tokens in ((True, begin), (False, go_on)):
            real = [token for token in tokens.items() if token[0] in used]
            other = (token for token in tokens.items() if token[0] not in apart)
            self._pools[begins, True] = real
            self._pools[begins, False] = [*islice(other, len(real))]

    def _ids_in_prompt(self, names: list[str]) -> list[list[int]]:
        """The ids of each name's tokens, of all those of the prompt with that name."""
        prompts = [f"{self._before} {name}{self._after}" for name in names]
        encoded = self._tokenizer(prompts, add_special_tokens=False)["input_ids"]
        return [ids[self._num_before : len(ids) - self._num_after] for ids in encoded]

    def check_number(self, num_keys: int) -> None:
        """Raises a `ValueError` if `num_keys` are more than a quarter of what one of the shapes allows."""
        kinds = {0: (False,), 1: (True,)}.get(self._overlap, (False, True))
        sizes = {begins: min(len(self._pools[begins, real]) for real in kinds) for begins in (True, False)}
        for shape, count in self._shapes.items():
            num_of_shape = num_keys * count / self._cumulative_counts[-1]
            num_sequences = math.prod(sizes[begins] for begins in shape)
            if not num_sequences or num_of_shape > max(_MAX_FILL * num_sequences, 1):
                raise self._too_few(num_keys)

    def draw(self, num_keys: int, seed: int, taken: Set[str] = frozenset()) -> Iterator[str]:
        """
        Draws keys, no two the same even without case, nor one of `taken`, names in lower case. The same seed gives the
        same keys, and a smaller number the first of them. They are kept, some 100 bytes each.
        """
        taken = {*taken}
        for number in range(num_keys):
            candidates = self._candidates(random.Random(f"key {number} of seed {seed}"))
            for ids, key in islice(candidates, _MAX_DRAWS):
                if key.lower() not in taken and self._ids_in_prompt([key]) == [ids]:
                    break
            else:
                raise self._too_few(num_keys)
            taken.add(key.lower())
            yield key

    def _candidates(self, generator: random.Random) -> Iterator[tuple[list[int], str]]:
        """Texts of one shape without end, each with the ids of the tokens that it is joined from."""
        [shape] = generator.choices([*self._shapes], cum_weights=self._cumulative_counts)
        num_real = int(self._overlap * len(shape) + generator.random())
        lots = [generator.random() for _ in shape]
        least = sorted(lots)[:num_real]
        pools = [self._pools[begins, lot in least] for begins, lot in zip(shape, lots, strict=True)]
        while True:
            tokens = [pool[int(generator.random() * len(pool))] for pool in pools]
            yield [index for index, _ in tokens], "".join(text for _, text in tokens)[1:]

    def _too_few(self, num_keys: int) -> ValueError:
        begin, go_on = len(self._pools[True, True]), len(self._pools[False, True])
        return ValueError(
            f"num_facts={num_keys} keys need more distinct tokens: names have {begin} that begin a word and {go_on} "
            "that go on with one. Ask for fewer, give more names or take a tokenizer with more tokens"
        )


def _letter_tokens(tokenizer) -> tuple[dict[int, str], dict[int, str]]:
    """
    By id, most frequent first, the texts of the tokens that begin a word, with a space, and of those that go on with
    one. Added tokens are neither.
    """
    added = set(tokenizer.get_added_vocab().values())
    vocabulary = sorted((index, text) for text, index in tokenizer.get_vocab().items() if index not in added)
    begin = {index: f" {text[1:]}" for index, text in vocabulary if _BEGINS_WORD.fullmatch(text)}
    return begin, {index: text for index, text in vocabulary if _GOES_ON.fullmatch(text)}
