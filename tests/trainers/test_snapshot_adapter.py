# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the student's adapter becomes the teacher in the middle of a run; adapters on the LM head."""

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from sft_runs import TOKENIZER, StopAt, logs, train, trainer
from trl import SFTTrainer

from trl_selfdistill.trainers.adapter_teacher import TEACHER_ADAPTER, AdapterTeacher


LORA = dict(r=4, target_modules=["q_proj", "up_proj"])
ADAPTERS = {
    "LoRA": LoraConfig(**LORA),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "dropout": LoraConfig(**LORA, lora_dropout=0.5),
    "a whole head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
}
SNAPSHOT = dict(max_steps=6, save_strategy="steps", save_steps=1, teacher_snapshot_steps=3, learning_rate=2e-2)


def adapted(name: str = "LoRA", **config):
    torch.manual_seed(5)
    adapter = LoraConfig(**{**LORA, **config}) if config else ADAPTERS[name]
    return get_peft_model(build_model(TOKENIZER, initializer_range=0.3), adapter)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_teacher_is_the_adapter_of_that_step(tmp_path, name):
    run = train(tmp_path / "ours", adapted(name), **SNAPSHOT)
    assert isinstance(run.teacher, AdapterTeacher) and run.teacher_model is None
    sft = train(
        tmp_path / "sft", adapted(name), {"callbacks": [StopAt(3)]}, SFTTrainer, max_steps=6, learning_rate=2e-2
    )
    expected = get_peft_model_state_dict(sft.model, save_embedding_layers=False)
    kept = load_file(tmp_path / "ours/run/_teacher/adapter_model.safetensors")
    held = get_peft_model_state_dict(run.model, adapter_name=TEACHER_ADAPTER, save_embedding_layers=False)
    assert expected.keys() == kept.keys() == held.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, kept[key]) and torch.equal(tensor, held[key])
    kl = [row.get("kl_loss") for row in logs(run) if "loss" in row]
    assert kl[:3] == [None] * 3 and None not in kl[3:] and kl[-1] > 0
    if name != "dropout":  # at the step after the snapshot, student and teacher are the same
        assert kl[3] == pytest.approx(0, abs=1e-6)
    saved = load_file(tmp_path / "ours/run/checkpoint-6/adapter_model.safetensors")
    assert saved.keys() == expected.keys() and not any(TEACHER_ADAPTER in key for key in saved)


def plain_loss(model, teacher_logits, inputs, kl_weight: float, temperature: float) -> torch.Tensor:
    """CE + λ τ² KL from whole logits."""
    labels = inputs["labels"][:, 1:]
    mask = labels != -100
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1][mask]
    log_probs = (logits / temperature).log_softmax(-1)
    teacher = (teacher_logits[:, :-1][mask] / temperature).log_softmax(-1)
    kl = (teacher.exp() * (teacher - log_probs)).sum(-1).mean()
    return torch.nn.functional.cross_entropy(logits, labels[mask]) + kl_weight * temperature**2 * kl


def test_an_adapted_head_is_exact(tmp_path):
    """A whole head of its own (`modules_to_save`), trained since the snapshot; TRL refuses low-rank ones."""
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    run = trainer(tmp_path, model, kl_weight=2.0, temperature=0.7)
    inputs = dict(next(iter(run.get_train_dataloader())))
    with torch.no_grad():
        teacher_logits = run.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        for parameter in run.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
    loss = run.compute_loss(run.model, dict(inputs))
    expected = plain_loss(run.model, teacher_logits, inputs, 2.0, 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_parts_of_a_head_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Remove `'lm_head'` from your `target_modules`"):
        trainer(tmp_path, adapted(target_modules=["q_proj", "lm_head"]))
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6])
    tied = get_peft_model(build_model(TOKENIZER, tie_word_embeddings=True), tokens)
    with pytest.raises(ValueError, match="embeddings that it is tied to.* set `kl_weight=0`"):
        trainer(tmp_path, tied)
