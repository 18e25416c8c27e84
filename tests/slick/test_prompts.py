# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from trl_selfdistill.slick.prompts import (
    answer_completion,
    answer_from_generation,
    few_shot_prompt,
    question_prompt,
    tokenize_prompts,
)


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


@pytest.mark.parametrize("template", ["$A", "{bos} $A", "$A {eos}", "{bos} $A {eos}"])
def test_prompts_have_one_bos_and_no_eos(template, tokenizer):
    bos, eos = tokenizer.pad_token, tokenizer.eos_token
    other = copy.deepcopy(tokenizer)
    other.bos_token = bos
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    other._tokenizer.post_processor = TemplateProcessing(single=template.format(bos=bos, eos=eos), special_tokens=ids)
    plain = tokenizer("A: a")["input_ids"]
    added = [ids[0][1]] if "{bos}" in template else []
    assert tokenize_prompts(other, ["A: a"]) == [added + plain]
    assert tokenize_prompts(other, [f"{bos}A: a"]) == [[ids[0][1]] + plain]  # as a chat template writes it
    assert tokenize_prompts(other, []) == []
