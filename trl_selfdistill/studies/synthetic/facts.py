# SPDX-License-Identifier: Apache-2.0
"""Facts of one relation that no model can know, any number of them, for the study of why fine-tuning forgets.

The paper (arXiv 2604.15574, section 5) trains on 10³ to 10⁶ facts whose keys look like real names, or not at all, with
real values and others. Here keys and values are chosen independently, and facts are drawn while they are read.
"""

import random
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from datasets import Dataset, IterableDataset

from ...slick.prompts import question_prompt
from ..facts.invented import folded_names, question_template, rows_of_relation
from ..facts.table import make_fact
from .keys import TokenKeys


def synthetic_facts(
    facts: Dataset,
    relation: str,
    num_facts: int,
    tokenizer,
    overlap: float | None = 1.0,
    values: str = "real",
    seed: int = 0,
    exclude: Iterable[str] = (),
    apart_from: Iterable[str] = (),
) -> IterableDataset:
    """
    Draws facts of a relation on entities that do not exist, while they are read. Their keys are UUIDs, or made of as
    many tokens as real subjects have. The same seed gives the same facts, and a smaller `num_facts` the first of them.
    Keys do not depend on `values`, nor values on `overlap`.

    Args:
        facts (`Dataset`): Real facts. Those of the relation lend tokens, lengths, the question and answers.
        relation (`str`): The relation.
        num_facts (`int`): How many. All keys are different, even without case.
        tokenizer (`PreTrainedTokenizerFast`): A fast tokenizer, that of the model to be trained. UUIDs do not need it.
        overlap (`float`, *optional*, defaults to 1.0):
            Share of the keys' tokens that real subjects of the relation use, in [0, 1]. `None` for UUIDs as keys.
        values (`str`, *optional*, defaults to `"real"`):
            `"real"` for the relation's answers, each equally often (give or take one), or `"uuid"` for random UUIDs.
        seed (`int`, *optional*, defaults to `0`): Seed of keys and values.
        exclude (`Iterable[str]`, *optional*): Names that must not be given: see [`folded_names`].
        apart_from (`Iterable[str]`, *optional*):
            Further names, of whose tokens no key has any but those of the relation's subjects.

    Returns:
        `IterableDataset` with [`FACT_COLUMNS`], one shard. After a resume, the facts until then are drawn again.

    Raises:
        ValueError: If the relation is unknown, the question does not hold its subject as words of its own, or there
            are too few distinct tokens for so many keys; while reading, if they run out by chance.
    """
    rows = rows_of_relation(facts, relation)
    question = question_template(rows)
    draw_keys = partial(_uuids, f"keys of seed {seed}")
    if overlap is not None:
        names = [row["subject"] for row in rows]
        token_keys = TokenKeys(names, tokenizer, question_prompt(question), overlap, apart_from)
        token_keys.check_number(num_facts)
        draw_keys = partial(token_keys.draw, num_facts, seed, folded_names(facts, exclude))
    forms = sorted({row["answer"]: row["aliases"] for row in rows}.items())

    def draw() -> Iterator[dict]:
        lot = f"values of seed {seed}"
        answers = ((value, []) for value in _uuids(lot))
        if values == "real":
            answers = shuffled_rounds(forms, random.Random(lot))
        for key, (answer, aliases) in islice(zip(draw_keys(), answers, strict=False), num_facts):
            yield make_fact(relation, question, key, answer, aliases)

    # Without features: with them, datasets would check each row, which is slow
    return IterableDataset.from_generator(draw)


def shuffled_rounds(items: Sequence, generator: random.Random) -> Iterator:
    """The items without end: all in random order, again and again."""
    while True:
        yield from generator.sample(items, len(items))


def _uuids(seed: str) -> Iterator[str]:
    """UUIDs (version 4) without end. Two of 10⁶ are the same with a probability of 10⁻²⁵."""
    generator = random.Random(seed)
    while True:
        yield str(uuid.UUID(int=generator.getrandbits(128), version=4))
