# SPDX-License-Identifier: Apache-2.0
"""What a model writes as an answer, and how likely each answer is: the one follows from the other."""

import copy
import functools

import pytest
import torch
from answering_model import EXEMPLARS, QUESTIONS, build_answering_model, teach, towns_prompts
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model
from sft_runs import architecture
from trl.trainer.utils import add_fused_lm_head

from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick import likelihood
from trl_selfdistill.slick.generation import answer_ends, evaluation_mode, predict_answers
from trl_selfdistill.slick.likelihood import score_answers
from trl_selfdistill.slick.prompts import answer_completion, few_shot_prompt, question_prompt


PROMPTS = towns_prompts() + [question_prompt(question) for question in QUESTIONS] + ["A:", "Q: Where is Oslo? A:"]


def predict(model, tokenizer, prompts=PROMPTS, **options) -> list[list[str]]:
    return predict_answers(model, tokenizer, prompts, **{"max_new_tokens": 8} | options)


def test_greedy_answers_do_not_depend_on_batches_or_padding(tokenizer):
    """That they are the argmax of each token follows from the scores."""
    model = build_answering_model(tokenizer)
    expected = predict(model, tokenizer, batch_size=1)
    assert len({answer for [answer] in expected}) > 2
    assert predict(model, tokenizer) == predict(model, tokenizer, batch_size=5) == expected
    bare = copy.deepcopy(tokenizer)
    bare.pad_token, bare.padding_side = None, "right"
    assert predict(model, bare) == expected and bare.padding_side == "right"
    assert predict(model, tokenizer, prompts=[]) == []


def test_generation_stops_where_the_answer_ends(tokenizer, calls_of):
    model = build_answering_model(tokenizer)
    generated = calls_of(model, "generate")
    [[answer]] = predict(model, tokenizer, towns_prompts()[:1], max_new_tokens=50)
    num_new = generated[0].result.shape[1] - len(tokenizer(towns_prompts()[0])["input_ids"])
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


COUNTRIES = sorted(set(QUESTIONS.values()))


def build_architecture(name: str, tokenizer):
    if name == "llama":
        return build_answering_model(tokenizer)
    # A window that is shorter than the prompt, and than the prefix that prompts share. Attention and state space in
    # every layer: the cache is one of keys and values, and more
    options = {
        "gemma2": dict(final_logit_softcapping=5.0, query_pre_attn_scalar=8, sliding_window=12),
        "falcon_h1": dict(lm_head_multiplier=1.0, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=8),
    }
    model = architecture(name, seed=1, initializer_range=0.02, bos_token_id=None, **options[name])
    return teach(model, tokenizer, num_steps=80 if name == "gemma2" else 30)


def naive_score(model, tokenizer, prompt, forms, temperature=1.0, top_k=None):
    """The definition: one forward pass a form, without cache, padding or shared work."""
    _, terminators = answer_ends(model, tokenizer)
    is_greedy, p_sampled = False, 0.0
    prompt_ids = tokenizer(prompt)["input_ids"]
    lower = [" ".join([*form.split()[:-1], form.split()[-1].lower()]) for form in forms]
    for full in {tuple(tokenizer(prompt + answer_completion(form))["input_ids"]) for form in [*forms, *lower]}:
        start = next(i for i, token in enumerate(full) if i >= len(prompt_ids) or token != prompt_ids[i])
        with torch.no_grad():
            logits_of_form = model(input_ids=torch.tensor([full]), use_cache=False).logits[0].double()
        greedy, probability = True, 1.0
        for t in range(start, len(full) + 1):
            logits = logits_of_form[t - 1] / temperature
            allowed = terminators if t == len(full) else [full[t]]
            greedy = greedy and logits.argmax().item() in allowed
            if top_k is not None:
                logits[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
            probability *= logits.softmax(-1)[allowed].sum().item()
        is_greedy, p_sampled = is_greedy or greedy, p_sampled + probability
    return is_greedy, p_sampled


@pytest.mark.parametrize(
    ("architecture", "sampling"),
    [(name, {"temperature": 0.5, "top_k": 20}) for name in ("llama", "gemma2", "falcon_h1")] + [("llama", {})],
)
def test_scores_equal_the_definition(architecture, sampling, tokenizer, calls_of):
    model = build_architecture(architecture, tokenizer)
    prompts = towns_prompts()[:3] + [few_shot_prompt("Where?", EXEMPLARS), few_shot_prompt("A? \nA: ", EXEMPLARS)]
    forms = [COUNTRIES[i % 3 :] + ["Norway and Peru"] for i in range(len(prompts))]
    shared = calls_of(likelihood, "_shared_prefix")
    scores = score_answers(model, tokenizer, prompts, forms, batch_size=3, **sampling)
    cache = shared[0].result
    assert (cache is not None and cache.get_seq_length() > 30) == (architecture != "falcon_h1")
    scores += score_answers(model, tokenizer, prompts[:1], forms[:1], **sampling)  # one prompt shares itself
    for score, prompt, accepted in zip(scores, prompts + prompts[:1], forms + forms[:1], strict=True):
        is_greedy, p_sampled = naive_score(model, tokenizer, prompt, accepted, **sampling)
        assert score.is_greedy == is_greedy
        assert score.p_sampled == pytest.approx(p_sampled, rel=1e-4, abs=3e-6)
    assert sum(score.p_sampled > 1e-3 for score in scores) > 2


def test_scores_are_what_generation_writes_and_samples(tokenizer):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts() + [*map(question_prompt, QUESTIONS)] + [f"A: {c}\nQ: O?\nA:" for c in COUNTRIES]
    written = [answers[0] for answers in predict_answers(model, tokenizer, prompts)]
    assert len({*written} & {*COUNTRIES}) >= 2
    for country in COUNTRIES:
        scores = score_answers(model, tokenizer, prompts, [[country]] * len(prompts))
        assert [score.is_greedy for score in scores] == [exact_match(answer, [country]) for answer in written]

    prompts, forms, sampling = towns_prompts()[:6], ["Norway", "France"], {"temperature": 1.3, "top_k": 5}
    scores = score_answers(model, tokenizer, prompts, [forms] * 6, **sampling)
    drawn = {"num_samples": 400, "max_new_tokens": 8, "batch_size": 2400}
    samples = predict_answers(model, tokenizer, prompts, **drawn, **sampling)
    for score, answers in zip(scores, samples, strict=True):
        frequency = sum(exact_match(answer, forms) for answer in answers) / 400
        # 4 standard deviations of the binomial distribution; the 0.01 is for other tokens of the same text
        assert abs(frequency - score.p_sampled) < 4 * (score.p_sampled * (1 - score.p_sampled) / 400) ** 0.5 + 0.01
    assert any(0.2 < score.p_sampled < 0.8 for score in scores)


def test_greedy_scores_alone_are_those_of_all_and_bounds(tokenizer):
    model, prompts = build_answering_model(tokenizer), towns_prompts()
    forms = [COUNTRIES] * len(prompts)
    plain = score_answers(model, tokenizer, prompts, forms)
    assert score_answers(model, tokenizer, prompts, forms, top_k=10**6) == plain  # more than the vocabulary has
    bounds = score_answers(model, tokenizer, prompts, forms, greedy_only=True)
    assert [bound.is_greedy for bound in bounds] == [whole.is_greedy for whole in plain]
    lost = [whole.p_sampled - bound.p_sampled for whole, bound in zip(plain, bounds, strict=True)]
    assert min(lost) > -1e-6 and max(lost) > 1e-4


def test_shared_work_changes_no_score(tokenizer, monkeypatch, calls_of):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts() * 2  # each question twice
    forms = [[country, f"the {country}", country] for country in COUNTRIES * 6][: len(prompts)]
    passes = calls_of(likelihood._Scorer, "_forward")
    shared = score_answers(model, tokenizer, prompts, forms, temperature=0.5, top_k=5)
    # Of four spellings a form, repeated ones are scored once and the unlikely ones not at all
    distinct = len({(prompt, form[0]) for prompt, form in zip(prompts, forms, strict=True)})
    assert distinct <= sum(len(call.args[1]) for call in passes) < 2 * distinct
    monkeypatch.setattr(likelihood, "_MIN_SHARED_PREFIX", 10**6)
    monkeypatch.setattr(likelihood, "_NEGLIGIBLE_LOG_PROB", -torch.inf)
    plain = score_answers(model, tokenizer, prompts, forms, temperature=0.5, top_k=5, batch_size=1)
    assert [score.is_greedy for score in shared] == [score.is_greedy for score in plain]
    assert [score.p_sampled for score in shared] == pytest.approx([score.p_sampled for score in plain], abs=1e-5)


def test_training_mode_and_wrappers_change_nothing(tokenizer):
    prompts, forms = towns_prompts(), [["Norway", "Peru"]] * 12
    model = build_answering_model(tokenizer)
    expected = score_answers(model, tokenizer, prompts, forms)

    dropout = build_answering_model(tokenizer).train()
    for layer in dropout.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert score_answers(dropout, tokenizer, prompts, forms) == expected and dropout.training
    input_ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    dropout(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in dropout.parameters())

    fused = build_answering_model(tokenizer)
    add_fused_lm_head(fused)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = get_peft_model(build_answering_model(tokenizer), adapter)
    for wrapped in (fused, adapted):
        assert score_answers(wrapped, tokenizer, prompts, forms) == expected


@pytest.mark.parametrize("accepted", [[["a"], ["b"]], [[]], [[" "]], ["France"], [["a\nb"]]], ids=str)
def test_errors(accepted, tokenizer, model):
    assert score_answers(model, tokenizer, [], []) == []
    with pytest.raises(ValueError, match=r"has 1 entries|accepted_answers\[0\].* non-empty|one line"):
        score_answers(model, tokenizer, ["Q"], accepted)
