# SPDX-License-Identifier: Apache-2.0
"""Names for entities that do not exist, as like to the names of real ones as is asked for.

The paper (arXiv 2604.15574, section 5) compares keys recombined from the tokens of real names with UUIDs, which differ
in two ways: UUIDs share few tokens with names, and have many more tokens. Here the share of tokens from real names is
chosen, at the lengths of the real names.
"""

from collections.abc import Iterable, Iterator, Set
from typing import NamedTuple

import numpy as np

from .name_tokens import PromptSlot, tokens_of_names
from .token_pairs import TokenPairs, bpe_merges


# Keys are drawn so many at a time, whatever is asked for, so that a longer stream begins like a shorter one.
BATCH_SIZE = 8192
# After so many draws without a token that suits the one before it, or without a new key, there is hardly any choice.
_MAX_TOKEN_DRAWS, _MAX_KEY_DRAWS = 16, 200
# At most this share of what can be built is asked for, so that new keys are found quickly.
_MAX_FILL = 0.5
_PROBE_SIZE = 512


class KeyBatch(NamedTuple):
    """
    Some keys.

    Args:
        texts (`list[str]`):
            The keys.
        token_ids (`np.ndarray`):
            What the tokenizer makes of them in the prompt, shape `(len(texts), longest)`, -1 after the end.
    """

    texts: list[str]
    token_ids: np.ndarray


def random_numbers(seed: int, *stream: int) -> np.random.Generator:
    """
    Random numbers of one of a seed's streams, independent of those of the others.

    Only `random` and `bytes` are drawn from it: numpy promises nothing for the rest from version to version.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


def uuid_batches(seed: int, stream: int, taken: Set[str] = frozenset()) -> Iterator[list[str]]:
    """
    UUIDs (version 4) without end, a list at a time. Two of 10⁶ are the same with a probability of 10⁻²⁵.

    Args:
        seed (`int`), stream (`int`):
            See [`random_numbers`].
        taken (`Set[str]`, *optional*):
            UUIDs that are left out.
    """
    random = random_numbers(seed, stream)
    while True:
        raw = np.frombuffer(random.bytes(16 * BATCH_SIZE), np.uint8).reshape(-1, 16).copy()
        raw[:, 6] = raw[:, 6] & 0x0F | 0x40
        raw[:, 8] = raw[:, 8] & 0x3F | 0x80
        digits = raw.tobytes().hex()
        chunks = (digits[i : i + 32] for i in range(0, len(digits), 32))
        texts = (f"{d[:8]}-{d[8:12]}-{d[12:16]}-{d[16:20]}-{d[20:]}" for d in chunks)
        yield [text for text in texts if text not in taken]


class TokenKeys:
    """
    Keys of one or more words put together from tokens, each in the shape of a real name: as many tokens, of which the
    same begin a word.

    A token is drawn evenly among those of the real names, or among as many that no name uses (the most frequent ones
    of the vocabulary). The tokenizer makes just these tokens of a key: neighbours that it would merge otherwise are
    not drawn ([`TokenPairs`]); with a tokenizer other than BPE each key is tried instead, which is far slower.

    Under one seed, the keys of two instances with the same names have the same shapes, one by one, whatever the
    overlaps.

    Args:
        names (`Iterable[str]`):
            Real names. Those of one token, and those of other characters than Latin letters without accents, lend
            their tokens but not their shapes.
        tokenizer (`PreTrainedTokenizerFast`):
            Any fast tokenizer of transformers that marks where a word begins.
        prompt (`str`):
            The text in which the keys will stand, with `{subject}` in their place.
        overlap (`float`):
            The share of tokens from real names: 1 for recombined names, 0 for pseudo-words. Of n tokens,
            `overlap * n` are from names, rounded up or down at random so that the mean is right.
        apart_from (`Iterable[str]`, *optional*):
            Further names, of which the tokens that are not from `names` share none.

    Attributes:
        name_tokens (`frozenset[int]`):
            The ids of all tokens of the names, for [`~trl_selfdistill.studies.synthetic.name_tokens.token_overlap`].

    Raises:
        `ValueError`: `overlap` is not in [0, 1], a slow tokenizer, a prompt in which a key is not a word of its own,
            or no name of letters.
    """

    def __init__(self, names: Iterable[str], tokenizer, prompt: str, overlap: float, apart_from: Iterable[str] = ()):
        if not 0 <= overlap <= 1:
            raise ValueError(f"overlap must be in [0, 1], the share of tokens from real names, got {overlap}")
        slot = PromptSlot(tokenizer, prompt)
        merges = bpe_merges(tokenizer)
        tokens = tokens_of_names(names, tokenizer, slot, merges, apart_from)
        self.name_tokens = tokens.used
        self._overlap = overlap
        counts = np.array([*tokens.shapes.values()], float)
        self._weights = counts / counts.sum()
        # One row a shape: 0 where a token begins a word, 1 where it goes on, -1 after the end.
        self._shapes = np.full((len(counts), max(map(len, tokens.shapes))), -1)
        for row, shape in zip(self._shapes, tokens.shapes, strict=True):
            row[: len(shape)] = 1 - np.array(shape, int)
        # The pools one after the other: words' beginnings from names, others, then the same for what goes on.
        pools = [tokens.real[0], tokens.other[0], tokens.real[1], tokens.other[1]]
        self._sizes = np.array([len(pool) for pool in pools])
        self._offsets = np.cumsum(self._sizes) - self._sizes
        spelt = [text for pool in pools for text in pool.values()]
        self._pairs = TokenPairs(spelt, spelt[self._offsets[2] :], merges)
        # The last one stands for no token.
        self._ids = np.array([index for pool in pools for index in pool] + [-1])
        self._texts = np.array([text.replace("Ġ", " ").replace("▁", " ") for text in spelt] + [""], object)
        # Asked about each key where neighbours do not decide, or turn out not to.
        self._slot = None
        if merges is None or not all(self._stay(self._probe(), slot)):
            self._slot = slot

    def check_number(self, num_keys: int) -> None:
        """
        Checks that there are enough tokens.

        Raises:
            `ValueError`: `num_keys` are more than half of what can be built in one of the shapes.
        """
        sizes = {0: self._sizes[[1, 3]], 1: self._sizes[[0, 2]]}.get(self._overlap, self._sizes.reshape(2, 2).min(1))
        with np.errstate(divide="ignore"):
            log_sizes, log_share = np.log(sizes), np.log(self._pairs.share())
        num_begin, num_go_on = (self._shapes == 0).sum(1), (self._shapes == 1).sum(1)
        capacity = np.exp(num_begin * log_sizes[0] + np.where(num_go_on, num_go_on * (log_sizes[1] + log_share), 0))
        scarce = int(np.argmax(self._weights * num_keys / np.maximum(capacity, 1e-9)))
        if self._weights[scarce] * num_keys > max(_MAX_FILL * capacity[scarce], 1):
            raise ValueError(self._too_few(num_keys, scarce))

    def batches(self, num_keys: int, seed: int, stream: int = 0, taken: Set[str] = frozenset()) -> Iterator[KeyBatch]:
        """
        Keys, no two the same even without case. To tell, 8 bytes a key are kept.

        [`BATCH_SIZE`] are drawn at a time, whatever is asked for; where there are not so many, one at a time.

        Args:
            num_keys (`int`):
                How many. Fewer are the first ones of more.
            seed (`int`), stream (`int`, *optional*, defaults to `0`):
                See [`random_numbers`].
            taken (`Set[str]`, *optional*):
                Names in lower case that no key may have.

        Raises:
            `ValueError`: there are not so many keys.
        """
        shape_random, mix_random, token_random = (random_numbers(seed, stream, part) for part in range(3))
        seen = np.empty(0, np.uint64)
        for begin in range(0, num_keys, BATCH_SIZE):
            slots = self._draw_slots(shape_random, mix_random, BATCH_SIZE)
            num_left = num_keys - begin
            keys, now_seen = self._draw_keys(slots, token_random, seen, taken)
            if keys is not None:
                seen = now_seen
                yield KeyBatch(keys.texts[:num_left], keys.token_ids[:num_left])
                continue
            for row in slots[:num_left]:
                key, seen = self._draw_keys(row[None], token_random, seen, taken)
                if key is None:
                    shape = (self._shapes == np.where(row < 0, -1, row // 2)).all(1)
                    raise ValueError(self._too_few(num_keys, int(np.flatnonzero(shape)[0])))
                yield key

    def _draw_keys(
        self, slots: np.ndarray, random, seen: np.ndarray, taken: Set[str]
    ) -> tuple[KeyBatch | None, np.ndarray]:
        """A new key for each row of `slots`, `None` if hardly any is left, and the hashes of all seen until then."""
        tokens = np.empty_like(slots)
        texts = np.empty(len(slots), object)
        rows = np.arange(len(slots))
        for _ in range(_MAX_KEY_DRAWS):
            drawn, good = self._draw_tokens(slots[rows], random)
            drawn_texts = self._join(drawn)
            hashes = _hashes(drawn)
            first = np.zeros(len(rows), bool)
            first[np.unique(hashes, return_index=True)[1]] = True
            good &= first & ~_contains(seen, hashes)
            good &= np.array([text.lower() not in taken for text in drawn_texts])
            if self._slot is not None:
                good[good] = self._stay(drawn[good], self._slot)
            new = np.sort(hashes[good])
            seen = np.insert(seen, np.searchsorted(seen, new), new)
            tokens[rows[good]] = drawn[good]
            texts[rows[good]] = np.array(drawn_texts, object)[good]
            rows = rows[~good]
            if not len(rows):
                return KeyBatch(texts.tolist(), self._ids[tokens]), seen
        return None, seen

    def _draw_slots(self, shape_random, mix_random, num_keys: int) -> np.ndarray:
        """The pool of each token, shape `(num_keys, longest)`, -1 after the end."""
        chosen = np.searchsorted(np.cumsum(self._weights), shape_random.random(num_keys), side="right")
        kinds = self._shapes[np.minimum(chosen, len(self._weights) - 1)]
        lengths = (kinds >= 0).sum(1)
        num_real = np.floor(self._overlap * lengths + mix_random.random(num_keys))
        # Which ones: those with the smallest of random numbers.
        order = np.where(kinds >= 0, mix_random.random(kinds.shape), 2.0).argsort(1).argsort(1)
        return np.where(kinds >= 0, 2 * kinds + (order >= num_real[:, None]), -1)

    def _draw_tokens(self, slots: np.ndarray, random) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from the pools `slots`, of the same shape, and whether a key's tokens all suit each other."""
        tokens = np.full(slots.shape, len(self._ids) - 1)
        good = np.ones(len(slots), bool)
        for place in range(slots.shape[1]):
            rows = np.flatnonzero(slots[:, place] >= 0)
            tokens[rows, place] = self._draw(slots[rows, place], random)
            rows = rows[slots[rows, place] >= 2]
            for _ in range(_MAX_TOKEN_DRAWS):
                left, right = tokens[rows, place - 1], tokens[rows, place] - self._offsets[2]
                rows = rows[~self._pairs.stay(left, right)]
                if not len(rows):
                    break
                tokens[rows, place] = self._draw(slots[rows, place], random)
            else:
                good[rows] = False
        return tokens, good

    def _draw(self, pools: np.ndarray, random) -> np.ndarray:
        return self._offsets[pools] + (random.random(len(pools)) * self._sizes[pools]).astype(np.int64)

    def _join(self, tokens: np.ndarray) -> list[str]:
        # A column at a time: a list of lists would keep the garbage collector busy for as long as all the rest takes
        joined = self._texts[tokens[:, 0]]
        for column in tokens.T[1:]:
            joined = joined + self._texts[column]
        return [text[1:] for text in joined.tolist()]

    def _probe(self) -> np.ndarray:
        tokens, good = self._draw_tokens(
            self._draw_slots(random_numbers(0, 0), random_numbers(0, 1), _PROBE_SIZE), random_numbers(0, 2)
        )
        return tokens[good]

    def _stay(self, tokens: np.ndarray, slot: PromptSlot) -> list[bool]:
        ids = [[index for index in row if index >= 0] for row in self._ids[tokens].tolist()]
        return slot.stay(self._join(tokens), ids) if len(tokens) else []

    def _too_few(self, num_keys: int, shape: int) -> str:
        kinds = self._shapes[shape]
        return (
            f"num_facts={num_keys} keys need more distinct tokens: about {self._weights[shape]:.1%} of them have "
            f"{(kinds == 0).sum()} tokens that begin a word and {(kinds == 1).sum()} that go on with one. There are "
            f"{self._sizes[0]} and {self._sizes[2]} such tokens of real names, and {self._sizes[1]} and "
            f"{self._sizes[3]} others. Ask for fewer, give more real names or take a tokenizer with more tokens"
        )


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """A number of 64 bits for each row; that two of 10⁶ have the same by chance has a probability of 10⁻⁸."""
    factors = np.frombuffer(random_numbers(0).bytes(8 * tokens.shape[1]), np.uint64) | np.uint64(1)
    return (tokens.astype(np.uint64) * factors).sum(1, dtype=np.uint64)


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.zeros(len(values), bool)
    places = np.searchsorted(ordered, values)
    return ordered[np.minimum(places, len(ordered) - 1)] == values
