# SPDX-License-Identifier: Apache-2.0
"""States are those of each prompt by itself, the drift is right by hand, and a subject is where its tokens are."""

import math

import pytest
import torch
from conftest import CITIES, CORPUS, build_model, build_tokenizer
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from sft_runs import TOKENIZER, architecture
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trl_selfdistill.slick.prompt_tokens import tokenize_prompts
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.drift.prompt_states import PromptStates, check_layers, drift, prompt_states
from trl_selfdistill.studies.drift.subject_tokens import subject_prompts


# Prompts of uneven length, the subject here and there
FORMS = ["Where is {}?", "{} is in which country, and why?", "Is it {}"] * 2
QUESTIONS = [form.format(city) for form, city in zip(FORMS, CITIES, strict=True)]
PROMPTS = subject_prompts(TOKENIZER, QUESTIONS, [*CITIES])
LAYERS = (1, 2)
ADAPTERS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def model_of(name: str):
    if name not in ADAPTERS:
        return architecture(name)
    torch.manual_seed(0)
    return get_peft_model(build_model(TOKENIZER, initializer_range=0.4), ADAPTERS[name])


@torch.no_grad()
def direct_states(model) -> PromptStates:
    """The same states from the model's own outputs, one prompt at a time. Virtual tokens come before the prompts."""
    model.eval()
    hidden_states, log_probs = [], []
    for token_ids, position in PROMPTS:
        outputs = model(torch.tensor([token_ids]), output_hidden_states=True)
        positions = [position - len(token_ids), -1]
        hidden_states.append(torch.stack([outputs.hidden_states[layer][0, positions] for layer in LAYERS]))
        log_probs.append(outputs.logits[0, -1].log_softmax(-1))
    return PromptStates(torch.stack(hidden_states), torch.stack(log_probs))


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", *ADAPTERS])
def test_the_states_are_those_of_each_prompt_by_itself(name):
    model = model_of(name)
    for batch_size in (1, 4, 32):
        model.train()
        found = prompt_states(model, PROMPTS, LAYERS, batch_size)
        assert model.training
        for part, other in zip(found, direct_states(model), strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


def test_the_drift_by_layer_and_position_by_hand():
    # Of one prompt, the last subject token and the last prompt token of two layers
    start = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[3.0, 4.0], [0.0, 2.0]]]])
    now = torch.tensor([[[[5.0, 0.0], [0.0, 1.0]], [[-3.0, -4.0], [2.0, 2.0]]]])
    # The start model rules out the third token
    start_probs, probs = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = drift(PromptStates(start, start_probs.log()), PromptStates(now, probs.log()), (7, 14))
    assert found == {
        "cosine/layer_7/last_subject_token": [pytest.approx(0)],
        "cosine/layer_7/last_prompt_token": [pytest.approx(1)],
        "cosine/layer_14/last_subject_token": [pytest.approx(2)],
        "cosine/layer_14/last_prompt_token": [pytest.approx(1 - math.sqrt(0.5))],
        "kl": [pytest.approx(0.5 * math.log(2))],
    }


def test_layers_are_the_middle_and_the_last_or_those_asked_for():
    model = build_model(TOKENIZER, num_hidden_layers=5)
    assert check_layers(model, None) == (2, 5) and check_layers(model, [5, 1]) == (5, 1)
    for wrong in ([0], [1, 6], [-1], ["1"], [], [2, 2]):
        with pytest.raises(ValueError, match=r"`layers` is \[.*different whole numbers from 1 to 5"):
            check_layers(model, wrong)


def qwen() -> PreTrainedTokenizerFast:
    """Offsets leave out the space of a token, and special tokens are added."""
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    template, special_tokens = "<|im_start|> $A <|im_end|>", [("<|im_start|>", 1), ("<|im_end|>", 2)]
    special = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
    parts = [processors.ByteLevel(trim_offsets=True), special]
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(parts)
    return tokenizer


def llama2() -> PreTrainedTokenizerFast:
    """SentencePiece: spaces are letters, what is not in the vocabulary becomes bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token goes over two words
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "東京 St. John's (Lima"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"SmolLM2": TOKENIZER, "Qwen": qwen(), "Llama 2": llama2()}
CASES = {
    "Which country is Lyon located in?": "Lyon",
    "Which country is Đứčķ located in?": "Đứčķ",
    "東京はどこですか?": "東京",
    "Lyon": "Lyon",
    "Where is St. John's (Lima)?": "St. John's (Lima)",
}


def only(tokenizer, question, subject):
    [found] = subject_prompts(tokenizer, [question], [subject])
    return found


def text(tokenizer, token_ids) -> str:
    return tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_last_token_ends_the_subject(name):
    tokenizer = TOKENIZERS[name]
    for question, subject in CASES.items():
        prompt, found = question_prompt(question), only(tokenizer, question, subject)
        assert list(found.token_ids) == tokenize_prompts(tokenizer, [prompt])[0]
        end = found.last_subject_token + 1
        assert subject in text(tokenizer, found.token_ids[:end])
        assert subject not in text(tokenizer, found.token_ids[: end - 1])
        assert text(tokenizer, found.token_ids[end:]) == prompt.split(subject)[-1]


@pytest.mark.parametrize(
    ("question", "subject", "rest"),
    [
        ("Is Lyon Lyon?", "Lyon", "?\nA:"),
        ("Is Lyon in Lyonnais?", "Lyon", " in Lyonnais?\nA:"),
        ("東京と東京都はどこ?", "東京", "都はどこ?\nA:"),
        ("Who is A here?", "A", " here?\nA:"),
    ],
)
def test_the_last_word_of_the_question_counts(question, subject, rest):
    found = only(TOKENIZER, question, subject)
    assert text(TOKENIZER, found.token_ids[found.last_subject_token + 1 :]) == rest


def test_what_cannot_be_found_is_an_error_that_names_it():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Lyon", "")
    for subject, message in (
        ("Oslo", "'Oslo' is not in the question 'Where is Lyon"),
        ("lyon", "'lyon' is not in the question"),
        ("Lyon", "drops the subject 'Lyon' of 'Q: Where is Lyon"),
    ):
        with pytest.raises(ValueError, match=message):
            only(tokenizer, "Where is Lyon?", subject)
