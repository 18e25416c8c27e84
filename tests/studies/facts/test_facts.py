# SPDX-License-Identifier: Apache-2.0
"""A fact, or a row of EntityQuestions, is checked once, where it enters, and comes back from its file as written; and
invented facts: new names like real ones, with the questions and answers of the relation."""

import json
import os
import re
from collections import Counter

import pytest
from datasets import Dataset
from fact_rows import facts_from_rows

from trl_selfdistill.files import write_jsonl
from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.studies.facts.geonames import geonames_facts
from trl_selfdistill.studies.facts.invented import _name_parts, invent_facts
from trl_selfdistill.studies.facts.table import (
    ENTITY_QUESTIONS,
    FACT_COLUMNS,
    facts_of_entity_questions,
    fold_name,
    load_facts,
    read_facts,
    strip_accents,
)


def row(subject="Lyon", answer="France", **others):
    question = f"Which country is {subject} located in?"
    return {"relation": "P17", "subject": subject, "question": question, "answer": answer, **others}


GOOD = [row(), row("Oslo", "Norway"), row("São Paulo", "Brazil")]


def test_a_table_from_a_file_or_from_rows(tmp_path):
    Dataset.from_list(GOOD).to_csv(tmp_path / "facts.csv")
    facts = load_facts(tmp_path / "facts.csv")
    assert facts.column_names == list(FACT_COLUMNS) and facts.to_list() == facts_from_rows(GOOD).to_list()
    assert facts["fact_id"][:] == ["P17/Lyon", "P17/Oslo", "P17/São Paulo"]
    # Without any alias, the type is that of a table with one
    assert facts.features == facts_from_rows([row(aliases=["French Republic"])]).features


def test_a_table_comes_back_with_its_other_columns(tmp_path):
    rows = [row(aliases=["République \u2028 française"], p_correct_greedy=0.5, slick_category="MaybeKnown")]
    rows += [row("Oslo", "Norway", p_correct_greedy=None, slick_category="Unknown", fact_id="mine/1")]
    facts = facts_from_rows(rows)
    path = tmp_path / "new folder" / "facts.jsonl"
    write_jsonl(path, facts)
    assert os.listdir(path.parent) == ["facts.jsonl"] and "République" in path.read_text(encoding="utf-8")
    for again in (load_facts(path), read_facts(path)):
        assert again.to_list() == facts.to_list()
        assert again.features == facts.features
        assert again.column_names == [*FACT_COLUMNS, "p_correct_greedy", "slick_category"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("Oslo", "  "), "answer must be a text that is not empty, got '  '"),
        (row("Oslo", "..."), "is nothing to exact match"),
        (row("Oslo", "Nor\nway"), "has a line break"),
        (row("Oslo", "Norway", aliases=["a\nb"]), r"'a\nb' has a line break"),
        (row("Oslo", "Norway", aliases='["a"'), "is not a JSON list"),
        (row("Oslo", "Norway", aliases="[1]"), "aliases must be a list of strings"),
        (row("Oslo", "Norway", question="", template="Where is {}?"), "lacks {subject}"),
        (row("lyon", "Spain", fact_id="P17/Lyon", question="Where?"), "give each of the two a `fact_id` of its own"),
        (row("Oslo", "Norway", p_correct=0.5), "p_correct is 0.5, not of the type of the rows before"),
        ({"relation": "P17", "subject": "Oslo"}, "missing columns ['question', 'answer']"),
        ([1], "a fact is an object with named columns, got list"),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(row(p_correct="much")) + "\n" + json.dumps(bad), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ") + ".*" + re.escape(message)):
        load_facts(path)


def test_a_table_without_facts():
    for rows in ([], [row("Paris", "France"), row("Paris", "United States")]):
        with pytest.raises(ValueError, match="facts: there is no question with one answer in it"):
            facts_from_rows(rows)


def test_templates_are_filled_and_not_kept():
    rows = [{"relation": "P36", "subject": "{Peru}", "template": "Capital of {subject}?", "answer": "Lima"}]
    facts = facts_from_rows(rows)
    assert facts["question"][:] == ["Capital of {Peru}?"] and facts.column_names == list(FACT_COLUMNS)


@pytest.mark.parametrize("aliases", ["Holland|The Netherlands", '["Holland", ""]', ["Holland", "HOLLAND", "."]])
def test_forms_of_aliases_and_none_is_redundant(aliases):
    (fact,) = facts_from_rows([row("Delft", "Netherlands", aliases=aliases)])
    assert fact["aliases"] == ["Holland"] and not exact_match(fact["answer"], fact["aliases"])


def test_repeated_questions_are_merged_and_contradictions_dropped(caplog):
    rows = [row("Izmir", "Turkey", aliases=["Türkiye"], note="first"), row("Paris", "France")]
    rows += [row("IZMIR", "Türkiye", aliases=["Turkiye"], note="second"), row("ＰＡＲＩＳ", "United States"), row()]
    facts = facts_from_rows(rows)
    assert facts["subject"][:] == ["Izmir", "Lyon"]
    assert facts[0]["aliases"] == ["Türkiye", "Turkiye"] and facts[0]["note"] == "first"
    assert "dropped 1 questions" in caplog.text
    assert facts_from_rows(facts).to_list() == facts.to_list()


def question_about(relation: str, subject: str) -> str:
    return ENTITY_QUESTIONS[relation].replace("{subject}", subject)


def converted(*rows):
    return [row for _, row in facts_of_entity_questions((f"row {i}", row) for i, row in enumerate(rows))]


@pytest.mark.parametrize("relation", ENTITY_QUESTIONS)
def test_the_subject_is_read_from_every_template(relation):
    for subject in ("Lyon", "Who? Where was born?", "Saint-Rémy (Dordogne)", "A.B.'s children"):
        row = {"question": question_about(relation, subject), "answers": ["France"]}
        named, unnamed = converted({**row, "relation": relation}, row)
        assert named == {"relation": relation, "subject": subject, "question": row["question"], "answer": "France"}
        # P276 and P131 ask alike; without the column the first of them is taken
        assert unnamed == {**named, "relation": "P131" if relation == "P276" else relation}


def test_a_table_of_them_is_one_of_facts(tmp_path):
    rows = [{"question": question_about("P17", name), "answers": ["France"], "uid": i} for i, name in enumerate("ab")]
    rows.append({"relation": "P1", "subject": "Lyon", "question": "Where?", "answers": ["France"]})  # one of its own
    file = tmp_path / "P17.train.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    facts = load_facts(file)
    assert facts["fact_id"][:] == ["P17/a", "P17/b", "P1/Lyon"] and facts["uid"][:] == [0, 1, None]
    assert facts["question"][0] == "Which country is a located in?" and facts["aliases"][0] == []


def test_several_answers_leave_the_question_out_and_other_rows_are_left_alone(caplog):
    question = question_about("P17", "Lyon")
    assert len(converted({"question": question, "answers": ["France", "France"]})) == 1 and not caplog.messages
    assert converted({"question": question, "answers": ["France", "Gaul"]}) == []
    assert caplog.messages == ["left out 1 questions that have several answers"]
    row = {"relation": "r", "subject": "s", "question": "q?", "answer": "a", "answers": ["a", "b"]}
    assert converted(row, "text") == [row, "text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "How tall is Lyon?"}, r"question 'How tall is Lyon\?' does not fit any template"),
        ({"relation": "P19"}, ".*does not fit relation 'P19'"),
        ({"answers": []}, r"answers must be a list with an answer in it, got \[\]"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(changes, message):
    row = {"question": question_about("P17", "Lyon"), "answers": ["France"], **changes}
    with pytest.raises(ValueError, match=f"facts, row 2: {message}"):
        facts_from_rows([{"question": question_about("P17", "Oslo"), "answers": ["Norway"]}, row])


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
