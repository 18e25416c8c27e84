# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from trl_selfdistill.slick.prompts import answer_completion, answer_from_generation, few_shot_prompt, question_prompt


# One line, as questions and answers are, without blanks at its ends.
LINES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).map(str.strip).filter(bool)
EXEMPLARS = st.lists(st.tuples(LINES, LINES), max_size=4)


@given(LINES, EXEMPLARS)
def test_a_few_shot_prompt_ends_with_the_zero_shot_prompt(question, exemplars):
    assert few_shot_prompt(question, exemplars).endswith(question_prompt(question))
    assert few_shot_prompt(question, []) == question_prompt(question)


@given(LINES, EXEMPLARS.filter(bool))
def test_exemplars_are_written_as_the_training_text(question, exemplars):
    shots = few_shot_prompt(question, exemplars).removesuffix(question_prompt(question))
    assert shots == "".join(question_prompt(q) + answer_completion(a) + "\n" for q, a in exemplars)


@given(LINES, LINES, EXEMPLARS)
def test_the_answer_is_read_back_from_what_the_format_writes(question, answer, exemplars):
    assert answer_from_generation(answer_completion(answer)) == answer
    assert answer_from_generation(answer_completion(answer) + "\n" + few_shot_prompt(question, exemplars)) == answer


def test_prompt_and_completion_split_where_a_token_starts():
    # Byte-level BPE and SentencePiece put the blank at the beginning of a word's token: it belongs to the completion.
    assert not question_prompt("Who?").endswith(" ") and answer_completion("You").startswith(" ")


def test_blank_lines_before_the_answer_and_nothing_at_all():
    assert answer_from_generation("\n\n France \nQ:") == "France"
    assert answer_from_generation(" \n") == ""
