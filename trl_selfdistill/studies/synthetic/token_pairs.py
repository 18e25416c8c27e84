# SPDX-License-Identifier: Apache-2.0
"""Which tokens may stand side by side in one word without byte-pair encoding (BPE) merging them otherwise.

A sequence of tokens of one word is what BPE makes of its text if and only if that holds for each pair of neighbours
(https://github.com/github/rust-gems/blob/main/crates/bpe/README.md, corollaries II and III). So words can be put
together from tokens without asking the tokenizer again, which would be the slowest step by far.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import numpy as np


_NEVER = 2**62  # the time at which a token is merged away that stays
Spine = list[
    tuple[str, int]
]  # symbols that come to stand at one end of a token, and the rank of what merges them away


class TokenPairs:
    """
    A table of pairs (left token, right token), as bits, of which one asks whether BPE leaves them as they are.

    Args:
        left_tokens (`list[str]`):
            Tokens as the vocabulary spells them, the rows of the table.
        right_tokens (`list[str]`):
            The columns.
        merges (`list[tuple[str, str]]`):
            The merges of BPE, first one first. With `None`, every pair stays as it is.

    Raises:
        `ValueError`: a token that is not in [`whole_tokens`].
    """

    def __init__(self, left_tokens: list[str], right_tokens: list[str], merges: list[tuple[str, str]] | None):
        # Bit j of row i is set if the pair (i, j) would be merged otherwise.
        self._broken = np.zeros((len(left_tokens), (len(right_tokens) + 7) // 8), np.uint8)
        if merges is None:
            return
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        spines = {token: _spines(token, ranks) for token in {*left_tokens, *right_tokens}}
        halves = sorted(token for token, ends in spines.items() if ends is None)
        if halves:
            raise ValueError(f"tokens: BPE does not make {halves[:5]} of their own text; leave them out")
        right_ends = _by_symbol([spines[token][1] for token in left_tokens])
        left_ends = _by_symbol([spines[token][0] for token in right_tokens])
        column = np.empty(self._broken.shape[1] * 8, bool)
        for rank, (left, right) in enumerate(merges):
            if left not in right_ends or right not in left_ends:
                continue
            rows, row_deaths = right_ends[left]
            columns, column_deaths = left_ends[right]
            # The merge happens across the boundary if both symbols are still there at its time. Where one and the
            # same merge is due twice ("l" "l" "l"), BPE takes the left one first.
            rows = rows[: len(rows) - bisect_right(row_deaths, rank)]
            columns = columns[: len(columns) - bisect_left(column_deaths, rank)]
            if len(rows) and len(columns):
                column[:] = False
                column[columns] = True
                self._broken[rows] |= np.packbits(column, bitorder="little")

    def stay(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Whether the tokens of rows `left`, shape `(n,)`, and columns `right`, shape `(n,)`, stay: bool, `(n,)`."""
        return (self._broken[left, right >> 3] >> (right & 7).astype(np.uint8)) & 1 == 0

    def share(self) -> float:
        """The fraction of the pairs that stay; the bits that fill up the last byte of a row count as staying."""
        return 1.0 - float(np.bitwise_count(self._broken).sum(dtype=np.int64)) / max(8 * self._broken.size, 1)


def whole_tokens(tokens: Iterable[str], merges: list[tuple[str, str]] | None) -> Iterator[str]:
    """
    The tokens that BPE makes of their own text, one after the other; all of them if `merges` is `None`.

    ```python
    >>> [*whole_tokens(["ab", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")])]
    ['ab']
    ```
    """
    ranks = {pair: rank for rank, pair in enumerate(merges or ())}
    return (token for token in tokens if merges is None or _spines(token, ranks))


def bpe_merges(tokenizer) -> list[tuple[str, str]] | None:
    """
    The merges of a tokenizer, if its neighbours decide as this module's docstring says.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Any fast tokenizer of transformers.

    Returns:
        `list[tuple[str, str]]`, or `None` for a tokenizer of another kind (Unigram, WordPiece), with dropout, with
        marks inside of words, or with a merge of parts that only later merges make.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return None
    if model.get("end_of_word_suffix"):
        return None
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    first_rank: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first_rank.setdefault(left + right, rank)
    later = any(first_rank.get(part, -1) >= rank for rank, pair in enumerate(merges) for part in pair)
    return None if later else merges


def _spines(token: str, ranks: dict[tuple[str, str], int]) -> tuple[Spine, Spine] | None:
    """
    What stands at the left and at the right end of a token, in turn, while BPE makes it from its characters. `None`
    if it makes several tokens of them.
    """
    symbols = list(token)
    left_end, right_end = [], []
    while len(symbols) > 1:
        rank, place = min(
            (ranks.get(pair, _NEVER), i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False))
        )
        if rank == _NEVER:
            return None
        if place == 0:
            left_end.append((symbols[0], rank))
        if place == len(symbols) - 2:
            right_end.append((symbols[-1], rank))
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [*left_end, (token, _NEVER)], [*right_end, (token, _NEVER)]


def _by_symbol(spines: list[Spine]) -> dict[str, tuple[np.ndarray, list[int]]]:
    """For each symbol the tokens at whose end it stands, longest-lived first, and its deaths in them, ascending."""
    found: dict[str, list[tuple[int, int]]] = {}
    for index, spine in enumerate(spines):
        for symbol, death in spine:
            found.setdefault(symbol, []).append((death, index))
    table = {}
    for symbol, entries in found.items():
        entries.sort(reverse=True)
        table[symbol] = np.array([index for _, index in entries]), [death for death, _ in reversed(entries)]
    return table
