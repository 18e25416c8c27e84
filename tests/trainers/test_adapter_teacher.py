# SPDX-License-Identifier: Apache-2.0
"""The teacher as a second adapter of the student: the same KL as with a copy of the whole model, at no such cost."""

import copy
import json
import shutil

import peft
import pytest
import torch
from conftest import build_model
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from sft_runs import IDS, LORA, TOKENIZER, StopAt, assert_same_weights, logs, train, trainer
from trl import SFTTrainer

from trl_selfdistill.parameters.hashes import hash_model
from trl_selfdistill.trainers.adapter_teacher import TEACHER_ADAPTER, AdapterTeacher, is_fresh
from trl_selfdistill.trainers.sft_internals import frozen_copy


ADAPTERS = {
    "fresh": LoraConfig(**LORA),
    "trained": LoraConfig(**LORA, init_lora_weights=False),
    "half frozen": LoraConfig(**LORA, init_lora_weights=False),
    "with dropout": LoraConfig(**LORA, init_lora_weights=False, lora_dropout=0.5),
    "fresh DoRA": LoraConfig(**LORA, use_dora=True),
    "trained DoRA": LoraConfig(**LORA, use_dora=True, init_lora_weights=False),
    "PiSSA": LoraConfig(**LORA, init_lora_weights="pissa"),
    "a whole head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "a trained whole head": LoraConfig(**LORA, modules_to_save=["lm_head"], init_lora_weights=False),
    "whole embeddings": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "AdaLoRA": AdaLoraConfig(**LORA, task_type="CAUSAL_LM", total_step=100, init_r=4),  # masks its matrices
}
if hasattr(peft, "LilyConfig"):
    ADAPTERS["Lily"] = peft.LilyConfig(**LORA)  # whose matrices several layers share


def adapted(name: str) -> PeftModel:
    torch.manual_seed(5)
    model = get_peft_model(build_model(TOKENIZER, initializer_range=0.3), copy.deepcopy(ADAPTERS[name]))
    if name == "a trained whole head":
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_(std=0.3)
    for parameter_name, parameter in model.named_parameters():
        if name == "half frozen" and "lora_A" in parameter_name:
            parameter.requires_grad_(False)
    if name in ("IA3", "AdaLoRA"):
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter) * parameter.requires_grad)
    return model


@pytest.mark.parametrize("name, bf16", [*((name, False) for name in ADAPTERS), ("trained", True), ("IA3", True)])
def test_loss_and_weights_are_those_with_a_copy_of_the_whole_model(tmp_path, name, bf16):
    """And there is no second base in memory."""
    settings = dict(bf16=bf16, gradient_checkpointing=bf16)
    model = adapted(name)
    sizes = {n: p.numel() for n, p in model.named_parameters(remove_duplicate=False)}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    ours = train(tmp_path, model, **settings)
    assert ours.model is model and ours.teacher_model is None  # no other module holds parameters
    added = 0 if name == "fresh" else sum(sizes[n] for n in sizes if ".default" in n)
    total = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    assert total == sum(sizes.values()) + added
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.active_adapters == ["default"] and model.training
    model = adapted(name)
    theirs = train(tmp_path, model, dict(teacher_model=frozen_copy(model)), **settings)
    assert isinstance(ours.teacher, AdapterTeacher) and theirs.teacher_model is not None
    assert ours.teacher.adapter_name == (None if name == "fresh" else TEACHER_ADAPTER)
    tolerance = dict(rel=1e-2, abs=1e-3) if bf16 else dict(rel=1e-4, abs=1e-6)
    for ours_row, theirs_row in zip(logs(ours), logs(theirs), strict=True):
        for row in (ours_row, theirs_row):
            row.pop("total_flos", None)  # an estimate from the number of parameters, the second adapter's among them
        assert ours_row == pytest.approx(theirs_row, **tolerance)
    expected = dict(theirs.model.named_parameters())
    for parameter_name, parameter in ours.model.named_parameters():
        if TEACHER_ADAPTER not in parameter_name:
            tolerance = dict(atol=3e-2, rtol=0) if bf16 else dict(atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(parameter, expected[parameter_name], **tolerance)
    assert logs(ours)[0]["kl_loss"] < 1e-6 or name == "with dropout" or bf16
    assert logs(ours)[1]["kl_loss"] > 1e-6


def test_the_output_of_an_earlier_run_is_in_nobodys_way_and_never_the_drifted_student_the_teacher(tmp_path):
    """The earlier teacher is taken only for its own checkpoints, and its weights do not stay in those of another."""
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=2e-2)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    train(tmp_path, None, **options, teacher_snapshot_steps=1)  # leaves a full model
    for name in ("fresh", "trained"):
        whole = train(tmp_path, adapted(name), **options)
        assert not (checkpoint / "model.safetensors").exists()
        shutil.rmtree(tmp_path / "run" / "checkpoint-2")
        base = build_model(TOKENIZER, initializer_range=0.3)
        drifted = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
        resumed = train(tmp_path, drifted if name == "trained" else adapted(name), resume=True, **options)
        assert_same_weights(resumed.model, whole.model)
        assert json.loads((checkpoint / "resume.json").read_text())["teacher"]["sha256"] == whole.teacher.sha256
    shutil.rmtree(tmp_path / "run" / "_teacher")
    other = get_peft_model(build_model(TOKENIZER), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    for student in (drifted, other):
        with pytest.raises(ValueError, match="The teacher is not the one that"):
            train(tmp_path, student, resume=str(checkpoint), **options)


def test_an_adapter_may_have_the_name_of_a_module():
    config = dict(**LORA, init_lora_weights=False)
    models = [
        get_peft_model(build_model(TOKENIZER), LoraConfig(**config), adapter_name=n) for n in ("lora_A", "model")
    ]
    assert not is_fresh(models[0])
    hashes = {hash_model(model, adapters=False) for model in models}
    models[1].get_base_model().model.norm.weight.data[0] += 1
    assert len(hashes) == 1 and hash_model(models[1], adapters=False) not in hashes


def test_the_teacher_is_the_base_alone_beside_a_fresh_adapter_and_a_new_one_for_a_model_that_was_trained(tmp_path):
    model = adapted("fresh")
    before = trainer(tmp_path, model).teacher.sha256
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_()
    trained = adapted("trained")
    first, second = train(tmp_path, trained).teacher.sha256, trainer(tmp_path, trained).teacher.sha256
    assert trainer(tmp_path, model).teacher.sha256 == before and len({before, first, second}) == 3
    assert list(trained.peft_config) == ["default", TEACHER_ADAPTER]
    model.base_model.model.lm_head.weight.data[0, 0] += 1
    assert trainer(tmp_path, model).teacher.sha256 != before


@pytest.mark.parametrize("init", [True, False])
def test_weights_that_are_trained_beside_the_adapter_make_the_teacher_a_copy(tmp_path, init, caplog):
    """As in LongLoRA: switching adapters off would leave them moved."""
    torch.manual_seed(5)
    model = get_peft_model(build_model(TOKENIZER), LoraConfig(**LORA, init_lora_weights=init))
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.requires_grad_(True)
    run = trainer(tmp_path, model, learning_rate=0.1)
    inputs = dict(input_ids=IDS, labels=IDS)
    before = run.teacher.targets(run.model, inputs).hidden_states
    run.train()
    assert torch.equal(run.teacher.targets(run.model, inputs).hidden_states, before)
    assert run.teacher_model is not None and "nothing beside it must be trained" in caplog.text


SNAPSHOT = dict(max_steps=6, save_strategy="steps", save_steps=1, teacher_snapshot_steps=3, learning_rate=2e-2)


@pytest.mark.parametrize("name", ["fresh", "with dropout", "fresh DoRA", "a whole head"])
def test_a_snapshot_is_the_adapter_of_that_step(tmp_path, name):
    run = train(tmp_path / "ours", adapted(name), **SNAPSHOT, frozen_groups=["embeddings"])
    run.train(resume_from_checkpoint=str(tmp_path / "ours/run/checkpoint-2"))  # without the teacher of before
    assert isinstance(run.teacher, AdapterTeacher) and run.teacher_model is None
    stopped, options = {"callbacks": [StopAt(3)]}, dict(max_steps=6, learning_rate=2e-2)
    sft = train(tmp_path / "sft", adapted(name), stopped, SFTTrainer, **options)
    expected = get_peft_model_state_dict(sft.model, save_embedding_layers=False)
    kept = load_file(tmp_path / "ours/run/_teacher/adapter_model.safetensors")
    assert expected.keys() == kept.keys() and all(torch.equal(tensor, kept[key]) for key, tensor in expected.items())
    kl = [row.get("kl_loss") for row in logs(run) if "loss" in row]
    assert kl[:3] == [None] * 3 and None not in kl[3:] and kl[-1] > 0
    if name != "with dropout":  # at the step after the snapshot, student and teacher are the same
        assert kl[3] == pytest.approx(0, abs=1e-6)
    saved = load_file(tmp_path / "ours/run/checkpoint-6/adapter_model.safetensors")
    assert saved.keys() == expected.keys() and not any(TEACHER_ADAPTER in key for key in saved)
    run.model.add_adapter("later", LoraConfig(target_modules=["q_proj"]))  # the teacher alone is left out
    run.model.save_pretrained(tmp_path / "all")
    assert {path.parent.name for path in (tmp_path / "all").rglob("*.safetensors")} == {"all", "later"}


def test_parts_of_a_head_are_refused(tmp_path):
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6])
    tied = get_peft_model(build_model(TOKENIZER, tie_word_embeddings=True), tokens)
    with pytest.raises(ValueError, match="embeddings that it is tied to.* set `kl_weight=0`"):
        trainer(tmp_path, tied)
