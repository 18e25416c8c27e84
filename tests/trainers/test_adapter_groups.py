# SPDX-License-Identifier: Apache-2.0
"""Groups with adapters: they are put on the groups to train, and nowhere else."""

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sft_runs import TOKENIZER, logs, train, trainer, weights

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer


PROJECTIONS = {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}}
BOTH = PROJECTIONS["attention"] | PROJECTIONS["mlp"]
CHOICES = [
    (dict(trainable_groups=["attention"]), {}, PROJECTIONS["attention"]),
    (dict(frozen_groups=["attention"]), {}, PROJECTIONS["mlp"]),
    (dict(frozen_groups=["embeddings"]), dict(target_modules="all-linear"), BOTH),
    (dict(trainable_groups=["re:q_proj", "re:up_proj"]), {}, {"q_proj", "up_proj"}),
    (dict(trainable_groups=["attention"]), dict(target_modules=["q_proj"]), {"q_proj"}),
    (dict(trainable_groups=["attention"]), dict(exclude_modules=["q_proj"]), PROJECTIONS["attention"] - {"q_proj"}),
]


def adapted_modules(model) -> set[str]:
    return {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("trainer_class", [FrozenGroupsSFTTrainer, SelfDistillSFTTrainer])
@pytest.mark.parametrize("groups, lora, expected", CHOICES)
def test_adapters_are_on_the_trainable_groups_alone(tmp_path, model_dir, trainer_class, groups, lora, expected):
    for model in (str(model_dir), build_model(TOKENIZER)):
        run = trainer(tmp_path, model, dict(peft_config=LoraConfig(r=2, **lora)), trainer_class, **groups)
        assert adapted_modules(run.model) == expected
    before = weights(run.model)
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".lora_" in name for name in moved)
    rows = {row.group: row.trainable_parameters for row in run.group_table}
    for group, names in PROJECTIONS.items():
        assert bool(rows[group]) == bool(names & expected)


def test_layers_are_counted(tmp_path):
    run = trainer(
        tmp_path, None, dict(peft_config=LoraConfig(r=2)), FrozenGroupsSFTTrainer, trainable_groups=["mlp:1"]
    )
    assert {n.split(".layers.")[1][0] for n, p in run.model.named_parameters() if p.requires_grad} == {"1"}


@pytest.mark.parametrize(
    "config, groups, message",
    [
        (
            LoraConfig(target_modules=["q_proj", "up_proj"]),
            ["attention"],
            "2 of the targeted .*up_proj",
        ),
        (LoraConfig(target_modules=r".*\.up_proj"), ["attention"], "contradict each other"),
        (LoraConfig(modules_to_save=["lm_head"]), ["attention"], "tensors in frozen groups: .*lm_head"),
        (LoraConfig(), ["norm"], "no linear module"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), ["attention"], "does not adapt modules"),
    ],
)
def test_what_contradicts_the_groups_is_refused(tmp_path, config, groups, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, None, dict(peft_config=config), FrozenGroupsSFTTrainer, trainable_groups=groups)


def test_a_peft_model_with_adapters_elsewhere_is_refused(tmp_path):
    def model(targets):
        return get_peft_model(build_model(TOKENIZER), LoraConfig(target_modules=targets))

    with pytest.raises(ValueError, match="trains 4 tensors in frozen groups: .*up_proj"):
        trainer(tmp_path, model(["q_proj", "up_proj"]), None, FrozenGroupsSFTTrainer, trainable_groups=["attention"])
    run = train(tmp_path, model(["q_proj"]), None, FrozenGroupsSFTTrainer, trainable_groups=["attention"])
    assert adapted_modules(run.model) == {"q_proj"}


@pytest.mark.parametrize("arguments", [{}, dict(peft_config=LoraConfig(r=4))])
def test_frozen_groups_and_distillation_in_one_run(tmp_path, arguments):
    run = trainer(tmp_path, None, arguments, trainable_groups=["attention"], learning_rate=0.05)
    before = weights(run.model)
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".self_attn." in name for name in moved)
    assert logs(run)[0]["kl_loss"] < 1e-6 < logs(run)[-2]["kl_loss"]
