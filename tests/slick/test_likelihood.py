# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from accelerate import Accelerator
from answering_model import EXEMPLARS, QUESTIONS, build_answering_model, teach, towns_prompts
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from trl.trainer.utils import add_fused_lm_head

from trl_selfdistill.answers import likelihood
from trl_selfdistill.hallucination.exact_match import exact_match, spellings
from trl_selfdistill.slick.generation import answer_ends, predict_answers
from trl_selfdistill.slick.likelihood import score_answers
from trl_selfdistill.slick.prompts import answer_completion, few_shot_prompt


ARCHITECTURES = ["llama", "gpt2", "opt", "bloom", "gemma2", "mamba", "falcon_h1", "plain"]
COUNTRIES = sorted(set(QUESTIONS.values()))


class PlainHead(PreTrainedModel):
    """A model of which only `input_ids` and `use_cache` can be said: no `logits_to_keep`, no cache."""

    config_class = GPT2Config
    _supports_sdpa = True

    def __init__(self, inner):
        super().__init__(inner.config)
        self.inner = inner

    def forward(self, input_ids, use_cache=None):
        return type("Output", (), {"logits": self.inner(input_ids=input_ids).logits})()


def build_architecture(name: str, tokenizer):
    torch.manual_seed(1)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    size = dict(**ids, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    wide = dict(**ids, n_embd=16, n_layer=2, n_head=2)
    models = {
        "llama": lambda: build_answering_model(tokenizer),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**wide, n_positions=256)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**size, ffn_dim=32, word_embed_proj_dim=16)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(**ids, hidden_size=16, n_layer=2, n_head=2)),
        # The window is shorter than the prompt, and than the prefix that prompts share.
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **size,
                intermediate_size=32,
                num_key_value_heads=1,
                head_dim=8,
                sliding_window=12,
                final_logit_softcapping=5.0,
                query_pre_attn_scalar=8,
            )  # fmt: skip
        ),
        "mamba": lambda: MambaForCausalLM(MambaConfig(**ids, hidden_size=16, num_hidden_layers=2)),
        # Attention and state space in every layer: its cache is one of keys and values, and more.
        "falcon_h1": lambda: FalconH1ForCausalLM(
            FalconH1Config(
                **size,
                intermediate_size=32,
                num_key_value_heads=1,
                mamba_d_ssm=16,
                mamba_n_heads=2,
                mamba_d_head=8,
                mamba_n_groups=1,
                mamba_d_state=8,
                mamba_chunk_size=8,
            )  # fmt: skip
        ),
        "plain": lambda: PlainHead(GPT2LMHeadModel(GPT2Config(**wide, n_positions=256))),
    }
    model = models[name]()
    return model if name == "llama" else teach(model, tokenizer, num_steps=80 if name == "gemma2" else 30)


def next_logits(model, token_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1].double()


def naive_score(model, tokenizer, prompt, forms, temperature=1.0, top_k=None):
    """The definition: one forward pass a token, without cache, padding or shared work."""
    terminators = list(answer_ends(model, tokenizer).terminator_ids)
    is_greedy, p_sampled = False, 0.0
    prompt_ids = tokenizer(prompt)["input_ids"]
    lower = [" ".join([*form.split()[:-1], form.split()[-1].lower()]) for form in forms]
    for full in {tuple(tokenizer(prompt + answer_completion(form))["input_ids"]) for form in [*forms, *lower]}:
        start = next(i for i, token in enumerate(full) if i >= len(prompt_ids) or token != prompt_ids[i])
        greedy, probability = True, 1.0
        for t in range(start, len(full) + 1):
            logits = next_logits(model, full[:t])
            allowed = terminators if t == len(full) else [full[t]]
            greedy = greedy and logits.argmax().item() in allowed
            logits = logits / temperature
            if top_k is not None:
                logits[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
            probability *= logits.softmax(-1)[allowed].sum().item()
        is_greedy, p_sampled = is_greedy or greedy, p_sampled + probability
    return is_greedy, p_sampled


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_k": 20}], ids=["plain", "top-k"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_the_definition(architecture, sampling, tokenizer, monkeypatch):
    model = build_architecture(architecture, tokenizer)
    prompts = towns_prompts()[:4] + [few_shot_prompt("Where?", EXEMPLARS), few_shot_prompt("A? \nA: ", EXEMPLARS)]
    forms = [COUNTRIES[i % 3 :] + ["Norway and Peru"] for i in range(len(prompts))]
    prefixes = []
    original = likelihood._shared_prefix
    monkeypatch.setattr(likelihood, "_shared_prefix", lambda *a: prefixes.append(original(*a)) or prefixes[-1])
    scores = score_answers(model, tokenizer, prompts, forms, batch_size=3, **sampling)
    assert (prefixes[0].length > 30) == (architecture not in ("mamba", "falcon_h1", "plain"))
    for score, prompt, accepted in zip(scores, prompts, forms, strict=True):
        is_greedy, p_sampled = naive_score(model, tokenizer, prompt, accepted, **sampling)
        assert score.is_greedy == is_greedy
        assert score.p_sampled == pytest.approx(p_sampled, rel=1e-4, abs=3e-6)
    assert sum(score.p_sampled > 1e-3 for score in scores) > 2


def test_is_greedy_is_what_generation_writes(tokenizer):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts() + [f"Q: {q}\nA:" for q in QUESTIONS] + [f"A: {c}\nQ: O?\nA:" for c in COUNTRIES]
    written = [answers[0] for answers in predict_answers(model, tokenizer, prompts)]
    assert len({*written} & {*COUNTRIES}) >= 2
    for country in COUNTRIES:
        scores = score_answers(model, tokenizer, prompts, [[country]] * len(prompts))
        assert [score.is_greedy for score in scores] == [exact_match(answer, [country]) for answer in written]


def test_p_sampled_is_the_frequency_of_sampling(tokenizer):
    model = build_answering_model(tokenizer)
    prompts, forms, num_samples = towns_prompts()[:6], ["Norway", "France"], 600
    sampling = {"temperature": 1.3, "top_k": 5}
    scores = score_answers(model, tokenizer, prompts, [forms] * 6, **sampling)
    samples = predict_answers(
        model, tokenizer, prompts, num_samples=num_samples, max_new_tokens=12, batch_size=6 * num_samples, **sampling
    )
    for score, answers in zip(scores, samples, strict=True):
        frequency = sum(exact_match(answer, forms) for answer in answers) / num_samples
        # 4 standard deviations of the binomial distribution; the 0.01 is for other tokens of the same text.
        assert abs(frequency - score.p_sampled) < 4 * (score.p_sampled * (1 - score.p_sampled) / 600) ** 0.5 + 0.01
    assert any(0.2 < score.p_sampled < 0.8 for score in scores)


def test_laws_of_sampling(tokenizer):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts()
    forms = [COUNTRIES] * len(prompts)
    for score in score_answers(model, tokenizer, prompts, forms, top_k=1):
        assert score.p_sampled == pytest.approx(float(score.is_greedy))
    # Colder sampling comes closer to greedy decoding, and top-k no smaller than the vocabulary changes nothing.
    for cold, plain, top in zip(
        score_answers(model, tokenizer, prompts, forms, temperature=0.02),
        score_answers(model, tokenizer, prompts, forms),
        score_answers(model, tokenizer, prompts, forms, top_k=10**6),
        strict=True,
    ):
        assert cold.p_sampled == pytest.approx(float(cold.is_greedy), abs=0.1)
        assert top == plain
    # Forms exclude each other: their probabilities add up.
    parts = [score_answers(model, tokenizer, prompts, [[form]] * len(prompts)) for form in COUNTRIES]
    for whole, *single in zip(score_answers(model, tokenizer, prompts, forms), *parts, strict=True):
        assert whole.p_sampled == pytest.approx(sum(score.p_sampled for score in single), abs=1e-5)
        assert whole.is_greedy == any(score.is_greedy for score in single)


def test_shared_work_changes_no_score(tokenizer, monkeypatch):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts() * 2  # each question twice
    forms = [[country, f"the {country}", country] for country in COUNTRIES * 6][: len(prompts)]
    num_rows = []
    forward = likelihood._forward
    monkeypatch.setattr(likelihood, "_forward", lambda m, ids, *a: num_rows.append(len(ids)) or forward(m, ids, *a))
    shared = score_answers(model, tokenizer, prompts, forms, temperature=0.5, top_k=5)
    # Of four spellings a form, repeated ones are scored once and the unlikely ones not at all.
    distinct = len({(prompt, form[0]) for prompt, form in zip(prompts, forms, strict=True)})
    assert distinct <= sum(num_rows) < 2 * distinct
    monkeypatch.setattr(likelihood, "_MIN_SHARED_PREFIX", 10**6)
    monkeypatch.setattr(likelihood, "_NEGLIGIBLE_LOG_PROB", -torch.inf)
    plain = score_answers(model, tokenizer, prompts, forms, temperature=0.5, top_k=5, batch_size=1)
    assert [score.is_greedy for score in shared] == [score.is_greedy for score in plain]
    assert [score.p_sampled for score in shared] == pytest.approx([score.p_sampled for score in plain], abs=1e-5)


def test_terminators(tokenizer):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts()[:3]
    newline = tokenizer("\n")["input_ids"]
    scores = [
        score_answers(model, tokenizer, prompts, [["Norway"]] * 3, terminator_ids=ids)
        for ids in (newline, [tokenizer.eos_token_id], [*newline, tokenizer.eos_token_id])
    ]
    for by_newline, by_eos, by_both in zip(*scores, strict=True):
        assert by_newline.p_sampled + by_eos.p_sampled == pytest.approx(by_both.p_sampled, rel=1e-5)
        assert by_both.is_greedy == (by_newline.is_greedy or by_eos.is_greedy)
        assert not (by_newline.is_greedy and by_eos.is_greedy)
    assert any(score.is_greedy for score in scores[0])


def test_one_prompt_shares_itself(tokenizer):
    model = build_answering_model(tokenizer)
    [prompt] = towns_prompts()[:1]
    [score] = score_answers(model, tokenizer, [prompt], [COUNTRIES])
    is_greedy, p_sampled = naive_score(model, tokenizer, prompt, COUNTRIES)
    assert score.is_greedy == is_greedy and score.p_sampled == pytest.approx(p_sampled, abs=3e-6)


def test_greedy_only_finds_every_greedy_answer_and_bounds_the_probability(tokenizer):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts()
    forms = [["Norwegia", "Peruvia", "Norway", "Peru"]] * len(prompts)
    expected = score_answers(model, tokenizer, prompts, forms)
    scores = score_answers(model, tokenizer, prompts, forms, greedy_only=True)
    assert [score.is_greedy for score in scores] == [score.is_greedy for score in expected]
    assert sum(score.is_greedy for score in scores) > 3
    lost = [all_forms.p_sampled - score.p_sampled for all_forms, score in zip(expected, scores, strict=True)]
    assert min(lost) > -1e-6 and max(lost) > 1e-4


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("Norway", ["Norway", "norway"]),
        ("South Korean Won", ["South Korean Won", "South Korean won"]),
        ("rock music", ["rock music", "rock Music"]),
        ("1,000", ["1,000"]),
        ("Große ßtraße", ["Große ßtraße"]),
    ],
)
def test_spellings_are_one_answer(form, expected):
    assert spellings(form) == expected
    assert all(exact_match(spelling, [form]) for spelling in expected)


def test_other_spelling_counts(tokenizer):
    model = build_answering_model(tokenizer)
    prompts = towns_prompts()
    capital = score_answers(model, tokenizer, prompts, [["Norway"]] * 12)
    small = score_answers(model, tokenizer, prompts, [["norway"]] * 12)
    assert [score.is_greedy for score in capital] == [score.is_greedy for score in small]
    assert [score.p_sampled for score in capital] == pytest.approx([score.p_sampled for score in small], abs=3e-6)
    assert any(score.is_greedy for score in small)


def test_model_is_left_as_it_was(tokenizer):
    model = build_answering_model(tokenizer).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config = copy.deepcopy(model.config.to_dict())
    score_answers(model, tokenizer, towns_prompts(), [["Norway"]] * 12)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    input_ids = torch.tensor([tokenizer(towns_prompts()[0])["input_ids"]])
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_training_mode_and_wrappers_change_nothing(tokenizer):
    prompts, forms = towns_prompts(), [["Norway", "Peru"]] * 12
    expected = score_answers(build_answering_model(tokenizer), tokenizer, prompts, forms)

    dropout = build_answering_model(tokenizer)
    dropout.config.attention_dropout = 0.5
    for layer in dropout.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert score_answers(dropout.train(), tokenizer, prompts, forms) == expected

    fused = build_answering_model(tokenizer)
    add_fused_lm_head(fused)
    assert score_answers(fused, tokenizer, prompts, forms) == expected

    adapted = get_peft_model(
        build_answering_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    assert score_answers(adapted, tokenizer, prompts, forms) == expected


def test_under_accelerate_autocast(tokenizer):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare_model(build_answering_model(tokenizer))
    prompts, forms = towns_prompts(), [["Norway", "Peru"]] * 12
    expected = score_answers(build_answering_model(tokenizer), tokenizer, prompts, forms)
    scores = score_answers(model, tokenizer, prompts, forms)
    assert scores != expected  # bfloat16 was at work
    assert [score.p_sampled for score in scores] == pytest.approx([score.p_sampled for score in expected], abs=0.05)


def test_tokenizer_that_adds_bos_and_eos(tokenizer):
    model = build_answering_model(tokenizer)
    with_specials = copy.deepcopy(tokenizer)
    bos, eos = tokenizer.pad_token, tokenizer.eos_token
    with_specials._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)]
    )
    assert with_specials("a")["input_ids"][-1] == tokenizer.eos_token_id
    prompts, forms = towns_prompts(), [["Norway"]] * 12
    with_bos = score_answers(model, tokenizer, [bos + prompt for prompt in prompts], forms)
    assert score_answers(model, with_specials, prompts, forms) == with_bos


def test_no_prompts(tokenizer, model):
    assert score_answers(model, tokenizer, [], []) == []


@pytest.mark.parametrize(
    ("accepted", "message"),
    [([["a"], ["b"]], "1 entries"), ([[]], r"accepted_answers\[0\]"), ([[" "]], "non-empty"), (["France"], "list")],
)
def test_errors(accepted, message, tokenizer, model):
    with pytest.raises(ValueError, match=message):
        score_answers(model, tokenizer, ["Q"], accepted)
