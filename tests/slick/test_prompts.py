# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick.prompts import answer_completion, answer_from_generation, few_shot_prompt, question_prompt


# One line, as questions and answers are, without blanks at its ends
LINES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).map(str.strip).filter(bool)


@given(LINES, LINES, st.lists(st.tuples(LINES, LINES), max_size=4))
def test_exemplars_are_written_as_training_text_and_answers_read_back(question, answer, exemplars):
    prompt = few_shot_prompt(question, exemplars)
    solved = "".join(question_prompt(q) + answer_completion(a) + "\n" for q, a in exemplars)
    assert prompt == solved + question_prompt(question)
    assert answer_from_generation(answer_completion(answer)) == answer
    assert answer_from_generation(f"\n{answer_completion(answer)} \n{prompt}") == answer
    # Byte-level BPE and SentencePiece put the blank at the beginning of a word's token: it belongs to the completion
    assert not prompt.endswith(" ") and answer_completion(answer).startswith(" ")


def test_an_answer_of_two_lines_is_refused():
    """Generation ends at the first newline; other line breaks are blanks in an answer."""
    for text in ("a\nb", "a\r\nb"):
        with pytest.raises(ValueError, match="has a line break, where an answer ends"):
            answer_completion(text)
    for blank in "\r\v\f\x1c\x85\u2028\u2029":
        answer = answer_from_generation(answer_completion(f"a{blank}b"))
        assert exact_match(answer, ["a b"]) and exact_match(answer, [f"a{blank}b"])
