# SPDX-License-Identifier: Apache-2.0
"""Facts of one relation that no model can know, any number of them, for the study of why fine-tuning forgets.

The paper (arXiv 2604.15574, section 5) trains on 10³ to 10⁶ facts whose keys look like real names, or not at all, with
real values and others. Here keys and values are chosen independently, and facts are drawn while they are read.
"""

import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat

from datasets import Dataset, IterableDataset

from ...slick.prompts import question_prompt
from ..facts.invented import folded_names, question_template, rows_of_relation
from ..facts.table import make_fact
from .keys import TokenKeys


KEY_KINDS = ("recombined", "pseudo", "overlap", "uuid")


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

    The same seed gives the same facts, and a smaller `num_facts` the first of them. Keys do not depend on `values`,
    nor values on `keys`. Under one seed, keys of the first three kinds have the same numbers of tokens, one by one.

    Args:
        facts (`Dataset`): Real facts. Those of the relation lend tokens, lengths, the question and answers.
        relation (`str`): The relation.
        num_facts (`int`): How many. All keys are different, even without case.
        tokenizer (`PreTrainedTokenizerFast`): A fast tokenizer, that of the model to be trained. UUIDs do not need it.
        keys (`str`, *optional*, defaults to `"recombined"`): One of the table.
        values (`str`, *optional*, defaults to `"real"`):
            `"real"` for the relation's answers, each equally often (give or take one), or `"uuid"` for random UUIDs.
        overlap (`float`, *optional*): A share in [0, 1], for `keys="overlap"` only.
        seed (`int`, *optional*, defaults to `0`): Seed of keys and values.
        exclude (`Iterable[str]`, *optional*): Names that must not be given: see [`folded_names`].
        apart_from (`Iterable[str]`, *optional*):
            Further names that pseudo-words share no tokens with, nor the other tokens of `keys="overlap"`: such as
            the subjects of other relations and the answers. They do not change recombined keys and UUIDs.

    Returns:
        `IterableDataset` with [`FACT_COLUMNS`], one shard. After a resume, the facts until then are drawn again.

    Raises:
        ValueError: At once, if the relation is unknown, the question does not hold its subject as words of its own, or
            there are too few distinct tokens for so many keys. While reading, if the tokens run out by chance.
    """
    rows = rows_of_relation(facts, relation)
    question = question_template(rows)
    draw_keys = partial(_uuids, f"keys of seed {seed}", num_facts)
    if keys != "uuid":
        overlap = {"recombined": 1.0, "pseudo": 0.0}.get(keys, overlap)
        names = [row["subject"] for row in rows]
        token_keys = TokenKeys(names, tokenizer, question_prompt(question), overlap, apart_from)
        token_keys.check_number(num_facts)
        draw_keys = partial(token_keys.draw, num_facts, seed, folded_names(facts, exclude))
    forms = sorted({row["answer"]: row["aliases"] for row in rows}.items()) if values == "real" else None
    draw_answers = partial(_answers, forms, f"values of seed {seed}")
    # Without features: with them, datasets would check each row, which is slow
    return IterableDataset.from_generator(partial(_rows, relation, question, draw_keys, draw_answers))


def _rows(relation: str, question: str, keys: Callable, answers: Callable) -> Iterator[dict]:
    for key, (answer, aliases) in zip(keys(), answers(), strict=False):
        yield make_fact(relation, question, key, answer, aliases)


def _answers(forms: list[tuple[str, list[str]]] | None, seed: str) -> Iterator[tuple[str, list[str]]]:
    """Answers and their aliases without end: the `forms`, or UUIDs."""
    if forms is None:
        yield from ((value, []) for value in _uuids(seed))
    generator = random.Random(seed)
    while True:  # each answer once, in random order
        yield from generator.sample(forms, len(forms))


def _uuids(seed: str, number: int | None = None) -> Iterator[str]:
    """UUIDs (version 4), without end by default. Two of 10⁶ are the same with a probability of 10⁻²⁵."""
    generator = random.Random(seed)
    for _ in repeat(None) if number is None else range(number):
        yield str(uuid.UUID(int=generator.getrandbits(128), version=4))
