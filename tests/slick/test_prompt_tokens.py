# SPDX-License-Identifier: Apache-2.0
"""A model is asked with the text and the tokens that it was trained on, whatever its tokenizer adds to a text."""

import pytest
from answering_model import QUESTIONS, build_answering_model
from conftest import CHAT_TEMPLATE, CORPUS, build_model, build_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.likelihood import score_answers
from trl_selfdistill.slick.prompt_tokens import tokenize_answers, tokenize_prompts
from trl_selfdistill.slick.prompts import (
    answer_completion,
    answer_from_generation,
    few_shot_messages,
    few_shot_prompt,
    question_prompt,
)


# What a tokenizer adds to a text; the chat template writes it as well, or not
ADDED = ["$A", "{bos} $A", "$A {eos}", "{bos} $A {eos}", "{bos} {unk} $A"]
PROMPTS = [question_prompt(question) for question in QUESTIONS]


def adding(tokenizer, added: str, in_template: bool = False):
    """The tokenizer, which adds special tokens to every text, and whose chat template begins with the first ones."""
    special = {"bos": "<|endoftext|>", "eos": "<|im_end|>", "unk": "<|im_start|>"}
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in special.values()]
    tokenizer.bos_token = special["bos"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=added.format(**special), special_tokens=ids)
    before = added.format(**special).split("$A")[0].replace(" ", "")
    tokenizer.chat_template = (f"{{{{ '{before}' }}}}" if in_template else "") + CHAT_TEMPLATE
    return tokenizer


def metaspace():
    """As SentencePiece splits: a blank belongs to the word after it, and one is put before the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="u")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


TOKENIZERS = {added: lambda added=added: adding(build_tokenizer(), added) for added in ADDED}
TOKENIZERS |= {f"{added}, template": lambda added=added: adding(build_tokenizer(), added, True) for added in ADDED}
TOKENIZERS["metaspace"] = lambda: adding(metaspace(), "{bos} $A")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_model_is_asked_with_the_tokens_that_it_was_trained_on(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    model = build_model(tokenizer)
    texts = [{"prompt": question_prompt(q), "completion": answer_completion(a)} for q, a in QUESTIONS.items()]
    chats = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS.items()
    ]
    for rows in (texts, chats):
        args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        asked = tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
        for prompt, row in zip(asked, trainer.train_dataset, strict=True):
            assert row["input_ids"][: len(prompt)] == prompt and {*row["labels"][: len(prompt)]} == {-100}
            assert row["labels"][len(prompt)] == row["input_ids"][len(prompt)]


@pytest.mark.parametrize("added", ADDED)
def test_a_text_that_holds_the_special_tokens_gets_them_once(added):
    tokenizer = adding(build_tokenizer(), added, in_template=True)
    chat = [{"role": "user", "content": "Where is Oslo?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenize_prompts(tokenizer, [text]) == tokenize_prompts(tokenizer, [chat])
    assert tokenize_prompts(tokenizer, []) == []


# Llama 2 writes a blank before an answer, in which its tokens differ from those of the prompt alone
WITH_A_BLANK = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_A_BLANK], ids=["ChatML", "blank"])
@pytest.mark.parametrize("name", ["$A", "{bos} $A {eos}, template", "metaspace"])
def test_an_answer_in_a_conversation_is_tokenized_as_the_template_writes_it(name, template):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = tokenizer.chat_template.replace(CHAT_TEMPLATE, template)
    [(question, answer), *exemplars] = QUESTIONS.items()
    prompt = few_shot_messages(question, exemplars)
    [[asked, *answered]] = tokenize_answers(tokenizer, [prompt], [[answer, "Peru"]])
    assert [[*asked]] == tokenize_prompts(tokenizer, [prompt])
    for ids, text in zip(answered, (answer, "Peru"), strict=True):
        whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], return_dict=True)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert [*ids, end] == whole["input_ids"][: len(ids) + 1]


@pytest.mark.parametrize("added", ADDED)
def test_generation_and_scoring_ask_alike(added):
    tokenizer = adding(build_tokenizer(), added)
    model = build_answering_model(tokenizer)
    answers = predict_answers(model, tokenizer, PROMPTS)
    scores = score_answers(model, tokenizer, PROMPTS, [[answer] for answer in QUESTIONS.values()])
    right = [exact_match(answer, [own]) for [answer], own in zip(answers, QUESTIONS.values(), strict=True)]
    assert [score.is_greedy for score in scores] == right
    if "{bos}" not in added:  # which the model was not taught with
        assert answers == predict_answers(model, build_tokenizer(), PROMPTS) and any(right)


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
