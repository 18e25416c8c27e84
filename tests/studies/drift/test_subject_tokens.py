# SPDX-License-Identifier: Apache-2.0
"""The subject's tokens are those that spell it, no more and no fewer, whatever the family of the tokenizer."""

import pytest
from conftest import CORPUS, build_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from trl_selfdistill.slick.prompts import few_shot_prompt, question_prompt
from trl_selfdistill.studies.drift.subject_tokens import subject_prompts


TEXTS = [*CORPUS, "São Paulo, Łódź, 東京", "Lyon is a city. Paulo and Lima are cities"]
WORDS = Regex(r"\s?[^\s\p{P}]+|\p{P}|\s")


def trained(model: models.Model, alphabet=(), specials=("<bos>",), **parts) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    options = dict(vocab_size=400, special_tokens=[*specials], initial_alphabet=[*alphabet], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**options))
    tokenizer.post_processor = processors.Sequence(
        [
            *([tokenizer.post_processor] if tokenizer.post_processor else []),
            processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def byte_level(trim_offsets: bool, normalizer=None) -> PreTrainedTokenizerFast:
    """As Llama 3 (keeps the space in a token's offsets) or, with NFC, Qwen: the regex first, then bytes."""
    pieces = [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    parts = {"pre_tokenizer": pre_tokenizers.Sequence(pieces), "decoder": decoders.ByteLevel()}
    parts["post_processor"] = processors.ByteLevel(trim_offsets=trim_offsets)
    if normalizer:
        parts["normalizer"] = normalizer
    return trained(models.BPE(), pre_tokenizers.ByteLevel.alphabet(), **parts)


def sentencepiece(prepend: bool) -> PreTrainedTokenizerFast:
    """As Gemma, and with `prepend` as Llama 2: spaces are letters, what is not in the vocabulary becomes bytes."""
    spaces = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    model = models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    # So that no token goes over two words
    words = pre_tokenizers.Split("▁", "merged_with_next")
    parts = dict(normalizer=normalizer, pre_tokenizer=words, decoder=decoder)
    return trained(model, specials=("<bos>", "<unk>", *all_bytes), **parts)


TOKENIZERS = {
    "SmolLM2": build_tokenizer(),
    "Llama 3": byte_level(trim_offsets=False),
    "Qwen": byte_level(trim_offsets=True, normalizer=normalizers.NFC()),
    "Gemma": sentencepiece(prepend=False),
    "Llama 2": sentencepiece(prepend=True),
}
CASES = {
    "in the middle": ("Which country is Lyon located in?", "Lyon"),
    "two words": ("Which country is São Paulo located in?", "São Paulo"),
    "accents, bytes": ("Which country is Łódź located in?", "Łódź"),
    "unknown letters": ("Which country is Đứčķ located in?", "Đứčķ"),
    "no spaces": ("東京はどこですか?", "東京"),
    "at the beginning": ("Lyon is where?", "Lyon"),
    "at the end": ("Where is Lyon", "Lyon"),
    "the whole question": ("Lyon", "Lyon"),
    "a UUID": ("Where is 0b5e-4a1f-9c?", "0b5e-4a1f-9c"),
    "with punctuation": ("Where is St. John's (Lima)?", "St. John's (Lima)"),
}


def only(tokenizer, prompt, question, subject):
    [found] = subject_prompts(tokenizer, [prompt], [question], [subject])
    return found


def text(tokenizer, token_ids) -> str:
    return tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_spell_the_subject_and_each_is_needed(name, case):
    tokenizer, (question, subject) = TOKENIZERS[name], CASES[case]
    found = only(tokenizer, question_prompt(question), question, subject)
    assert list(found.token_ids) == tokenizer(question_prompt(question))["input_ids"]
    begin, end = found.subject_positions[0], found.subject_positions[-1] + 1
    assert found.subject_positions == tuple(range(begin, end))
    assert subject in text(tokenizer, found.token_ids[begin:end])
    assert subject not in text(tokenizer, found.token_ids[begin + 1 : end])
    assert subject not in text(tokenizer, found.token_ids[begin : end - 1])
    # Without the subject's tokens, its question is gone and the rest is there
    assert text(tokenizer, found.token_ids[end:]) == question_prompt(question).split(subject)[-1]


def test_a_token_that_goes_beyond_the_subject_is_one_of_its_tokens():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer().backend_tokenizer)
    tokenizer.add_tokens(["n?", "Q: L"])
    found = only(tokenizer, "Q: Lyon?\nA:", "Lyon?", "Lyon")
    assert found.subject_positions[0] == 0 and text(tokenizer, found.token_ids[:1]) == "Q: L"
    assert text(tokenizer, found.token_ids[found.subject_positions[-1] :]) == "n?\nA:"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_question_counts_and_not_the_exemplars_before_it(name):
    tokenizer, question = TOKENIZERS[name], "Which country is Lyon located in?"
    zero_shot = only(tokenizer, question_prompt(question), question, "Lyon")
    exemplars = [("Which country is Lima located in?", "Peru"), (question, "France")]
    few_shot = only(tokenizer, few_shot_prompt(question, exemplars), question, "Lyon")
    assert few_shot.subject_positions[0] > zero_shot.subject_positions[-1] + 10
    count = len(zero_shot.token_ids) - zero_shot.subject_positions[0]
    assert few_shot.token_ids[few_shot.subject_positions[0] :] == zero_shot.token_ids[-count:]


def test_the_last_occurrence_as_a_word_counts_and_any_where_there_is_none():
    tokenizer = TOKENIZERS["SmolLM2"]

    def rest(question, subject):
        found = only(tokenizer, question_prompt(question), question, subject)
        return text(tokenizer, found.token_ids[found.subject_positions[-1] + 1 :])

    assert rest("Lyon or Lyon?", "Lyon") == "?\nA:"
    assert rest("Is Lyon in Lyonnais?", "Lyon") == " in Lyonnais?\nA:"
    assert rest("東京と東京都はどこ?", "東京") == "都はどこ?\nA:"
    # The letters of the prompt's own format are not the question's
    assert rest("Who is A here?", "A") == " here?\nA:"


def test_what_cannot_be_found_is_an_error_that_names_it():
    tokenizer = TOKENIZERS["SmolLM2"]
    question = "Which country is Lyon located in?"
    prompt = question_prompt(question)
    for subject in ("Oslo", "lyon", "A:", " "):
        with pytest.raises(ValueError, match="is not in the question of the prompt") as caught:
            subject_prompts(tokenizer, [prompt], [question], [subject])
        assert repr(subject) in str(caught.value) and repr(prompt) in str(caught.value)
    with pytest.raises(ValueError, match="does not contain its question 'Where is Lyon"):
        subject_prompts(tokenizer, [prompt], ["Where is Lyon?"], ["Lyon"])
    with pytest.raises(ValueError, match="shorter"):
        subject_prompts(tokenizer, [prompt], [question], [])


def test_a_subject_that_the_tokenizer_drops_is_an_error():
    tokenizer = trained(models.BPE(), normalizer=normalizers.Replace("Lyon", ""))
    with pytest.raises(ValueError, match="'Lyon' has no token of its own in the prompt 'Q: Where is Lyon"):
        subject_prompts(tokenizer, [question_prompt("Where is Lyon?")], ["Where is Lyon?"], ["Lyon"])


def test_a_slow_tokenizer_is_refused():
    class Slow(PythonBackend):
        def get_vocab(self):
            return {}

        @property
        def vocab_size(self):
            return 0

    with pytest.raises(ValueError, match="`tokenizer` is a Slow, which does not say which characters"):
        subject_prompts(Slow(), ["Q: Lyon\nA:"], ["Lyon"], ["Lyon"])
