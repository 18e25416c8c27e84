# SPDX-License-Identifier: Apache-2.0
"""Facts of one relation that no model can know, any number of them, for the study of why fine-tuning forgets.

The paper (arXiv 2604.15574, section 5) trains on 10³ to 10⁶ facts whose keys look like real names, or not at all, with
real values and others. Here keys and values are chosen independently, and facts are drawn while they are read.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from datasets import Dataset, IterableDataset

from ...slick.prompts import question_prompt
from ..facts.invented import folded_names, question_template, rows_of_relation
from .keys import BATCH_SIZE, TokenKeys, random_numbers, uuid_batches


KEY_KINDS = ("recombined", "pseudo", "overlap", "uuid")
VALUE_KINDS = ("real", "uuid")
# Streams of random numbers, so that the keys do not depend on the kind of values, nor the values on that of the keys.
_KEYS, _VALUES = range(2)


class SyntheticFacts:
    """
    The facts of [`synthetic_facts`], which see, as plain rows. What is kept does not grow with their number but for 8
    bytes a key; it can be pickled, and iterating starts afresh each time.
    """

    def __init__(
        self,
        facts: Dataset,
        relation: str,
        num_facts: int,
        tokenizer,
        keys: str = "recombined",
        values: str = "real",
        overlap: float | None = None,
        seed: int = 0,
        exclude: Iterable[str] = (),
        apart_from: Iterable[str] = (),
    ):
        _check_choices(num_facts, keys, values, overlap, seed, {"exclude": exclude, "apart_from": apart_from})
        rows = rows_of_relation(facts, relation)
        self.num_facts = num_facts
        self._relation, self._values, self._seed = relation, values, seed
        self._question = question_template(rows)
        self._taken = frozenset(folded_names(facts, exclude))
        self._forms = {row["answer"]: row["aliases"] for row in rows}
        self.token_keys = None
        if keys != "uuid":
            overlap = {"recombined": 1.0, "pseudo": 0.0}.get(keys, overlap)
            prompt = question_prompt(self._question)
            names = (row["subject"] for row in rows)
            self.token_keys = TokenKeys(names, tokenizer, prompt, overlap, apart_from)
            self.token_keys.check_number(num_facts)
            if num_facts <= BATCH_SIZE:  # chance decides where few names lend few tokens
                for _ in self._key_batches():
                    pass

    def __iter__(self) -> Iterator[dict]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[dict]]:
        """The rows in lists of some thousands."""
        values = self._value_stream()
        around = self._question.split("{subject}")
        num_left = self.num_facts
        for keys in self._key_batches():
            keys = keys[:num_left]
            yield [
                {
                    "fact_id": f"{self._relation}/{key}",
                    "relation": self._relation,
                    "subject": key,
                    "question": key.join(around),
                    "answer": answer,
                    "aliases": [*aliases],
                }
                for key, (answer, aliases) in zip(keys, islice(values, len(keys)), strict=True)
            ]
            num_left -= len(keys)
            if not num_left:
                return

    def _key_batches(self) -> Iterator[list[str]]:
        if self.token_keys is None:
            return uuid_batches(self._seed, _KEYS, self._taken)
        return (batch.texts for batch in self.token_keys.batches(self.num_facts, self._seed, _KEYS, self._taken))

    def _value_stream(self) -> Iterator[tuple[str, list[str]]]:
        """Answers and their aliases without end."""
        if self._values == "uuid":
            for batch in uuid_batches(self._seed, _VALUES):
                yield from ((value, []) for value in batch)
        random = random_numbers(self._seed, _VALUES)
        forms = sorted(self._forms.items())
        while True:  # each answer once, in random order
            yield from (forms[index] for index in random.random(len(forms)).argsort())


def synthetic_facts(
    facts: Dataset,
    relation: str,
    num_facts: int,
    tokenizer,
    keys: str = "recombined",
    values: str = "real",
    overlap: float | None = None,
    seed: int = 0,
    exclude: Iterable[str] = (),
    apart_from: Iterable[str] = (),
) -> IterableDataset:
    """
    Draws facts of a relation on entities that do not exist, while they are read.

    | `keys` | what the subjects are made of |
    |---|---|
    | `"recombined"` | tokens of the relation's real subjects |
    | `"pseudo"` | as many tokens, of letters, none of which a real subject of the relation uses, nor `apart_from` |
    | `"overlap"` | as many tokens, of which the share `overlap` is from real subjects |
    | `"uuid"` | random UUIDs |

    The same seed gives the same facts. Facts of a smaller `num_facts` are the first ones of a larger one. Keys do not
    depend on `values`, nor values on `keys`. Under one seed, the keys of the first three kinds have the same numbers
    of tokens one by one, so that overlap is compared at equal length: see
    [`~trl_selfdistill.studies.synthetic.keys.TokenKeys`].

    Args:
        facts (`Dataset`):
            Real facts, with [`FACT_COLUMNS`]. Those of the relation lend tokens, lengths, the question and answers.
        relation (`str`):
            The relation.
        num_facts (`int`):
            How many. All keys are different, even without case.
        tokenizer (`PreTrainedTokenizerFast`):
            The tokenizer of the model that is to be trained, a fast one of transformers. UUIDs do not need it.
        keys (`str`, *optional*, defaults to `"recombined"`):
            One of the table.
        values (`str`, *optional*, defaults to `"real"`):
            `"real"`: the relation's answers with their aliases, each equally often (give or take one), in random
            order. `"uuid"`: random UUIDs.
        overlap (`float`, *optional*):
            A share in [0, 1], for `keys="overlap"` only. 1 gives the recombined keys, 0 the pseudo-words.
        seed (`int`, *optional*, defaults to `0`):
            At least 0.
        exclude (`Iterable[str]`, *optional*):
            Names that must not be given, beside the subjects, answers and aliases of `facts`, such as
            [`~trl_selfdistill.studies.facts.geonames.known_place_names`]. Compared without case and accents.
        apart_from (`Iterable[str]`, *optional*):
            Further names that pseudo-words share no tokens with, nor the other tokens of `keys="overlap"`: such as
            the subjects of other relations and the answers. They do not change recombined keys and UUIDs.

    Returns:
        `IterableDataset` with [`FACT_COLUMNS`], one shard. After a resume, the facts until then are drawn again.

    Raises:
        `ValueError`: an unknown kind or relation, a number out of its range, a slow tokenizer, a question in which
            the subject is not words of its own, or too few distinct tokens for so many keys. Raised at once; only
            where chance decides whether there are enough, while reading.
    """
    stream = SyntheticFacts(facts, relation, num_facts, tokenizer, keys, values, overlap, seed, exclude, apart_from)
    # Without features: with them, datasets checks each row, which takes longer than drawing it.
    return IterableDataset.from_generator(_rows, gen_kwargs={"stream": stream})


def _rows(stream: SyntheticFacts) -> Iterator[dict]:
    yield from stream


def _check_choices(num_facts, keys, values, overlap, seed, names: dict[str, Iterable[str]]) -> None:
    if keys not in KEY_KINDS:
        raise ValueError(f"keys must be one of {[*KEY_KINDS]}, got {keys!r}")
    if values not in VALUE_KINDS:
        raise ValueError(f"values must be one of {[*VALUE_KINDS]}, got {values!r}")
    if keys == "overlap" and overlap is None:
        raise ValueError("keys='overlap' needs `overlap`, the share of tokens from real names in [0, 1]")
    if keys != "overlap" and overlap is not None:
        raise ValueError(f"overlap={overlap} is for keys='overlap' only, got keys={keys!r}; leave one of the two out")
    if overlap is not None and not (isinstance(overlap, (int, float)) and 0 <= overlap <= 1):
        raise ValueError(f"overlap must be in [0, 1], the share of tokens from real names, got {overlap!r}")
    for name, value, least in (("num_facts", num_facts, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name, value in names.items():
        if isinstance(value, str):
            raise ValueError(f"{name} must be a list of names, got the string {value!r}; write [{value!r}]")
