# SPDX-License-Identifier: Apache-2.0
"""
FrozenGroupsSFTTrainer: what is frozen, saved and refused, and that adapters are on the groups to train alone (that it
is SFTTrainer otherwise: test_laws.py).
"""

import json
import shutil

import pytest
import torch
from accelerate.utils import compare_versions
from conftest import add_code, build_model
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sft_runs import FACTS, TOKENIZER, assert_same_weights, config, train, trainer, weights
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTTrainer

from trl_selfdistill import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer, SelfDistillSFTTrainer
from trl_selfdistill.parameters.groups import GroupSelection, freeze_selection
from trl_selfdistill.parameters.hashes import digest, hash_parameters


def frozen(folder, model=None, arguments=None, run=train, resume=None, **options) -> FrozenGroupsSFTTrainer:
    """A run of three steps with a large weight decay and a checkpoint after each."""
    settings = dict(weight_decay=0.5, save_strategy="steps", save_steps=1)
    args = config(folder, FrozenGroupsSFTConfig, **{**settings, **options})
    resumed = dict(resume=resume) if run is train else {}
    return run(folder, model, {"args": args, **(arguments or {})}, FrozenGroupsSFTTrainer, **resumed)


class Tamper(TrainerCallback):
    """Writes to a frozen weight in the second step, as a stray hook would."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_frozen_has_no_gradient_and_no_optimizer_state(tmp_path, tied):
    run = frozen(tmp_path, build_model(TOKENIZER, tie_word_embeddings=tied), trainable_groups=["attention"])
    with_state = {id(parameter) for parameter in run.optimizer.state}
    in_groups = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in run.model.named_parameters():
        attention = "self_attn" in name
        assert (id(parameter) in with_state) == (id(parameter) in in_groups) == parameter.requires_grad == attention
        assert attention or parameter.grad is None
    assert len(with_state) == 8


def test_table_is_printed_kept_and_saved_with_hashes(tmp_path, capsys):
    run = frozen(tmp_path, frozen_groups=["mlp", "lm_head"])
    assert str(run.group_table) in capsys.readouterr().out
    run.save_model(str(tmp_path / "final"))
    files = [tmp_path / "final", *(tmp_path / "run" / f"checkpoint-{step}" for step in (2, 3))]
    saved = [json.loads((folder / "parameter_groups.json").read_text()) for folder in files]
    assert saved[0] == saved[1] == saved[2]
    assert saved[0]["frozen_groups"] == ["mlp", "lm_head"] and saved[0]["trainable_groups"] is None
    rows = saved[0]["groups"]
    assert [(group, row["parameters"]) for group, row in rows.items()] == [row[::2] for row in run.group_table]
    # A hash is that of the file: a reader who freezes the same groups of the saved model gets it again
    reloaded = type(run.model).from_pretrained(tmp_path / "final")
    freeze_selection(reloaded, GroupSelection.parse(saved[0]["frozen_groups"]))
    digests = {group: digest(members) for group, members in hash_parameters(reloaded).items()}
    assert {group: row["frozen_sha256"] for group, row in rows.items() if row["frozen_sha256"]} == digests
    untrained = frozen(tmp_path / "untrained", run=trainer, frozen_groups=["mlp"])
    assert untrained.describe_groups()["groups"]["mlp"]["frozen_sha256"] == digests["mlp"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_evaluation_in_half_precision_leaves_the_weights(tmp_path, dtype):
    extra = dict(eval_dataset=Dataset.from_list(FACTS[:2]))
    run = frozen(tmp_path, None, extra, frozen_groups=["mlp"], **{f"{dtype}_full_eval": True})
    expected = {**dict(run.model.named_buffers()), **weights(run.model)}
    exact = frozen(tmp_path / "exact", None, extra, frozen_groups=["mlp"]).evaluate()["eval_loss"]
    assert 0 < abs(run.evaluate()["eval_loss"] - exact) < 0.05
    assert all(torch.equal(buffer, expected[name]) for name, buffer in run.model.named_buffers())
    run.save_model(str(tmp_path / "final"))
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) and tensor.dtype == torch.float32 for name, tensor in saved.items())
    run.train()


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_frozen_parameter_that_moves_is_found(tmp_path, save_strategy):
    extra = dict(callbacks=[Tamper()])
    options = dict(frozen_groups=["mlp"], save_strategy=save_strategy, save_steps=2)
    with pytest.raises(ValueError, match=r"'mlp' changed: \['model.layers.1.mlp.up_proj.weight'\]"):
        frozen(tmp_path, None, extra, **options)
    assert not list((tmp_path / "run").glob("checkpoint-*/model.safetensors"))  # found before the model is written
    frozen(tmp_path, None, extra, verify_frozen=False, **options)


def test_what_is_trainable_again_before_training_is_found(tmp_path):
    run = trainer(tmp_path, None, {}, FrozenGroupsSFTTrainer, frozen_groups=["mlp"])
    run.model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"6 parameters that .* froze are trainable now: \['model.layers.0.mlp"):
        run.train()


def test_a_full_model_takes_the_place_of_an_adapter(tmp_path):
    for arguments, groups in ((dict(peft_config=LoraConfig()), ["attention"]), ({}, None)):
        run = train(tmp_path, None, arguments, FrozenGroupsSFTTrainer, trainable_groups=groups)
        run.save_model(tmp_path / "out")
    assert not {"adapter_config.json", "parameter_groups.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), run.model)


def test_a_run_of_sft_trainer_goes_on_without_groups_alone(tmp_path):
    train(tmp_path, None, {}, SFTTrainer, save_strategy="steps")
    with pytest.raises(ValueError, match=r"checkpoint-3 was trained with `frozen_groups=None`, not \['mlp'\]"):
        frozen(tmp_path, frozen_groups=["mlp"], resume=True)


def test_resuming_refuses_other_groups_and_other_weights(tmp_path):
    frozen(tmp_path, frozen_groups=["mlp:0", "norm"])
    frozen(tmp_path, frozen_groups={"norm", "mlp:0"}, resume=True)
    for other in (dict(frozen_groups=["mlp:1"]), dict(trainable_groups=["attention"]), {}):
        with pytest.raises(ValueError, match=r"checkpoint-3 was trained with `frozen_groups=\['mlp:0', 'norm'\]`"):
            frozen(tmp_path, resume=True, **other)
    weights = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "run" / "checkpoint-3" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="frozen parameters in 'mlp' are not those"):
        frozen(tmp_path, frozen_groups=["mlp:0", "norm"], resume=True, max_steps=4)

    def adapted(seed):
        torch.manual_seed(0)
        return get_peft_model(build_model(TOKENIZER, seed), LoraConfig(r=2, target_modules=["q_proj"]))

    # A checkpoint of adapters does not hold the base: its hash tells that another one was handed over
    frozen(tmp_path, adapted(0), trainable_groups=["attention"])
    with pytest.raises(ValueError, match="frozen parameters in 'embeddings' are not those"):
        frozen(tmp_path, adapted(1), trainable_groups=["attention"], resume=True, max_steps=4)


PROJECTIONS = {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}}
BOTH = PROJECTIONS["attention"] | PROJECTIONS["mlp"]
CHOICES = [
    (dict(trainable_groups=["attention"]), {}, PROJECTIONS["attention"]),
    (dict(frozen_groups=["embeddings"]), dict(target_modules="all-linear"), BOTH),
    (dict(trainable_groups=["re:q_proj", "re:up_proj"]), {}, {"q_proj", "up_proj"}),
    (dict(trainable_groups=["attention"]), dict(target_modules=["q_proj"]), {"q_proj"}),
    (dict(trainable_groups=["attention"]), dict(exclude_modules=["q_proj"]), PROJECTIONS["attention"] - {"q_proj"}),
    (dict(trainable_groups=["mlp:0", "re:1.*q_proj"]), dict(layers_to_transform=1), {"q_proj"}),
    (dict(frozen_groups=["norm"]), dict(target_parameters=["mlp.up_proj.weight"]), {"up_proj"}),
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


@pytest.mark.parametrize(
    "config, groups, message",
    [
        (LoraConfig(target_modules=["q_proj", "up_proj"]), ["attention"], "4 tensors .*up_proj.* `target_modules`"),
        (LoraConfig(target_modules=r".*\.up_proj"), ["attention"], "4 tensors in frozen groups: .*up_proj"),
        (LoraConfig(modules_to_save=["lm_head"]), ["attention"], "tensors in frozen groups: .*lm_head"),
        (LoraConfig(layers_to_transform=[1]), ["mlp:0"], r"no linear module .* in `layers_to_transform=\[1\]`"),
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
