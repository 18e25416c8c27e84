# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.facts.invented import _name_parts, invent_facts
from trl_selfdistill.studies.facts.table import FACT_COLUMNS, facts_from_rows, fold_name, strip_accents


@pytest.fixture(scope="module")
def facts():
    return geonames_facts(["P17", "P38"], max_facts_per_relation=2000)


@pytest.fixture(scope="module")
def known():
    return known_place_names()


@pytest.fixture(scope="module")
def invented(facts, known):
    return invent_facts(facts, "P17", 3000, seed=0, exclude=known)


def fold(names):
    return {fold_name(strip_accents(name)) for name in names}


def test_a_table_of_as_many_facts_of_the_relation(facts, invented):
    assert invented.column_names == list(FACT_COLUMNS) and invented.features == facts.features
    assert len(invented) == 3000 and set(invented["relation"]) == {"P17"}
    assert all(fact["fact_id"] == f"P17/{fact['subject']}" for fact in invented)


def test_no_name_is_real_or_invented_twice(facts, known, invented):
    names = fold(invented["subject"])
    assert len(names) == 3000
    assert not names & fold([*known, *facts["subject"], *facts["answer"]])


def test_excluded_names_are_avoided_whatever_their_case_and_accents(facts):
    first = set(invent_facts(facts, "P17", 50, seed=0)["subject"])
    spelt_otherwise = [name.upper().replace("A", "Á").replace("O", "Ö") for name in first]
    assert not first & set(invent_facts(facts, "P17", 50, seed=0, exclude=spelt_otherwise)["subject"])


def test_names_look_like_names(invented):
    for name in invented["subject"]:
        assert re.fullmatch(r"[A-Z][a-z]{4,11}", name)


def test_names_are_joined_from_the_beginning_of_one_real_name_and_the_end_of_another(facts, invented):
    real = [fold_name(strip_accents(name)) for name in facts["subject"]]
    heads = {name[:cut] for name in real for cut in range(2, len(name))}
    tails = {name[cut:] for name in real for cut in range(1, len(name) - 1)}
    for name in invented["subject"][:200]:
        name = name.casefold()
        assert any(name[:cut] in heads and name[cut:] in tails for cut in range(2, len(name) - 1))


def test_questions_and_answers_are_those_of_the_real_facts(facts, invented):
    forms = {fact["answer"]: fact["aliases"] for fact in facts if fact["relation"] == "P17"}
    for fact in invented:
        assert fact["question"] == f"Which country is {fact['subject']} located in?"
        assert fact["aliases"] == forms[fact["answer"]]


@pytest.mark.parametrize("num_facts", [1, 50, 1000])
def test_answers_are_balanced(facts, num_facts):
    num_answers = len({fact["answer"] for fact in facts if fact["relation"] == "P17"})
    counts = Counter(invent_facts(facts, "P17", num_facts, seed=0)["answer"])
    per_answer = num_facts / num_answers
    assert set(counts.values()) <= {int(per_answer), int(per_answer) + 1}


def test_the_order_of_answers_does_not_repeat(facts):
    answers = invent_facts(facts, "P17", 1000, seed=0)["answer"][:]
    period = len(set(answers))
    assert answers[:period] != answers[period : 2 * period]


def test_the_seed_decides(facts):
    assert invent_facts(facts, "P17", 50, seed=1).to_list() == invent_facts(facts, "P17", 50, seed=1).to_list()
    first, second = (set(invent_facts(facts, "P17", 50, seed=seed)["fact_id"]) for seed in (1, 2))
    assert len(first & second) < 10


def test_the_order_of_exclude_does_not_decide(facts):
    exclude = ["Lyon", "Oslo", "Lima"]
    expected = invent_facts(facts, "P17", 50, seed=1, exclude=exclude).to_list()
    assert invent_facts(facts, "P17", 50, seed=1, exclude=set(exclude[::-1])).to_list() == expected


def test_the_most_common_wording_is_asked(facts):
    invented = invent_facts(facts, "P38", 20, seed=0)
    assert all(fact["question"] == f"What is the currency of {fact['subject']}?" for fact in invented)


@pytest.mark.parametrize(
    ("relation", "num_facts", "options", "message"),
    [
        ("P99", 5, {}, r"no fact of 'P99'; choose among \['P17', 'P38'\]"),
        ("P17", 0, {}, "num_facts must be at least 1, got 0"),
        ("P38", 10**6, {"max_per_answer": 2}, "max_per_answer=2 and .* num_facts=1000000 is more"),
        ("P38", 50_000, {}, "num_facts=50000 is more than can be invented"),
    ],
)
def test_bad_arguments(facts, relation, num_facts, options, message):
    with pytest.raises(ValueError, match=message):
        invent_facts(facts, relation, num_facts, seed=0, **options)


def test_a_question_without_its_subject_cannot_be_asked_of_another():
    row = {"relation": "P17", "subject": "Lyon", "question": "Where is the city?", "answer": "France"}
    with pytest.raises(ValueError, match="does not contain its subject 'Lyon'"):
        invent_facts(facts_from_rows([row]), "P17", 1, seed=0)


def test_too_few_names_to_join():
    row = {"relation": "P17", "subject": "New York", "question": "Where is New York?", "answer": "United States"}
    with pytest.raises(ValueError, match="from 0 single-word subjects"):
        invent_facts(facts_from_rows([row]), "P17", 1, seed=0)


SIMILAR = [
    {"relation": "P17", "subject": name, "question": f"Where is {name}?", "answer": answer}
    for name, answer in [("Batumara", "Georgia"), ("Balumina", "Peru"), ("Bakumido", "Chad"), ("Barumeka", "Oman")]
]


def test_real_names_come_back_under_no_seed_even_without_exclude():
    table = facts_from_rows(SIMILAR)
    for seed in range(20):
        assert not {row["subject"] for row in SIMILAR} & set(invent_facts(table, "P17", 5, seed)["subject"])


def test_another_process_invents_the_same():
    # Sets are ordered differently in every process, which must not leak into what is drawn.
    code = (
        "import sys, json; from trl_selfdistill.studies.facts.invented import invent_facts\n"
        "from trl_selfdistill.studies.facts.table import facts_from_rows\n"
        "table = facts_from_rows(json.loads(sys.argv[1]))\n"
        "print(json.dumps(invent_facts(table, 'P17', 8, seed=0, exclude={'a', 'b', 'c'}).to_list()))"
    )
    command = [sys.executable, "-c", code, json.dumps(SIMILAR)]
    output = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, check=True)
    here = invent_facts(facts_from_rows(SIMILAR), "P17", 8, seed=0, exclude={"a", "b", "c"})
    assert json.loads(output.stdout) == here.to_list()


@pytest.mark.parametrize(
    ("word", "tails"),
    [
        ("Vladivostok", ["divostok", "stok", "vostok"]),
        ("Patna", []),
        ("Oslo", []),
        ("Hiroshima", ["roshima", "shima"]),
    ],
)
def test_names_are_cut_where_they_can_be_spoken(word, tails):
    heads, ends = _name_parts([word])
    assert ends == tails
    assert sorted(word.removesuffix(tail) for tail in ends) == heads
