# SPDX-License-Identifier: Apache-2.0
"""FrozenGroupsSFTTrainer is SFTTrainer, except that what is frozen does not move."""

import json
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import CITIES, build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_selfdistill.parameters.groups import GROUPS, freeze_groups
from trl_selfdistill.parameters.hashes import digest_groups, hash_parameters
from trl_selfdistill.trainers.frozen_groups_sft_config import FrozenGroupsSFTConfig
from trl_selfdistill.trainers.frozen_groups_sft_trainer import FrozenGroupsSFTTrainer


@pytest.fixture
def dataset() -> Dataset:
    rows = [{"prompt": f"Q: {city}\nA:", "completion": f" {country}"} for city, country in CITIES.items()]
    return Dataset.from_list(rows)


@pytest.fixture
def config(tmp_path):
    """A factory of configs: exact on the CPU, a large weight decay, three steps."""

    def build(config_class=FrozenGroupsSFTConfig, **options):
        settings = dict(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, seed=3)
        settings |= dict(
            max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.5, save_steps=2
        )
        settings |= dict(logging_steps=1) if config_class is TrainingArguments else dict(logging_steps=1, bf16=False)
        return config_class(**{**settings, **options})

    return build


@pytest.fixture
def train(dataset, tokenizer, config):
    """Builds a trainer (by default of the tiny Llama) and trains it: `(trainer, what each parameter was before)`."""

    def run(model=None, trainer_class=FrozenGroupsSFTTrainer, args=None, resume=None, **options):
        model = build_model(tokenizer) if model is None else model
        args = config(**options) if args is None else args
        trainer = trainer_class(model, args, train_dataset=dataset, processing_class=tokenizer)
        before = state_of(trainer.model)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, before

    return run


class Tamper(TrainerCallback):
    """Writes to a frozen weight in the second step, as a stray hook would."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def losses_of(trainer) -> list[dict]:
    timing = re.compile("runtime|per_second")
    return [{key: value for key, value in row.items() if not timing.search(key)} for row in trainer.state.log_history]


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_attention_moves(train, tokenizer, tied):
    trainer, before = train(build_model(tokenizer, tie_word_embeddings=tied), trainable_groups=["attention"])
    attention = {name for name in before if "self_attn" in name}
    assert moved(trainer.model, before) == attention and len(attention) == 8
    with_state = {id(parameter) for parameter in trainer.optimizer.state}
    in_groups = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in with_state) == (id(parameter) in in_groups) == (name in attention)
        assert name in attention or parameter.grad is None


@pytest.mark.parametrize(
    "options, frozen",
    [
        (dict(frozen_groups=["mlp", "embeddings"]), r"mlp|embed_tokens"),
        (dict(frozen_groups=["mlp:1", "re:q_proj|lm_head"]), r"layers\.1\.mlp|q_proj|lm_head"),
        (dict(trainable_groups=["norm:0"]), r"^(?!.*layers\.0\..*norm)"),
    ],
)
def test_layers_and_patterns(train, options, frozen):
    trainer, before = train(**options)
    assert moved(trainer.model, before) == {name for name in before if not re.search(frozen, name)}


@pytest.mark.parametrize("options", [{}, dict(frozen_groups=[])])
def test_without_groups_it_is_sft_trainer_bit_for_bit(train, config, options):
    ours, _ = train(eval_strategy="no", **options)
    theirs, _ = train(trainer_class=SFTTrainer, args=config(SFTConfig))
    assert losses_of(ours) == losses_of(theirs) and len(losses_of(ours)) == 4
    assert moved(ours.model, state_of(theirs.model)) == set()
    assert ours.group_table is None
    callbacks = [[type(callback) for callback in each.callback_handler.callbacks] for each in (ours, theirs)]
    assert callbacks[0] == callbacks[1]


def test_model_by_name_and_arguments_by_position(dataset, model_dir, config):
    trainer = FrozenGroupsSFTTrainer(str(model_dir), config(frozen_groups=["mlp"]), None, dataset)
    before = state_of(trainer.model)
    trainer.train()
    assert moved(trainer.model, before) == {name for name in before if "mlp" not in name}
    assert trainer.model.model_tags == ["trl", "sft", "frozen-groups-sft"]


@pytest.mark.parametrize("config_class", [TrainingArguments, SFTConfig])
def test_plain_arguments_and_none_freeze_nothing(train, config, config_class):
    trainer, before = train(args=config(config_class, learning_rate=1e-2))
    assert isinstance(trainer.args, FrozenGroupsSFTConfig) and trainer.args.weight_decay == 0.5
    assert moved(trainer.model, before) == set(before)


def test_no_arguments(dataset, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model.config._name_or_path = "org/tiny"
    trainer = FrozenGroupsSFTTrainer(model, train_dataset=dataset, processing_class=tokenizer)
    assert trainer.args.output_dir == "tiny-FrozenGroupsSFT" and trainer.group_table is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_frozen_embeddings(train, use_reentrant):
    """Re-entrant checkpoints drop the gradients of a block whose input needs none."""
    options = dict(frozen_groups=["embeddings"], max_steps=1)
    kwargs = {"use_reentrant": use_reentrant}
    checkpointed, before = train(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **options)
    plain, _ = train(gradient_checkpointing=False, **options)
    assert moved(checkpointed.model, before) == set(before) - {"model.embed_tokens.weight"}
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(checkpointed.model.get_parameter(name), parameter)


def test_zero3_checkpoints_are_reentrant():
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3), gradient_checkpointing=True)
    args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    FrozenGroupsSFTTrainer._use_reentrant_checkpointing_under_zero3(SimpleNamespace(args=args))
    assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_embeddings_resized_for_a_chat_template_are_frozen(dataset, model_dir, tokenizer, tmp_path, config):
    source = build_tokenizer()
    source.chat_template += "{# as another model has it #}"
    source.eos_token = "<|im_start|>"
    source.add_special_tokens({"additional_special_tokens": [f"<|extra_{index}|>" for index in range(70)]})
    source.save_pretrained(tmp_path / "template")
    args = config(frozen_groups=["embeddings"], chat_template_path=str(tmp_path / "template"))
    trainer = FrozenGroupsSFTTrainer(str(model_dir), args, train_dataset=dataset)
    assert trainer.model.get_input_embeddings().num_embeddings > len(tokenizer)
    assert not trainer.model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(frozen_groups=["mlp:0-5"]), "has 2 layers"),
        (dict(trainable_groups=["re:Wqkv"]), "matches no parameter"),
        (dict(frozen_groups=[*GROUPS]), "leaves nothing to train"),
    ],
)
def test_groups_that_the_model_refuses(dataset, model, tokenizer, config, options, message):
    with pytest.raises(ValueError, match=message):
        FrozenGroupsSFTTrainer(model, config(**options), train_dataset=dataset, processing_class=tokenizer)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_optimizer_with_frozen_parameters_is_refused(dataset, model, tokenizer, config):
    def trainer(optimizer, **options):
        return FrozenGroupsSFTTrainer(
            model, config(**options), train_dataset=dataset, processing_class=tokenizer, optimizers=(optimizer, None)
        )

    with pytest.raises(ValueError, match="6 of the 21 tensors in the optimizer are frozen"):
        trainer(torch.optim.SGD(model.parameters(), lr=0.1), frozen_groups=["mlp"])
    freeze_groups(model, frozen_groups=["mlp"])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer(torch.optim.SGD(trainable, lr=0.1), frozen_groups=["mlp"]).train()


def test_an_optimizer_that_takes_frozen_parameters_is_refused(dataset, model, tokenizer, config):
    cls_and_kwargs = (torch.optim.SGD, {"params": list(model.parameters()), "lr": 0.1})
    trainer = FrozenGroupsSFTTrainer(
        model,
        config(frozen_groups=["mlp"]),
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=cls_and_kwargs,
    )
    with pytest.raises(ValueError, match="6 of the 21 tensors in the optimizer are frozen"):
        trainer.train()


def test_adapters_in_frozen_groups_are_refused_and_without_groups_they_work(dataset, model_dir, tokenizer, config):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    lora = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    options = dict(train_dataset=dataset, processing_class=tokenizer)
    with pytest.raises(ValueError, match="`frozen_groups=.* and `target_modules=.* contradict each other"):
        FrozenGroupsSFTTrainer(model, config(frozen_groups=["mlp"]), peft_config=lora, **options)
    assert not any("lora" in name for name, _ in model.named_parameters())
    FrozenGroupsSFTTrainer(model, config(max_steps=1), peft_config=lora, **options).train()
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora)
    with pytest.raises(ValueError, match="the PEFT model trains .* tensors in frozen groups"):
        FrozenGroupsSFTTrainer(peft_model, config(trainable_groups=["attention"]), **options)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.add_adapter(lora)
    with pytest.raises(ValueError, match="the PEFT model trains .* tensors in frozen groups"):
        FrozenGroupsSFTTrainer(model, config(frozen_groups=["mlp"]), **options)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    by_position = (None, dataset, None, tokenizer, None, None, None, (None, None), None, None, None, lora)
    with pytest.raises(ValueError, match="contradict each other"):
        FrozenGroupsSFTTrainer(model, config(frozen_groups=["mlp"]), *by_position)


def test_table_is_printed_kept_and_saved_with_hashes(train, capsys, tmp_path):
    trainer, _ = train(frozen_groups=["mlp", "lm_head"])
    assert str(trainer.group_table) in capsys.readouterr().out
    trainer.save_model(str(tmp_path / "final"))
    files = [tmp_path / "final", tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-3"]
    saved = [json.loads((folder / "parameter_groups.json").read_text()) for folder in files]
    assert saved[0] == saved[1] == saved[2]
    assert saved[0]["frozen_groups"] == ["mlp", "lm_head"] and saved[0]["trainable_groups"] is None
    rows = saved[0]["groups"]
    assert [(group, row["parameters"]) for group, row in rows.items()] == [row[::2] for row in trainer.group_table]
    # A hash is that of the file: a reader who freezes the same groups of the saved model gets it again
    reloaded = type(trainer.model).from_pretrained(tmp_path / "final")
    freeze_groups(reloaded, frozen_groups=saved[0]["frozen_groups"])
    digests = digest_groups(hash_parameters(reloaded))
    assert {group: row["frozen_sha256"] for group, row in rows.items() if row["frozen_sha256"]} == digests


def test_saving_without_training_stores_hashes(dataset, model, tokenizer, config, tmp_path):
    trainer = FrozenGroupsSFTTrainer(
        model, config(frozen_groups=["mlp"]), train_dataset=dataset, processing_class=tokenizer
    )
    trainer.save_model()
    row = json.loads((tmp_path / "run" / "parameter_groups.json").read_text())["groups"]["mlp"]
    assert row["frozen_sha256"] == digest_groups(hash_parameters(model))["mlp"]


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_frozen_parameter_that_moves_is_found(dataset, model, tokenizer, config, tmp_path, save_strategy):
    args = config(frozen_groups=["mlp"], save_strategy=save_strategy)
    options = dict(train_dataset=dataset, processing_class=tokenizer, callbacks=[Tamper()])
    trainer = FrozenGroupsSFTTrainer(model, args, **options)
    with pytest.raises(ValueError, match=r"'mlp' changed: \['model.layers.1.mlp.up_proj.weight'\]"):
        trainer.train()
    assert trainer.state.global_step == (3 if save_strategy == "no" else 2)  # found before the checkpoint is written
    assert not list((tmp_path / "run").glob("checkpoint-*/model.safetensors"))


def test_verification_can_be_switched_off(dataset, model, tokenizer, config, tmp_path):
    args = config(frozen_groups=["mlp"], verify_frozen=False)
    options = dict(train_dataset=dataset, processing_class=tokenizer, callbacks=[Tamper()])
    FrozenGroupsSFTTrainer(model, args, **options).train()
    saved = json.loads((tmp_path / "run" / "checkpoint-3" / "parameter_groups.json").read_text())
    assert {row["frozen_sha256"] for row in saved["groups"].values()} == {None}


def test_resuming_is_the_uninterrupted_run(train, tmp_path):
    whole, before = train(frozen_groups=["mlp", "norm"])
    resumed, _ = train(frozen_groups=["mlp", "norm"], resume=str(tmp_path / "run" / "checkpoint-2"))
    assert moved(resumed.model, state_of(whole.model)) == set()
    assert moved(resumed.model, before) == {name for name in before if not re.search("mlp|norm", name)}


def test_resuming_refuses_other_groups_and_other_weights(train, tmp_path):
    train(frozen_groups=["mlp:0"])
    with pytest.raises(ValueError, match=r"trained with `frozen_groups=\['mlp:0'\]`.*`frozen_groups=\['mlp:1'\]`"):
        train(frozen_groups=["mlp:1"], resume=True)
    weights = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "run" / "checkpoint-3" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="frozen parameters in 'mlp' are not those"):
        train(frozen_groups=["mlp:0"], resume=True, max_steps=4)


def test_config_is_parsed_from_the_command_line_and_from_yaml(tmp_path):
    parser = TrlParser(FrozenGroupsSFTConfig)
    line = "--output_dir out --frozen_groups mlp:0-11 re:q_proj --verify_frozen false --use_cpu --report_to none"
    (args,) = parser.parse_args_and_config(line.split())
    assert args.frozen_groups == ["mlp:0-11", "re:q_proj"] and args.verify_frozen is False
    file = tmp_path / "config.yaml"
    file.write_text("output_dir: out\nuse_cpu: true\nreport_to: none\ntrainable_groups: [attention, 'norm:0']\n")
    (args,) = parser.parse_args_and_config(["--config", str(file)])
    assert args.trainable_groups == ["attention", "norm:0"] and args.frozen_groups is None and args.verify_frozen
    file.write_text("output_dir: out\nuse_cpu: true\nreport_to: none\ntrainable_groups: attention\n")
    (args,) = parser.parse_args_and_config(["--config", str(file)])
    assert args.trainable_groups == ["attention"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(frozen_groups=["mpl"]), "'mpl' is not a group"),
        (dict(frozen_groups=["mlp"], trainable_groups=["attention"]), "both set"),
        (dict(trainable_groups=[]), "nothing to train"),
    ],
)
def test_config_refuses_what_no_model_can_do(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_new_fields_are_documented():
    new = {field.name: field for field in fields(FrozenGroupsSFTConfig)}.keys() - {f.name for f in fields(SFTConfig)}
    assert new == {"frozen_groups", "trainable_groups", "verify_frozen"}
    for field in fields(FrozenGroupsSFTConfig):
        if field.name in new:
            assert re.search(rf"^ +{field.name} \(", FrozenGroupsSFTConfig.__doc__, re.MULTILINE), field.name
            assert field.metadata["help"]
