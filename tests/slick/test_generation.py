# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from answering_model import QUESTIONS, build_answering_model, towns_prompts
from conftest import build_model, build_tokenizer

from trl_selfdistill.slick.generation import answer_ends, evaluation_mode, predict_answers
from trl_selfdistill.slick.prompts import answer_from_generation, question_prompt


PROMPTS = towns_prompts() + [question_prompt(question) for question in QUESTIONS] + ["A:", "Q: Where is Oslo? A:"]


def naive_answer(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Greedy decoding of one prompt without cache or padding; it does not stop, the text is cut."""
    token_ids = tokenizer(prompt)["input_ids"]
    start = len(token_ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            break
        token_ids = [*token_ids, token]
    return tokenizer.decode(token_ids[start:]).split("\n")[0].strip()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_greedy_answers(batch_size, tokenizer):
    model = build_answering_model(tokenizer)
    answers = predict_answers(model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=8)
    assert answers == [[naive_answer(model, tokenizer, prompt, 8)] for prompt in PROMPTS]
    assert len({answer for [answer] in answers}) > 2


def test_generation_stops_where_the_answer_ends(tokenizer, monkeypatch):
    model = build_answering_model(tokenizer)
    tokens = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: tokens.append(generate(**kwargs)) or tokens[-1])
    [[answer]] = predict_answers(model, tokenizer, towns_prompts()[:1], max_new_tokens=50)
    num_new = tokens[0].shape[1] - len(tokenizer(towns_prompts()[0])["input_ids"])
    assert num_new == len(tokenizer(f" {answer}")["input_ids"]) + 1


def test_samples_are_reproducible_and_leave_the_random_state(tokenizer):
    model = build_answering_model(tokenizer)
    options = {"num_samples": 5, "temperature": 1.2, "max_new_tokens": 8}
    state = torch.get_rng_state()
    first = predict_answers(model, tokenizer, PROMPTS, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert predict_answers(model, tokenizer, PROMPTS, seed=1, **options) == first
    assert predict_answers(model, tokenizer, PROMPTS, seed=2, **options) != first
    assert [len(answers) for answers in first] == [5] * len(PROMPTS)
    # Samples belong to their own prompt: nearly greedy ones are the greedy answers.
    cold = predict_answers(model, tokenizer, PROMPTS, **{**options, "temperature": 1e-3}, batch_size=15)
    assert cold == [answers * 5 for answers in predict_answers(model, tokenizer, PROMPTS, max_new_tokens=8)]


def test_top_k_limits_the_samples(tokenizer):
    model = build_answering_model(tokenizer)
    options = {"temperature": 100.0, "max_new_tokens": 4}
    one = predict_answers(model, tokenizer, PROMPTS, num_samples=3, top_k=1, **options)
    assert one == [answers * 3 for answers in predict_answers(model, tokenizer, PROMPTS, max_new_tokens=4)]
    # So hot, every token is about as likely as any other: far more than 50 (transformers' own default) are drawn.
    firsts = predict_answers(model, tokenizer, ["A:"], num_samples=500, temperature=100.0, max_new_tokens=1)[0]
    assert len({*firsts}) > 100


def test_the_models_own_sampling_options_do_not_apply(tokenizer):
    model = build_answering_model(tokenizer)
    plain = predict_answers(model, tokenizer, PROMPTS, num_samples=4, seed=3, max_new_tokens=8)
    greedy = predict_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=2, top_p=0.1, min_p=0.5, typical_p=0.2)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3, min_new_tokens=7)
    assert predict_answers(model, tokenizer, PROMPTS, num_samples=4, seed=3, max_new_tokens=8) == plain
    assert predict_answers(model, tokenizer, PROMPTS, max_new_tokens=8) == greedy


def test_padding_needs_nothing_of_the_tokenizer(tokenizer):
    model = build_answering_model(tokenizer)
    expected = predict_answers(model, tokenizer, PROMPTS, max_new_tokens=8)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token, bare.padding_side = None, "right"
    assert predict_answers(model, bare, PROMPTS, max_new_tokens=8) == expected
    assert bare.padding_side == "right"


def test_answer_ends():
    tokenizer = build_tokenizer()
    newline = tokenizer("\n")["input_ids"][0]
    special = {0, 1, 2}  # the one in the middle has no role in the tokenizer
    assert {*answer_ends(build_model(tokenizer), tokenizer).stop_ids} == {newline, *special}
    tokenizer.add_tokens([".\n", "\n\n", ')"\n  x', "s\n", " a\n", "."])
    blank = set(tokenizer.convert_tokens_to_ids([".\n", "\n\n", ')"\n  x']))
    wordy = set(tokenizer.convert_tokens_to_ids(["s\n", " a\n"]))
    model = build_model(tokenizer)
    model.generation_config.eos_token_id = [7, 9]
    ends = answer_ends(model, tokenizer)
    assert {*ends.terminator_ids} == {newline, *special, *blank, 7, 9}
    assert {*ends.stop_ids} == {*ends.terminator_ids, *wordy}


def test_text_before_the_newline_of_a_token_belongs_to_the_answer():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["ce\n"])
    model = build_model(tokenizer)
    written = tokenizer("Fran")["input_ids"] + tokenizer.convert_tokens_to_ids(["ce\n"])
    prompt_ids = tokenizer("A:")["input_ids"]

    def generate(**kwargs):
        return torch.tensor([prompt_ids + written + [5, 5]])

    model.generate = generate
    assert predict_answers(model, tokenizer, ["A:"]) == [[answer_from_generation("France\n")]]


def test_evaluation_mode_restores_each_module(model):
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"):
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_no_prompts_and_errors(tokenizer, model):
    assert predict_answers(model, tokenizer, []) == []
    with pytest.raises(ValueError, match="num_samples"):
        predict_answers(model, tokenizer, ["A:"], num_samples=0)
