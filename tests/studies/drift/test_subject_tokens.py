# SPDX-License-Identifier: Apache-2.0
"""The subject's tokens are those that spell it, no more and no fewer, whatever the family of the tokenizer."""

import pytest
from conftest import CORPUS, build_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trl_selfdistill.slick.prompt_tokens import tokenize_prompts
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.drift.subject_tokens import subject_prompts


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


TOKENIZERS = {"SmolLM2": build_tokenizer(), "Qwen": qwen(), "Llama 2": llama2()}
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
    tokenizer = TOKENIZERS["SmolLM2"]
    found = only(tokenizer, question, subject)
    assert text(tokenizer, found.token_ids[found.last_subject_token + 1 :]) == rest


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
