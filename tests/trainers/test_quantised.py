# SPDX-License-Identifier: Apache-2.0
"""QLoRA: an NF4 base, which both the student and its teacher use, and which training leaves bit for bit as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sft_runs import logs, train, trainer, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_selfdistill.parameters.hashes import hash_model


pytest.importorskip("bitsandbytes")
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def quantised(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4), dtype=torch.float32, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("start", ["fresh", "trained", "trained DoRA", "groups"])
def test_a_quantised_run_trains_the_adapter_and_leaves_the_base(tmp_path, model_dir, start):
    torch.manual_seed(0)
    model, extra, options = quantised(model_dir), {}, {}
    if start.startswith("trained"):
        lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_dora="DoRA" in start)
        model = get_peft_model(model, lora)
    else:
        extra = dict(peft_config=LoraConfig(r=4, target_modules=None if start == "groups" else ["q_proj"]))
        options = dict(trainable_groups=["attention"]) if start == "groups" else {}
    run = trainer(tmp_path, model, extra, learning_rate=0.3, temperature=0.5, **options)
    before = weights(run.model)
    assert run.teacher_model is None and sum(p.dtype == torch.uint8 for p in before.values()) == 14
    run.train()
    assert logs(run)[0]["kl_loss"] < 1e-6 < logs(run)[1]["kl_loss"]
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in moved)


def test_the_hash_of_a_quantised_model_is_of_its_scales_too(model_dir):
    model = quantised(model_dir)
    before = hash_model(model)
    assert before == hash_model(quantised(model_dir))
    next(p for p in model.parameters() if p.dtype == torch.uint8).quant_state.absmax.mul_(4)
    assert hash_model(model) != before


def test_evaluation_does_not_end_the_training_of_a_quantised_model(tmp_path, model_dir):
    """bitsandbytes repacks weights in evaluation mode on some CPUs, and adapters would get no gradient after that."""
    settings = dict(learning_rate=0.02, max_steps=3)
    extra = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    plain = train(tmp_path, quantised(model_dir), extra, **settings)
    run = trainer(tmp_path, quantised(model_dir), extra, **settings)
    run.evaluate(run.train_dataset)
    run.train()
    ours = [row["grad_norm"] for row in logs(run) if "grad_norm" in row]
    assert ours == pytest.approx([row["grad_norm"] for row in logs(plain) if "grad_norm" in row])
