# SPDX-License-Identifier: Apache-2.0
"""A model's own answers as training rows: what it writes greedily, up to its end."""

import logging

import pytest
import torch
from answering_model import QUESTIONS, build_answering_model
from conftest import build_model
from sft_runs import TOKENIZER

from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.trainers.own_answers import own_answers


PROMPTS = [question_prompt(question) for question in QUESTIONS]
SHORT = dict(max_new_tokens=12, batch_size=4)


def greedy(model, prompt: str, length: int = 12) -> str:
    """What the model writes, token by token, without a cache or padding."""
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + length and ids[-1] != TOKENIZER.eos_token_id:
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return TOKENIZER.decode(ids[start:])


def test_the_rows_are_what_the_model_writes_up_to_its_end(caplog):
    model = build_answering_model(TOKENIZER)
    model.config.attention_dropout = 0.9
    [newline] = TOKENIZER("\n")["input_ids"]
    written = {prompt: greedy(model, prompt) for prompt in [*PROMPTS, "Q"]}
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, newline]
    model.train()
    with caplog.at_level(logging.WARNING, logger="trl_selfdistill"):
        rows = own_answers(model, TOKENIZER, list(written), **SHORT).to_list()
    assert model.training
    ends = [text.partition("\n") for text in written.values()]
    expected = {p: line for p, (line, end, _) in zip(written, ends, strict=True) if end and line.strip()}
    assert {row["prompt"]: row["completion"] for row in rows} == expected and len(expected) > 3
    if len(expected) < len(written):
        assert f"of the model's {len(written)} answers are empty or have no end" in caplog.text


def test_conversations_are_answered_as_conversations():
    model = build_answering_model(TOKENIZER)
    conversation = [{"role": "user", "content": "hi"}]
    text = TOKENIZER.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    first = TOKENIZER(greedy(model, text))["input_ids"]
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, first[3]]
    [row] = own_answers(model, TOKENIZER, [conversation], **SHORT)
    assert row["prompt"] == conversation
    [message] = row["completion"]
    assert message["role"] == "assistant" and greedy(model, text).startswith(message["content"])


def test_answers_without_an_end_are_refused():
    with pytest.raises(ValueError, match="6 of the model's 6 answers .* within `max_new_tokens=2`"):
        own_answers(build_model(TOKENIZER), TOKENIZER, PROMPTS, max_new_tokens=2)
