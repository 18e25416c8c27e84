# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the trainers on a GPU (`make gpu`), beside the same runs on the CPU. Skipped where there is no GPU."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sft_runs import FACTS, logs, trainer, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ANCHORS = Dataset.from_list([{"prompt": row["prompt"].replace("Q", "Question")} for row in FACTS])
RUNS = {
    "self-distillation": {},
    "its cache": dict(precompute_teacher=True),
    "anchors": dict(anchors="kl"),
    "LoRA": dict(learning_rate=0.1),
    "frozen groups": dict(trainable_groups=["attention"]),
    "checkpointed": dict(gradient_checkpointing=True),
    "packed": dict(packing=True, max_length=32),
}


def run(folder, name, **options):
    arguments = {"anchors": dict(anchor_dataset=ANCHORS), "LoRA": dict(peft_config=LoraConfig(r=4))}.get(name)
    trainer_class = FrozenGroupsSFTTrainer if name == "frozen groups" else SelfDistillSFTTrainer
    result = trainer(folder, None, arguments, trainer_class, **RUNS[name] | options)
    result.train()
    return result


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_cpu(tmp_path, name):
    on_cpu, on_cuda = (run(tmp_path, name, use_cpu=use_cpu) for use_cpu in (True, False))
    assert next(on_cuda.model.parameters()).is_cuda
    for theirs, ours in zip(logs(on_cpu), logs(on_cuda), strict=True):
        for key in ours.keys() & {"loss", "ce_loss", "kl_loss", "entropy", "anchor_kl_loss", "grad_norm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    theirs = weights(on_cpu.model)
    for key, ours in weights(on_cuda.model).items():
        torch.testing.assert_close(ours.cpu(), theirs[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("option", ["bf16", "fp16", "activation_offloading", "torch_compile"])
@pytest.mark.parametrize("name", ["self-distillation", "frozen groups"])
def test_options_of_a_gpu(tmp_path, name, option):
    plain, ours = run(tmp_path, name, use_cpu=False), run(tmp_path, name, use_cpu=False, **{option: True})
    tolerance = {"activation_offloading": 1e-6, "torch_compile": 1e-4}.get(option, 2e-2)
    for expected, row in zip(logs(plain), logs(ours), strict=True):
        if "loss" in row:
            assert row["loss"] == pytest.approx(expected["loss"], rel=tolerance)


@pytest.mark.parametrize("groups", [None, ["attention"]], ids=str)
def test_qlora_trains_the_adapter_and_leaves_the_base(tmp_path, model_dir, groups):
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=nf4, device_map={"": 0})
    arguments = dict(peft_config=LoraConfig(r=4))
    options = dict(learning_rate=0.3, bf16=True, use_cpu=False, trainable_groups=groups)
    ours = trainer(tmp_path, model, arguments, **options)
    before = weights(ours.model)
    assert any(p.dtype == torch.uint8 for p in before.values())
    ours.train()
    assert logs(ours)[0]["kl_loss"] < 1e-6 < logs(ours)[1]["kl_loss"]
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
