# SPDX-License-Identifier: Apache-2.0
"""Interpolated checkpoints are the models between, by their weights and by what they answer."""

import shutil

import pytest
import torch
from conftest import build_model
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from toy_study import run_script
from transformers import AutoModelForCausalLM

from trl_selfdistill.hub.interpolation import interpolate
from trl_selfdistill.hub.model_card import update_model_card


NOT_COPIED = {"trainer_state.json", "parameter_groups.json", "accuracy.jsonl", "curves.png"}


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """Folders of a model `start` and of the same one moved, `end`, which is in several files and in bf16."""
    folder = tmp_path_factory.mktemp("models")
    model = build_model(tokenizer)
    model.register_buffer("counts", torch.arange(3))  # what did not move may be of any dtype
    model.save_pretrained(folder / "start")
    moved(model).to(torch.bfloat16).save_pretrained(folder / "end", max_shard_size="20KB")
    tokenizer.save_pretrained(folder / "end")
    update_model_card(folder / "end", training={"settings": {"seed": 3}, "license": "mit", "base_model": "org/base"})
    for name in NOT_COPIED:
        (folder / "end" / name).write_text("{}")
    return folder


def moved(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def weights(folder) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_weights_of_a_model_in_several_files(models, tmp_path, alpha):
    folders = ["--start", models / "start", "--end", models / "end", "--output_dir", tmp_path / "out"]
    run_script("interpolate.py", *folders, "--alpha", alpha)
    start, end, found = (weights(folder) for folder in (models / "start", models / "end", tmp_path / "out"))
    assert found.keys() == end.keys() and len([*(tmp_path / "out").glob("*.safetensors")]) > 1
    for name, tensor in found.items():
        expected = (1 - alpha) * start[name].double() + alpha * end[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not NOT_COPIED & {path.name for path in (tmp_path / "out").iterdir()}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert f"The weights are {alpha} of those" in card.text and card.data.license == "mit"


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}]
)
def test_adapters_are_interpolated_in_what_they_add(models, tmp_path, options):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "embed_tokens"], **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "start"), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "last")
    interpolate(tmp_path / "last", 0.3, tmp_path / "out")
    assert "not recorded how these weights were trained" in (tmp_path / "out" / "README.md").read_text()

    def merged(folder):
        base = AutoModelForCausalLM.from_pretrained(models / "start")
        return PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()

    start, end = AutoModelForCausalLM.from_pretrained(models / "start").state_dict(), merged(tmp_path / "last")
    assert any(not torch.equal(start[name], end[name]) for name in start)
    for name, tensor in merged(tmp_path / "out").items():
        torch.testing.assert_close(tensor, torch.lerp(start[name], end[name], 0.3), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_interpolated_is_refused_and_nothing_is_written(models, tmp_path):
    def adapter(name, config):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "start"), config)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    def changed(name, change):
        shutil.copytree(models / "start", tmp_path / name)
        tensors = weights(tmp_path / name)
        change(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        return tmp_path / name

    start, end, first = models / "start", models / "end", "model.embed_tokens.weight"
    # Tied embeddings may have one name in a file, or both
    interpolate(changed("tied", lambda tensors: tensors.pop("lm_head.weight")), 0.5, tmp_path / "of tied", start)
    lora = adapter("lora", LoraConfig(target_modules=["q_proj"]))
    dora = adapter("dora", LoraConfig(target_modules=["q_proj"], use_dora=True))
    saved = adapter("saved", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ia3 = adapter("ia3", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    pissa = adapter("pissa", LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    (tmp_path / "empty").mkdir()
    shutil.copytree(start, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"version")
    cases = [
        (end, 1.1, start, r"`alpha` .* in \[0, 1\], got 1.1"),
        (end, float("nan"), start, "`alpha`"),
        (end, 0.5, None, "`start` must be a full model, as `end` is, got None"),
        (lora, 0.5, start, "`start` must be left out, as `end` is an adapter"),
        (end, 0.5, lora, "`start` must be a full model"),
        (end, 0.5, changed("fewer", lambda tensors: tensors.pop(first)), f"1 tensors are .* only, such as {first}"),
        (end, 0.5, changed("wide", lambda t: t.update({first: t[first].repeat(1, 2)})), f"{first} is of shape"),
        (end, 0.5, changed("int", lambda t: t.update({first: t[first].to(torch.uint8)})), f"{first} is quantised"),
        (dora, 0.5, None, "adapter with `use_dora` = True"),
        (ia3, 0.5, None, "`peft_type` = 'IA3'"),
        (pissa, 0.5, None, "`init_lora_weights` = "),
        (end, 0.5, changed("fp8", lambda t: t.update({first: t[first].to(torch.float8_e4m3fn)})), f"{first} is quan"),
        (saved, 0.5, None, "modules_to_save"),
        (tmp_path / "empty", 0.5, start, "holds no weights"),
        (end, 0.5, tmp_path / "cut", "cut/model.safetensors is not whole"),
        ("org/model", 0.5, start, "'org/model' is neither a folder nor a model that the Hub gives"),
        ("no such folder", 0.5, start, "neither a folder nor a model"),
    ]
    for after, alpha, before, message in cases:
        with pytest.raises(ValueError, match=message):
            interpolate(after, alpha, tmp_path / "out", before)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match="`alpha` .* got 2.0"):
        run_script("interpolate.py", "--start", start, "--end", end, "--alpha", 2, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="`output_dir`: .* is not an empty folder"):
        interpolate(end, 0.5, start, start)
