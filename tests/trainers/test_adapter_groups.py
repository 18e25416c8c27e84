# SPDX-License-Identifier: Apache-2.0
"""Groups with adapters: they are put on the groups to train, and nowhere else."""

import shutil

import pytest
import torch
from accelerate.utils import compare_versions
from conftest import add_code, build_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sft_runs import TOKENIZER, train, trainer

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer


PROJECTIONS = {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}}
BOTH = PROJECTIONS["attention"] | PROJECTIONS["mlp"]
CHOICES = [
    (dict(trainable_groups=["attention"]), {}, PROJECTIONS["attention"]),
    (dict(frozen_groups=["embeddings"]), dict(target_modules="all-linear"), BOTH),
    (dict(trainable_groups=["re:q_proj", "re:up_proj"]), {}, {"q_proj", "up_proj"}),
    (dict(trainable_groups=["attention"]), dict(target_modules=["q_proj"]), {"q_proj"}),
    (dict(trainable_groups=["attention"]), dict(exclude_modules=["q_proj"]), PROJECTIONS["attention"] - {"q_proj"}),
]


def adapted_modules(model) -> set[str]:
    return {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("groups, lora, expected", CHOICES)
def test_adapters_are_on_the_trainable_groups_alone(tmp_path, model_dir, groups, lora, expected):
    for model, trainer_class in ((str(model_dir), SelfDistillSFTTrainer), (None, FrozenGroupsSFTTrainer)):
        run = trainer(tmp_path, model, dict(peft_config=LoraConfig(r=2, **lora)), trainer_class, **groups)
        assert adapted_modules(run.model) == expected
    rows = {row.group: row.trainable_parameters for row in run.group_table}
    for group, names in PROJECTIONS.items():
        assert bool(rows[group]) == bool(names & expected)


def test_a_peft_config_by_position_is_found(tmp_path):
    run = trainer(tmp_path, None, None, FrozenGroupsSFTTrainer, trainable_groups=["mlp"])
    given = [None, run.train_dataset, None, TOKENIZER, *[None] * 3, (None, None), *[None] * 3, LoraConfig(r=2)]
    adapted = FrozenGroupsSFTTrainer(build_model(TOKENIZER), run.args, *given).model
    assert adapted_modules(adapted) == PROJECTIONS["mlp"]


@pytest.mark.parametrize(
    "config, groups, message",
    [
        (LoraConfig(target_modules=["q_proj", "up_proj"]), ["attention"], "4 tensors .*up_proj.* `target_modules`"),
        (LoraConfig(target_modules=r".*\.up_proj"), ["attention"], "4 tensors in frozen groups: .*up_proj"),
        (LoraConfig(modules_to_save=["lm_head"]), ["attention"], "tensors in frozen groups: .*lm_head"),
        (LoraConfig(), ["norm"], "no linear module"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), ["attention"], "got PromptTuningConfig"),
    ],
)
def test_what_contradicts_the_groups_is_refused(tmp_path, config, groups, message):
    model = build_model(TOKENIZER)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, dict(peft_config=config), FrozenGroupsSFTTrainer, trainable_groups=groups)


def test_a_model_with_adapters_elsewhere_is_refused(tmp_path):
    def peft_model(targets):
        return get_peft_model(build_model(TOKENIZER), LoraConfig(target_modules=targets))

    models = [peft_model(["q_proj", "up_proj"])]
    if compare_versions("transformers", "<", "5.24") or compare_versions("peft", ">=", "0.22"):  # which it asks for
        models.append(build_model(TOKENIZER))
        models[1].add_adapter(LoraConfig(target_modules=["up_proj"]))
    for model in models:
        with pytest.raises(ValueError, match="trains 4 tensors in frozen groups: .*up_proj"):
            trainer(tmp_path, model, None, FrozenGroupsSFTTrainer, trainable_groups=["attention"])
    run = train(tmp_path, peft_model(["q_proj"]), None, FrozenGroupsSFTTrainer, trainable_groups=["attention"])
    assert adapted_modules(run.model) == {"q_proj"}


def test_a_model_by_name_is_loaded_as_sft_trainer_does(tmp_path, model_dir):
    """With code of its own and a dtype; adapters and groups change nothing in that."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    add_code(folder)
    options = dict(trust_remote_code=True, model_init_kwargs={"dtype": "bfloat16"}, trainable_groups=["attention"])
    adapter = dict(peft_config=LoraConfig(r=2))
    run = train(tmp_path, str(folder), adapter, FrozenGroupsSFTTrainer, **options)
    base = run.model.get_base_model()
    assert type(base).__name__ == "Tiny" and base.dtype == torch.bfloat16
    assert adapted_modules(run.model) == PROJECTIONS["attention"]
