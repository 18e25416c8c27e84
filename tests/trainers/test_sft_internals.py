# SPDX-License-Identifier: Apache-2.0
"""What the trainers rely on inside TRL and transformers: forwards bound to instances, heads, config classes."""

import runpy
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig
from sft_runs import IDS, config, trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments
from transformers.models.mixtral import modeling_mixtral
from trl import SFTConfig
from trl.trainer import utils as trl_utils

from trl_selfdistill import SelfDistillSFTConfig
from trl_selfdistill.trainers.frozen_groups_sft_config import config_from
from trl_selfdistill.trainers.label_head import label_hidden_states, lm_head_of
from trl_selfdistill.trainers.sft_internals import (
    add_label_head_forward,
    base_causal_lm,
    frozen_copy,
    label_positions_only,
    train_in_order,
)


def patched_by_trl(folder, peft=False):
    """The model of a trainer, with the forwards that TRL, this package and accelerate bind to it."""
    arguments = dict(peft_config=LoraConfig(target_modules=["q_proj"])) if peft else {}
    run = trainer(folder, None, arguments, bf16=True)
    return run.accelerator.prepare_model(run.model)


@pytest.mark.parametrize("peft", [False, True])
def test_a_frozen_copy_runs_its_own_weights(tmp_path, peft):
    model = patched_by_trl(tmp_path, peft).train()
    copy = frozen_copy(model)
    with torch.no_grad():
        before = copy(input_ids=IDS).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copy(input_ids=IDS).logits, before) and before.abs().max() > 0
    assert before.dtype == torch.float32  # not under the autocast that was bound to the original
    assert model(input_ids=IDS).logits.abs().max() == 0
    assert not copy.training and model.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    for module in (copy, base_causal_lm(copy)):  # accelerate would take a prepared model as it is, and restore these
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & module.__dict__.keys()


def test_the_label_head_forward_gives_the_hidden_states_of_the_label_positions(model):
    def generate(model, **options):
        return model.generate(IDS, max_new_tokens=3, do_sample=False, logits_to_keep=1, **options)

    logits, generated = model(input_ids=IDS).logits, generate(model)
    labels = IDS.clone()
    labels[0, :4] = labels[1, 5:] = -100
    add_label_head_forward(model)
    hidden_states = label_hidden_states(model, dict(input_ids=IDS, labels=labels))
    torch.testing.assert_close(lm_head_of(model).logits(hidden_states), logits[:, :-1][labels[:, 1:] != -100])
    assert torch.equal(model(input_ids=IDS).logits, logits)
    assert torch.equal(generate(model), generated)
    with pytest.raises(ValueError, match="model_kwargs.* are not used"):  # `generate` still checks what it is given
        generate(model, no_such_argument=1)


@pytest.mark.parametrize("config_class", [TrainingArguments, SFTConfig])
def test_config_from_keeps_every_value(tmp_path, config_class):
    options = dict(hub_token="hf_x", lr_scheduler_kwargs={"num_cycles": 2}, eval_strategy="steps", eval_steps=7)
    if config_class is SFTConfig:
        options |= dict(eos_token="<|im_start|>", pad_token="<|im_end|>", model_init_kwargs={"dtype": "bfloat16"})
    args = config(tmp_path, config_class, **options)
    made = config_from(args, SelfDistillSFTConfig, None, "SelfDistillSFT")
    assert type(made) is SelfDistillSFTConfig
    values, expected = made.to_dict(), args.to_dict()
    assert {name: values[name] for name in expected} == expected
    for name in options:  # `to_dict` masks tokens
        assert getattr(made, name) == getattr(args, name)
    assert config_from(made, SelfDistillSFTConfig, None, "SelfDistillSFT") is made


def test_the_head_sees_the_label_positions_only_and_the_loss_is_the_same(tmp_path):
    run = trainer(tmp_path, None, kl_weight=0.0)
    masked = torch.where(torch.arange(10) < 6, -100, IDS)
    flops, losses, gradients = [], [], []
    for context, labels in (
        (nullcontext, masked),
        (label_positions_only, masked),
        (nullcontext, masked),
        (label_positions_only, IDS),
    ):
        run.model.zero_grad()
        with context(), FlopCounterMode(display=False) as counter:
            output = run.model(input_ids=IDS, labels=labels, fused_lm_head=True)
        output.loss.backward()
        flops.append(counter.get_total_flops())
        losses.append(output.loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    head = run.model.get_output_embeddings().weight.numel()
    assert flops[3] - flops[1] == 2 * head * 2 * (9 - 4) and flops[2] == flops[0]
    for values in (losses, gradients):
        torch.testing.assert_close(values[1], values[0])


def test_rows_are_taken_in_order(tmp_path):
    run = trainer(tmp_path)
    train_in_order(run)
    rows = list(run.train_dataset)
    expected = [run.data_collator(rows[i : i + 2])["input_ids"] for i in range(0, len(rows), 2)]
    for batch, ids in zip(run.get_train_dataloader(), expected, strict=True):
        assert torch.equal(batch["input_ids"], ids)


@pytest.mark.parametrize(
    "owner, name",
    [
        (trl_utils, "use_adapter"),
        (modeling_mixtral, "load_balancing_loss_func"),
        (Trainer, "_load_best_model"),  # we override it: without the check nothing would call ours
    ],
)
def test_a_missing_private_name_is_named_at_import_with_the_tested_versions(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=f"{name}.* Found trl {version('trl')} .tested: 1.15"):
        runpy.run_module("trl_selfdistill.trainers.sft_internals")
