# SPDX-License-Identifier: Apache-2.0
import copy
import functools

import pytest
import torch
from answering_model import QUESTIONS, build_answering_model, towns_prompts
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model

from trl_selfdistill.slick.generation import answer_ends, evaluation_mode, predict_answers
from trl_selfdistill.slick.prompts import question_prompt


PROMPTS = towns_prompts() + [question_prompt(question) for question in QUESTIONS] + ["A:", "Q: Where is Oslo? A:"]


def predict(model, tokenizer, prompts=PROMPTS, **options) -> list[list[str]]:
    return predict_answers(model, tokenizer, prompts, **{"max_new_tokens": 8} | options)


def test_greedy_answers_do_not_depend_on_batches_or_padding(tokenizer):
    """That they are the argmax of each token follows from test_likelihood.py."""
    model = build_answering_model(tokenizer)
    expected = predict(model, tokenizer, batch_size=1)
    assert len({answer for [answer] in expected}) > 2
    assert predict(model, tokenizer) == predict(model, tokenizer, batch_size=5) == expected
    bare = copy.deepcopy(tokenizer)
    bare.pad_token, bare.padding_side = None, "right"
    assert predict(model, bare) == expected and bare.padding_side == "right"
    assert predict(model, tokenizer, prompts=[]) == []


def test_generation_stops_where_the_answer_ends(tokenizer, monkeypatch):
    model = build_answering_model(tokenizer)
    tokens, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: tokens.append(generate(**kwargs)) or tokens[-1])
    [[answer]] = predict(model, tokenizer, towns_prompts()[:1], max_new_tokens=50)
    num_new = tokens[0].shape[1] - len(tokenizer(towns_prompts()[0])["input_ids"])
    assert num_new == len(tokenizer(f" {answer}")["input_ids"]) + 1


def test_samples(tokenizer):
    model = build_answering_model(tokenizer)
    options = {"num_samples": 5, "temperature": 1.2}
    state = torch.get_rng_state()
    first = predict(model, tokenizer, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert predict(model, tokenizer, seed=1, **options) == first != predict(model, tokenizer, seed=2, **options)
    assert [len(answers) for answers in first] == [5] * len(PROMPTS)
    # Samples belong to their own prompt: nearly greedy ones are the greedy answers
    greedy = [answers * 3 for answers in predict(model, tokenizer)]
    assert predict(model, tokenizer, num_samples=3, temperature=1e-3, batch_size=15) == greedy
    assert predict(model, tokenizer, num_samples=3, temperature=100.0, top_k=1) == greedy
    # So hot, every token is about as likely as any other: far more than 50 (transformers' own default) are drawn
    [firsts] = predict(model, tokenizer, ["A:"], num_samples=500, temperature=100.0, max_new_tokens=1)
    assert len({*firsts}) > 100


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_the_models_own_generation_config_does_not_apply(adapter, tokenizer):
    model = build_answering_model(tokenizer)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    sampling = {"num_samples": 4, "seed": 3}
    expected = [predict(model, tokenizer, **sampling), predict(model, tokenizer)]
    base = model.get_base_model() if adapter else model
    words, config = tokenizer(" Norway France")["input_ids"], base.generation_config
    own = dict(do_sample=True, temperature=9.0, top_k=2, top_p=0.1, num_beams=3, repetition_penalty=5.0, max_length=3)
    own |= dict(suppress_tokens=words, forced_eos_token_id=words[1], stop_strings=["r"], num_return_sequences=2)
    own |= dict(min_new_tokens=7, return_dict_in_generate=True, pad_token_id=9, guidance_scale=4.0, max_time=0.0)
    for name, value in own.items():
        setattr(config, name, value)
    before = config.to_dict()
    assert [predict(model, tokenizer, **sampling), predict(model, tokenizer)] == expected
    assert base.generation_config is config and config.to_dict() == before and model.generation_config is config
    assert ("generation_config" in vars(model)) != adapter
    # Nor what transformers kept in the model's config
    base.config.temperature, base.config.suppress_tokens, base.config.num_beams = 9.0, words, 4
    base.generate = functools.partial(dict, model=base)  # as transformers puts a checkpoint's `custom_generate` there
    assert predict(model, tokenizer) == expected[1] and isinstance(base.generate, functools.partial)


def test_answer_ends():
    tokenizer = build_tokenizer()
    newline = tokenizer("\n")["input_ids"][0]
    special = {0, 1, 2}  # the one in the middle has no role in the tokenizer
    assert {*answer_ends(build_model(tokenizer), tokenizer)[0]} == {newline, *special}
    tokenizer.add_tokens([".\n", "\n\n", ')"\n  x', "s\n", " a\n", "€\n", "++\n", "."])
    blank = set(tokenizer.convert_tokens_to_ids([".\n", "\n\n", ')"\n  x']))
    wordy = set(tokenizer.convert_tokens_to_ids(["s\n", " a\n", "€\n", "++\n"]))
    model = build_model(tokenizer)
    model.generation_config.eos_token_id = [7, 9]
    stops, terminators = answer_ends(model, tokenizer)
    assert {*terminators} == {newline, *special, *blank, 7, 9} and {*stops} == {*terminators, *wordy}
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's
    model.generation_config.eos_token_id = None
    assert tokenizer.eos_token_id in answer_ends(model, tokenizer)[0]
    tokenizer.unk_token = tokenizer.pad_token
    assert tokenizer.unk_token_id not in answer_ends(model, tokenizer)[0]


def test_text_before_the_newline_of_a_token_belongs_to_the_answer(monkeypatch):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["ce\n"])
    model = build_model(tokenizer)
    written = tokenizer("A: Fran")["input_ids"] + tokenizer.convert_tokens_to_ids(["ce\n"])
    monkeypatch.setattr(model, "generate", lambda **kwargs: torch.tensor([written + [5, 5]]))
    assert predict(model, tokenizer, ["A:"]) == [["France"]]


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
