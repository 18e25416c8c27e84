# SPDX-License-Identifier: Apache-2.0
"""Synthetic facts: what their keys are made of, that they are new, and that they are the same each time."""

import uuid
from collections import Counter

import numpy as np
import pytest
from conftest import build_tokenizer
from datasets import IterableDataset, concatenate_datasets

from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.facts.table import FACT_COLUMNS, fold_name, strip_accents
from trl_selfdistill.studies.small_llama import train_tokenizer
from trl_selfdistill.studies.synthetic.facts import synthetic_facts


QUESTION = "Which country is {subject} located in?"


@pytest.fixture(scope="module")
def facts():
    return concatenate_datasets([geonames_facts(["P17"]).select(range(600)), geonames_facts(["P38"])])


@pytest.fixture(scope="module")
def tokenizer(facts):
    """Of a size at which names have two to four tokens, and many tokens are in no name of the facts."""
    names = sorted(known_place_names())[::20]
    return train_tokenizer([*map(question_prompt, facts["question"]), *(f" {name}" for name in names)], 3000)


def stream(facts, tokenizer, num_facts=2000, overlap=1.0, **options) -> IterableDataset:
    return synthetic_facts(facts, "P17", num_facts, tokenizer, overlap, **options)


def subjects(rows) -> list[str]:
    return [row["subject"] for row in rows]


def ids_in_prompt(tokenizer, names) -> list[list[int]]:
    """What the tokenizer makes of each name in its whole prompt."""
    prompts = [question_prompt(QUESTION.format(subject=name)) for name in names]
    encoded = tokenizer(prompts, return_offsets_mapping=True)
    begin = len("Q: Which country is")
    return [
        [i for i, (a, b) in zip(ids, offsets, strict=True) if begin <= a < b <= begin + 1 + len(name)]
        for name, ids, offsets in zip(names, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def overlaps(tokenizer, names, rows) -> list[float]:
    """The share of the tokens of each fact's subject that `names` use."""
    of_names = {token for ids in ids_in_prompt(tokenizer, sorted(names)) for token in ids}
    return [np.mean([token in of_names for token in ids]) for ids in ids_in_prompt(tokenizer, subjects(rows))]


@pytest.mark.parametrize("share", [1.0, 0.0, 0.3])
def test_the_tokenizer_finds_the_share_of_tokens_that_was_asked_for(facts, tokenizer, share):
    facts = facts.select(range(100))  # of one relation
    found = overlaps(tokenizer, facts["subject"], stream(facts, tokenizer, 500, share))
    assert {*found} == {share} if share in (0, 1) else np.mean(found) == pytest.approx(share, abs=0.04)


def test_keys_have_the_lengths_of_names_whatever_the_overlap(facts, tokenizer):
    lengths = []
    for overlap in (1.0, 0.0, 0.5):
        lengths.append([*map(len, ids_in_prompt(tokenizer, subjects(stream(facts, tokenizer, overlap=overlap))))])
    assert lengths[0] == lengths[1] == lengths[2]  # one by one
    names = [row["subject"] for row in facts if row["relation"] == "P17" and row["subject"].isascii()]
    real = [n for n in map(len, ids_in_prompt(tokenizer, names)) if n > 1]
    assert np.mean(lengths[0]) == pytest.approx(np.mean(real), abs=0.1)


def test_no_key_is_given_twice_or_a_name_that_must_not_be(facts, tokenizer):
    first = subjects(stream(facts, tokenizer, 3000))
    folded = {fold_name(strip_accents(name)) for name in first}
    assert len(folded) == 3000
    assert not folded & {fold_name(strip_accents(name)) for name in (*facts["subject"], *facts["answer"])}
    excluded = [name.upper().replace("A", "Á") for name in first[:200:2]]
    without = {*subjects(stream(facts, tokenizer, 200, exclude=excluded))}
    assert not without & {*first[:200:2]} and len(without & {*first[1:200:2]}) == 100


def test_pseudo_words_share_no_token_with_the_names_that_they_are_kept_apart_from(facts, tokenizer):
    """Subjects and answers of two relations: without it, "France" can begin a pseudo-word."""
    names = {*facts["subject"], *facts["answer"]}
    alone = overlaps(tokenizer, names, stream(facts, tokenizer, 500, 0.0))
    apart = overlaps(tokenizer, names, stream(facts, tokenizer, 500, 0.0, apart_from=names))
    assert {*apart} == {0.0} and max(alone) > 0
    assert [*stream(facts, tokenizer, 500, apart_from=names)] == [*stream(facts, tokenizer, 500)]


@pytest.mark.parametrize(("overlap", "values"), [(1.0, "real"), (0.5, "uuid"), (None, "real")])
def test_a_seed_gives_the_same_facts_and_a_smaller_number_the_first_of_them(facts, tokenizer, overlap, values):
    options = dict(values=values, overlap=overlap)
    drawn = stream(facts, tokenizer, 300, **options)
    rows = [*drawn]
    assert [*drawn] == rows == [*stream(facts, tokenizer, 300, **options)]
    assert [*stream(facts, tokenizer, 100, **options)] == rows[:100]
    other = stream(facts, tokenizer, 100, seed=1, **options)
    assert not {*subjects(other)} & {*subjects(rows[:100])}


def test_keys_and_values_are_independent(facts, tokenizer):
    pseudo, pseudo_uuid, uuids = (
        [*stream(facts, tokenizer, 300, overlap, values=values)]
        for overlap, values in ((0.0, "real"), (0.0, "uuid"), (None, "uuid"))
    )
    assert subjects(pseudo) == subjects(pseudo_uuid)
    assert [row["answer"] for row in pseudo_uuid] == [row["answer"] for row in uuids]
    assert all(uuid.UUID(text).version == 4 for row in uuids for text in (row["subject"], row["answer"]))


def test_real_values_come_equally_often_with_their_aliases(facts, tokenizer):
    forms = {row["answer"]: row["aliases"] for row in facts if row["relation"] == "P17"}
    rows = [*stream(facts, tokenizer, 10 * len(forms) + 3, None)]
    counts = Counter(row["answer"] for row in rows)
    assert counts.keys() == forms.keys() and {*counts.values()} == {10, 11}
    assert all(row["aliases"] == forms[row["answer"]] for row in rows)
    assert [*rows[0]] == [*FACT_COLUMNS]
    assert rows[0]["question"] == QUESTION.format(subject=rows[0]["subject"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(relation="P99"), "there is no fact of 'P99'"),
        (dict(num_facts=10**9), "num_facts=1000000000 keys need more distinct tokens: .* Ask for fewer"),
        (dict(num_facts=10**5, overlap=0.0, tokenizer=build_tokenizer()), "num_facts=100000 keys need more"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_at_once(facts, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        synthetic_facts(facts, **{"relation": "P17", "num_facts": 5, "tokenizer": tokenizer, **options})


def test_a_question_that_lends_nothing(facts, tokenizer):
    glued = facts.map(lambda row: {"question": f"Where is:{row['subject']}?"})
    with pytest.raises(ValueError, match="must hold its subject as words of its own"):
        stream(glued, tokenizer, 5)
