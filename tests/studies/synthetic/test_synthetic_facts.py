# SPDX-License-Identifier: Apache-2.0
"""Synthetic facts: what their keys are made of, that they are new, and that they are the same each time."""

import pickle
import tracemalloc
import uuid
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from conftest import build_tokenizer
from datasets import IterableDataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.facts.table import FACT_COLUMNS, fold_name, strip_accents
from trl_selfdistill.studies.small_llama import train_tokenizer
from trl_selfdistill.studies.synthetic.facts import SyntheticFacts, synthetic_facts
from trl_selfdistill.studies.synthetic.name_tokens import PromptSlot, token_overlap
from trl_selfdistill.studies.synthetic.token_pairs import TokenPairs, bpe_merges, whole_tokens


QUESTION = "Which country is {subject} located in?"


@pytest.fixture(scope="module")
def facts():
    return geonames_facts(["P17", "P38"], max_facts_per_relation=600)


@pytest.fixture(scope="module")
def places():
    return known_place_names()


@pytest.fixture(scope="module")
def tokenizer(facts, places):
    """Of a size at which names have two to four tokens, and many tokens are in no name of the facts."""
    questions = [question_prompt(question) for question in facts["question"]]
    return train_tokenizer([*questions, *sorted(f" {name}" for name in places)], 4000)


def stream(facts, tokenizer, num_facts=2000, keys="recombined", **options) -> SyntheticFacts:
    return SyntheticFacts(facts, "P17", num_facts, tokenizer, keys, **options)


def ids_in_prompt(tokenizer, rows) -> list[list[int]]:
    """What the tokenizer makes of each subject in its whole prompt."""
    encoded = tokenizer([question_prompt(row["question"]) for row in rows], return_offsets_mapping=True)
    begin = len("Q: Which country is")
    return [
        [
            i
            for i, (a, b) in zip(ids, offsets, strict=True)
            if begin <= a and b <= begin + 1 + len(row["subject"]) and b > a
        ]
        for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


OVERLAPS = {"recombined": 1.0, "pseudo": 0.0, "overlap": 0.3}


@pytest.mark.parametrize("keys", OVERLAPS)
def test_the_tokenizer_finds_the_share_of_tokens_that_was_asked_for(facts, tokenizer, keys):
    share = OVERLAPS[keys]
    drawn = stream(facts, tokenizer, keys=keys, overlap=share if keys == "overlap" else None)
    overlaps = [token_overlap(ids, drawn.token_keys.name_tokens) for ids in ids_in_prompt(tokenizer, [*drawn])]
    if keys == "overlap":
        assert np.mean(overlaps) == pytest.approx(share, abs=0.02)
    else:
        assert set(overlaps) == {share}


def test_keys_have_the_lengths_of_names_whatever_the_overlap(facts, tokenizer):
    lengths = [
        [*map(len, ids_in_prompt(tokenizer, [*stream(facts, tokenizer, keys=keys, overlap=overlap)]))]
        for keys, overlap in (("recombined", None), ("pseudo", None), ("overlap", 0.5))
    ]
    assert lengths[0] == lengths[1] == lengths[2]  # one by one
    names = [row["subject"] for row in facts if row["relation"] == "P17" and row["subject"].isascii()]
    real = Counter(len(tokenizer(f" {name}")["input_ids"]) for name in names)
    real = {n: count / (len(names) - real[1]) for n, count in real.items() if n > 1}
    drawn = Counter(lengths[0])
    for n, share in real.items():
        assert drawn[n] / len(lengths[0]) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("keys", ["recombined", "pseudo", "uuid"])
def test_no_key_is_a_real_name_or_given_twice(facts, tokenizer, places, keys):
    subjects = [row["subject"] for row in stream(facts, tokenizer, 20_000, keys, exclude=places)]
    folded = {fold_name(strip_accents(name)) for name in subjects}
    assert len(folded) == 20_000
    assert not folded & {fold_name(strip_accents(name)) for name in (*places, *facts["subject"], *facts["answer"])}


def test_pseudo_words_share_no_token_with_the_names_that_they_are_kept_apart_from(facts, tokenizer):
    """Subjects and answers of two relations: without it, "France" can begin a pseudo-word."""
    names = {*facts["subject"], *facts["answer"]}
    ids = tokenizer([f" {name}" for name in sorted(names)], add_special_tokens=False)["input_ids"]
    tokens = {token for row in ids for token in row}

    def overlaps(**options) -> list[float]:
        rows = [*stream(facts, tokenizer, 500, **options)]
        return [token_overlap(ids, tokens) for ids in ids_in_prompt(tokenizer, rows)]

    assert set(overlaps(keys="pseudo", apart_from=names)) == {0.0} and max(overlaps(keys="pseudo")) > 0
    mixed = overlaps(keys="overlap", overlap=0.5, apart_from=names)
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.03)
    for keys in ("recombined", "uuid"):
        assert [*stream(facts, tokenizer, 9000, keys, apart_from=names)] == [*stream(facts, tokenizer, 9000, keys)]


def test_excluded_keys_are_not_given(facts, tokenizer):
    first = [row["subject"] for row in stream(facts, tokenizer, 200)]
    without = {row["subject"] for row in stream(facts, tokenizer, 200, exclude=[name.upper() for name in first[::2]])}
    assert not without & set(first[::2]) and len(without & set(first[1::2])) == 100


@pytest.mark.parametrize("keys", ["recombined", "overlap", "uuid"])
@pytest.mark.parametrize("values", ["real", "uuid"])
def test_a_seed_gives_the_same_facts_and_a_smaller_number_the_first_of_them(facts, tokenizer, keys, values):
    options = dict(keys=keys, values=values, overlap=0.5 if keys == "overlap" else None)
    rows = [*stream(facts, tokenizer, 9000, **options)]  # more than one batch
    again = stream(facts, tokenizer, 9000, **options)
    assert [*again] == rows == [*again] == [*pickle.loads(pickle.dumps(again))]
    assert [*stream(facts, tokenizer, 100, **options)] == rows[:100]
    other = [row["subject"] for row in stream(facts, tokenizer, 100, seed=1, **options)]
    assert not set(other) & {row["subject"] for row in rows[:100]}


def test_keys_and_values_are_independent(facts, tokenizer):
    rows = {
        (k, v): [*stream(facts, tokenizer, 500, k, values=v)] for k in ("pseudo", "uuid") for v in ("real", "uuid")
    }
    for keys in ("pseudo", "uuid"):
        assert [r["subject"] for r in rows[keys, "real"]] == [r["subject"] for r in rows[keys, "uuid"]]
    for values in ("real", "uuid"):
        assert [r["answer"] for r in rows["pseudo", values]] == [r["answer"] for r in rows["uuid", values]]


def test_real_values_come_equally_often_with_their_aliases(facts, tokenizer):
    forms = {row["answer"]: row["aliases"] for row in facts if row["relation"] == "P17"}
    rows = [*stream(facts, tokenizer, 10 * len(forms) + 3)]
    counts = Counter(row["answer"] for row in rows)
    assert counts.keys() == forms.keys() and set(counts.values()) == {10, 11}
    assert all(row["aliases"] == forms[row["answer"]] for row in rows)


def test_uuids_are_of_version_4(facts, tokenizer):
    for row in stream(facts, tokenizer, 300, "uuid", values="uuid"):
        for text in (row["subject"], row["answer"]):
            assert str(uuid.UUID(text)) == text and uuid.UUID(text).version == 4
            assert uuid.UUID(text).variant == uuid.RFC_4122


def test_it_is_a_stream_of_the_columns_of_facts(facts, tokenizer):
    dataset = synthetic_facts(facts, "P17", 50, tokenizer, keys="uuid")
    assert isinstance(dataset, IterableDataset)
    rows = [*dataset]
    assert len(rows) == 50 and all([*row] == [*FACT_COLUMNS] for row in rows)
    row = rows[0]
    assert row["question"] == QUESTION.format(subject=row["subject"]) and row["fact_id"] == f"P17/{row['subject']}"


def test_memory_does_not_grow_with_the_number_of_facts(facts, tokenizer):
    def peak(num_facts: int) -> int:
        rows = iter(stream(facts, tokenizer, num_facts))
        next(rows)
        tracemalloc.start()
        for _ in rows:
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    few, many = peak(30_000), peak(100_000)
    assert many - few < 70_000 * 50  # a row as a dictionary takes some 900 bytes


def test_the_table_of_pairs_agrees_with_the_tokenizer(tokenizer):
    merges = bpe_merges(tokenizer)
    vocabulary = [token for token in tokenizer.get_vocab() if token.isalpha() and token.isascii() and token.islower()]
    tokens = [*whole_tokens(sorted(vocabulary), merges)]
    generator = np.random.default_rng(0)
    left, right = (generator.integers(len(tokens), size=4000) for _ in range(2))
    pairs = TokenPairs(tokens, tokens, merges)
    expected = [
        [*map(tokenizer.convert_ids_to_tokens, tokenizer(tokens[a] + tokens[b])["input_ids"])]
        == [tokens[a], tokens[b]]
        for a, b in zip(left, right, strict=True)
    ]
    stay = pairs.stay(left, right)
    assert stay.tolist() == expected and 0.2 < stay.mean() < 0.999


def test_other_kinds_of_tokenizers_are_asked_about_each_key(facts, places):
    pieces = [(" ", -3.0), *((chr(c), -8.0) for c in range(97, 123)), *((chr(c), -8.0) for c in range(65, 91))]
    words = sorted({f"▁{name[:3]}" for name in places if name.isalpha() and name.isascii() and name[1:].islower()})
    ends = sorted({name[3:7] for name in places if name[3:].isalpha() and name.isascii()})
    pieces += [(word, -4.0) for word in words] + [(end.lower(), -4.0) for end in dict.fromkeys(map(str.lower, ends))]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -5.0), *dict(pieces).items()], unk_id=0))
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    drawn = stream(facts, tokenizer, 200, "overlap", overlap=0.5)
    slot = PromptSlot(tokenizer, question_prompt(QUESTION))
    subjects = [row["subject"] for row in drawn]
    keys = next(drawn.token_keys.batches(200, 0, 0))
    ids = [[i for i in row if i >= 0] for row in keys.token_ids[:200].tolist()]
    assert keys.texts[:200] == subjects and all(slot.stay(subjects, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keys="names"), r"keys must be one of .* got 'names'"),
        (dict(values="none"), r"values must be one of .* got 'none'"),
        (dict(keys="overlap"), "needs `overlap`"),
        (dict(overlap=0.5), "overlap=0.5 is for keys='overlap' only, got keys='recombined'"),
        (dict(keys="overlap", overlap=1.2), r"overlap must be in \[0, 1\].* got 1.2"),
        (dict(keys="overlap", overlap=-0.1), r"overlap must be in \[0, 1\].* got -0.1"),
        (dict(num_facts=0), "num_facts must be a whole number of at least 1, got 0"),
        (dict(num_facts=2.5), "got 2.5"),
        (dict(seed=-1), "seed must be a whole number of at least 0, got -1"),
        (dict(keys="overlap", overlap="0.5"), r"overlap must be in \[0, 1\].* got '0.5'"),
        (dict(apart_from="Paris"), "apart_from must be a list of names, got the string 'Paris'"),
        (dict(exclude="Paris"), "exclude must be a list of names, got the string 'Paris'"),
    ],
)
def test_mistakes_are_errors_at_once(facts, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        synthetic_facts(facts, "P17", **{"num_facts": 5, "tokenizer": tokenizer, **options})


def test_what_cannot_be_drawn_is_an_error_at_once(facts, tokenizer):
    with pytest.raises(ValueError, match="there is no fact of 'P99'"):
        synthetic_facts(facts, "P99", 5, tokenizer)
    with pytest.raises(ValueError, match=r"num_facts=300000 keys need more distinct tokens: about .* Ask for fewer"):
        synthetic_facts(facts.select(range(8)), "P17", 300_000, tokenizer)
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="tokenizer must be a fast one of transformers, got SlowTokenizer"):
        synthetic_facts(facts, "P17", 5, slow)
    glued = facts.map(lambda row: {"question": f"Where is:{row['subject']}?"})
    with pytest.raises(ValueError, match="must hold its subject as words of its own"):
        synthetic_facts(glued, "P17", 5, tokenizer)
    kanji = facts.select(range(3)).map(
        lambda row, i: {"subject": "京都府"[i], "question": f"Where is {'京都府'[i]}?"}, with_indices=True
    )
    with pytest.raises(ValueError, match="none of the 3 names is of two tokens"):
        synthetic_facts(kanji, "P17", 5, tokenizer)


def test_few_names_give_few_keys_or_say_at_once_that_they_do_not(facts, tokenizer):
    """Keys are drawn thousands at a time, which must not matter where one is asked for."""
    few = facts.select(range(10))
    drawn = {n: [row["subject"] for row in stream(few, tokenizer, n)] for n in (1, 5, 10)}
    assert drawn[10][:5] == drawn[5] and drawn[5][:1] == drawn[1] and len({*drawn[10]}) == 10
    with pytest.raises(ValueError, match="num_facts=200 keys need more distinct tokens"):
        stream(facts.select(range(2)), tokenizer, 200)


def test_a_tokenizer_of_few_tokens_gives_few_keys(facts):
    with pytest.raises(ValueError, match=r"num_facts=\d+ keys need more distinct tokens|none of the"):
        [*islice(synthetic_facts(facts, "P17", 10**6, build_tokenizer(), keys="pseudo"), 10)]
