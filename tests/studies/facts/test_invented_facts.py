# SPDX-License-Identifier: Apache-2.0
"""Invented facts: new names like real ones, with the questions and answers of the relation."""

import re
from collections import Counter

import pytest
from fact_rows import facts_from_rows

from trl_selfdistill.studies.facts.geonames import geonames_facts
from trl_selfdistill.studies.facts.invented import _name_parts, invent_facts
from trl_selfdistill.studies.facts.table import FACT_COLUMNS, fold_name, strip_accents


@pytest.fixture(scope="module")
def facts():
    return geonames_facts(["P36", "P38"])


@pytest.fixture(scope="module")
def invented(facts):
    return invent_facts(facts, "P38", 500, seed=0)


def fold(names) -> set[str]:
    return {fold_name(strip_accents(name)) for name in names}


def test_a_table_of_as_many_facts_of_the_relation(facts, invented):
    assert invented.column_names == list(FACT_COLUMNS) and invented.features == facts.features
    assert len(invented) == 500 and set(invented["relation"]) == {"P38"}
    forms = {fact["answer"]: fact["aliases"] for fact in facts if fact["relation"] == "P38"}
    for fact in invented:
        assert fact["fact_id"] == f"P38/{fact['subject']}"
        assert fact["question"] == f"What is the currency of {fact['subject']}?"  # the most common wording
        assert fact["aliases"] == forms[fact["answer"]]
    answers, num_answers = invented["answer"][:], len(forms)  # balanced and in random order
    assert set(Counter(answers).values()) <= {500 // num_answers, 500 // num_answers + 1}
    assert answers[:num_answers] != answers[num_answers : 2 * num_answers]


def test_names_are_new_and_look_like_names(facts, invented):
    names = fold(invented["subject"])
    assert len(names) == 500 and not names & (fold(facts["subject"]) | fold(facts["answer"]))
    assert all(re.fullmatch(r"[A-Z][a-z]{4,11}", name) for name in invented["subject"])


def test_excluded_names_are_avoided_whatever_their_case_accents_and_order(facts, invented):
    first = invented["subject"][:50]
    spelt_otherwise = [name.upper().replace("A", "Á").replace("O", "Ö") for name in first]
    without = invent_facts(facts, "P38", 50, seed=0, exclude=spelt_otherwise)
    assert not {*first} & {*without["subject"]}
    again = invent_facts(facts, "P38", 50, seed=0, exclude=spelt_otherwise[::-1])
    assert again.to_list() == without.to_list()


@pytest.mark.parametrize(
    ("subject", "question", "arguments", "message"),
    [
        ("Lyon", "Where is Lyon?", ("P99", 5), r"no fact of 'P99'; choose among \['P17'\]"),
        ("Lyon", "Where is the city?", ("P17", 1), "does not contain its subject 'Lyon'"),
        ("New York", "Where is New York?", ("P17", 1), "num_facts=1 is more than .* from 0 single-word subjects"),
    ],
)
def test_what_cannot_be_invented(subject, question, arguments, message):
    row = {"relation": "P17", "subject": subject, "question": question, "answer": "France"}
    with pytest.raises(ValueError, match=message):
        invent_facts(facts_from_rows([row]), *arguments, seed=0)


def test_names_are_cut_where_they_can_be_spoken():
    assert _name_parts(["Patna", "Hiroshima"]) == (["Hi", "Hiro"], ["roshima", "shima"])
