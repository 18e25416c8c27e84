# SPDX-License-Identifier: Apache-2.0
"""Rows of EntityQuestions become facts: the subject is read from the question's template."""

import json
import logging

import pytest

from trl_selfdistill.studies.facts.entity_questions import TEMPLATES, facts_of_entity_questions
from trl_selfdistill.studies.facts.table import facts_from_rows, load_facts


def question_about(relation: str, subject: str) -> str:
    return TEMPLATES[relation].replace("{subject}", subject)


def converted(*rows):
    return [row for _, row in facts_of_entity_questions((f"row {i}", row) for i, row in enumerate(rows))]


@pytest.mark.parametrize("relation", TEMPLATES)
@pytest.mark.parametrize("subject", ["Lyon", "Who? Where was born?", "Saint-Rémy (Dordogne)", "A.B.'s children"])
@pytest.mark.parametrize("with_relation", [True, False])
def test_the_subject_is_read_from_every_template(relation, subject, with_relation):
    row = {"question": question_about(relation, subject), "answers": ["France"]}
    fact = converted({**row, "relation": relation} if with_relation else row)[0]
    # P276 and P131 ask alike; without the column the first of them is taken
    expected = "P131" if relation == "P276" and not with_relation else relation
    assert (fact["relation"], fact["subject"], fact["answer"]) == (expected, subject, "France")
    assert fact["question"] == row["question"] and "answers" not in fact


def test_a_table_of_them_is_one_of_facts(tmp_path):
    rows = [{"question": question_about("P17", name), "answers": ["France"], "uid": i} for i, name in enumerate("ab")]
    file = tmp_path / "P17.train.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    facts = load_facts(file)
    assert facts["fact_id"][:] == ["P17/a", "P17/b"] and facts["uid"][:] == [0, 1]
    assert facts["question"][0] == "Which country is a located in?" and facts["aliases"][0] == []


def test_the_same_answer_twice_is_one_answer_and_several_leave_the_question_out(caplog):
    question = question_about("P17", "Lyon")
    with caplog.at_level(logging.WARNING):
        assert len(converted({"question": question, "answers": ["France", "France"]})) == 1
        assert not caplog.messages
        assert converted({"question": question, "answers": ["France", "Gaul"]}) == []
    assert caplog.messages == ["left out 1 questions that have several answers"]


def test_other_rows_are_left_alone():
    row = {"relation": "r", "subject": "s", "question": "q?", "answer": "a", "answers": ["a", "b"]}
    assert converted(row, "text") == [row, "text"]


def test_a_subject_of_its_own_is_taken():
    row = {"relation": "P1", "subject": "Lyon", "question": "Where?", "answers": ["France"]}
    assert facts_from_rows([row])["fact_id"][:] == ["P1/Lyon"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "How tall is Lyon?"}, r"question 'How tall is Lyon\?' does not fit any template"),
        ({"relation": "P19"}, r".*does not fit 'Where was \{subject\} born\?'"),
        ({"relation": "P999"}, "relation 'P999' is none of EntityQuestions'"),
        ({"answers": []}, "answers must be a list with an answer in it, got \\[\\]"),
        ({"answers": "France"}, "answers must be a list"),
        ({"question": None}, "question must be a string, got None"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(changes, message):
    row = {"question": question_about("P17", "Lyon"), "answers": ["France"], **changes}
    with pytest.raises(ValueError, match=f"facts, row 2: {message}"):
        facts_from_rows([{"question": question_about("P17", "Oslo"), "answers": ["Norway"]}, row])
