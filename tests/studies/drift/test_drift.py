# SPDX-License-Identifier: Apache-2.0
"""States are those of each prompt by itself, the drift is right by hand and in runs, subjects are found."""

import math

import pytest
import torch
from conftest import CITIES, CORPUS, build_model, build_tokenizer
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from sft_runs import FACTS, TOKENIZER, architecture, trainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from trl_selfdistill.files import read_jsonl
from trl_selfdistill.slick.prompt_tokens import tokenize_prompts
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.drift import DriftProbeCallback
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


SUBJECTS = [*CITIES][:5]
HELD_OUT = Dataset.from_dict({"subject": SUBJECTS, "question": [f"Which country is {city} in?" for city in SUBJECTS]})
NAMES = [f"drift_cosine/layer_{layer}/last_{token}_token" for layer in (1, 2) for token in ("subject", "prompt")]
NAMES += ["drift_kl"]


def dropout_model():
    """Dropout makes the random state count."""
    return build_model(TOKENIZER, attention_dropout=0.2, initializer_range=0.4)


def run(folder, probe, resume=None, **options):
    trained = trainer(folder, dropout_model(), trainer_class=SFTTrainer, **options)
    trained.add_callback(DriftProbeCallback(trained, HELD_OUT, **{"every_steps": 2, **probe}))
    trained.train(resume_from_checkpoint=resume)
    return trained


def measured(trainer, name="drift_kl") -> dict[int, float]:
    """What was logged under a name, by step."""
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def test_the_log_has_the_drift_from_the_first_model_and_a_resumed_run_goes_on_from_it(tmp_path):
    options, file = dict(save_strategy="steps", save_steps=1, max_steps=3), tmp_path / "drift.jsonl"
    probe = {"output_file": file, "every_steps": 1}
    whole = run(tmp_path, probe, **options)
    prompts, lines = whole.callback_handler.callbacks[-1].prompts, read_jsonl(file)
    first, last = (prompt_states(model, prompts, (1, 2)) for model in (dropout_model(), whole.model))
    for name, values in drift(first, last, (1, 2)).items():
        assert measured(whole, f"drift_{name}")[3] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert all(lines[0][name] == pytest.approx(0, abs=1e-15) for name in NAMES)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["epoch"] == 1
    assert all({line["step"]: line[name] for line in lines} == measured(whole, name) for name in NAMES)
    # Steps 2 and 3 are done again, and after the last checkpoint none
    for checkpoint in ("checkpoint-1", "checkpoint-3"):
        resumed = run(tmp_path, probe, resume=str(tmp_path / "run" / checkpoint), **options)
        assert measured(resumed) == measured(whole) and read_jsonl(file) == lines
    with pytest.raises(ValueError, match="is of other facts, layers or prompts"):
        run(tmp_path, {"layers": [2]}, resume=str(tmp_path / "run" / "checkpoint-1"))
    (tmp_path / "run" / "_drift_reference.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="_drift_reference.safetensors"):
        run(tmp_path, {}, resume=str(tmp_path / "run" / "checkpoint-1"))
    # A new run in the same folder starts from its own model, in the file as well
    again = run(tmp_path, {"output_file": file}, max_steps=1)
    assert [line["step"] for line in read_jsonl(file)] == [*measured(again)] == [0, 1]


def test_the_best_model_is_not_taken_for_the_last_step(tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", save_strategy="steps", save_steps=1)
    best |= dict(eval_strategy="steps", eval_steps=1, arguments=dict(eval_dataset=Dataset.from_list(FACTS)))
    trainer = run(tmp_path, {}, max_steps=3, **best)
    assert trainer.state.best_model_checkpoint and [*measured(trainer)] == [0, 2]


def test_mistakes_are_errors_before_the_training(tmp_path):
    for facts, options, message in (
        (HELD_OUT.select([]), {}, "`facts` is empty"),
        (HELD_OUT, dict(every_steps=0), "`every_steps` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DriftProbeCallback(trainer(tmp_path), facts, **options)
