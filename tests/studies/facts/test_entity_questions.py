# SPDX-License-Identifier: Apache-2.0
"""Rows of EntityQuestions become facts: the subject is read from the question's template."""

import json

import pytest
from fact_rows import facts_from_rows

from trl_selfdistill.studies.facts.table import ENTITY_QUESTIONS, facts_of_entity_questions, load_facts


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
