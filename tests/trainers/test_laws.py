# SPDX-License-Identifier: Apache-2.0
"""Laws that hold whatever a run trains, one row a feature: it is `SFTTrainer` where nothing is asked for, resuming is
exact, the split into micro-batches does not matter, no random number is drawn beside SFTTrainer's, and what is frozen
stays."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import build_model
from datasets import Dataset
from peft import LoraConfig
from sft_runs import FACTS, TOKENIZER, architecture, assert_same_weights, logs, other_teacher, trainer, weights
from transformers import TrainerCallback
from trl import SFTTrainer

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer


ROWS = [*FACTS, *FACTS[:2]]  # eight, so that a step of the accumulation's law is an epoch


def student(**config):
    return build_model(TOKENIZER, initializer_range=0.3, **config)


def mixture_of_experts(attention_dropout):
    model = architecture("mixtral")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = attention_dropout
    return model


def stream():
    return dict(train_dataset=Dataset.from_list(ROWS).to_iterable_dataset())


def lora():
    return dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))


class Base(NamedTuple):
    """A run of `SFTTrainer`: its settings, what is handed to it (made anew for each run), its model."""

    options: dict = {}
    arguments: Callable[[], dict] = dict
    model: Callable = student


# What a run is made of that is TRL's own
BASES = {
    "plain": Base(),
    "tied": Base(model=lambda **config: student(tie_word_embeddings=True, **config)),
    "LoRA": Base(arguments=lora),
    "packing": Base(dict(packing=True, max_length=24, per_device_train_batch_size=1)),
    "padding-free": Base(dict(padding_free=True, max_length=None)),
    "MoE": Base(dict(router_aux_loss_coef=0.5), model=mixture_of_experts),
    "checkpointing": Base(dict(gradient_checkpointing=True)),
    "accumulation": Base(dict(gradient_accumulation_steps=2)),
    "stream": Base(arguments=stream),
}


class Feature(NamedTuple):
    """What this package adds to a run of `SFTTrainer`, and which parameters move."""

    base: str = "plain"
    options: dict = {}
    arguments: Callable[[], dict] = dict
    trains: str = "."


def anchors(**options):
    prompts = Dataset.from_list([{"prompt": f"What is {city}{i * '?'}"} for i, city in enumerate("ABCDE")])
    return dict(
        options=dict(anchors="kl", anchor_weight=2.0) | options, arguments=lambda: dict(anchor_dataset=prompts)
    )


SELF = dict(anchors="self", anchor_max_new_tokens=6)
CACHE = dict(precompute_teacher=True, teacher_cache_dir="cache", teacher_cache_dtype="float32")
FEATURES = {
    "frozen groups": Feature(
        options=dict(kl_weight=0, frozen_groups=["mlp", "norm:1"]), trains=r"^(?!.*(mlp|1\..*norm))"
    ),
    "frozen embeddings, re-entrant checkpoints": Feature(
        "checkpointing",
        dict(kl_weight=0, frozen_groups=["embeddings"], gradient_checkpointing_kwargs={"use_reentrant": True}),
        trains="^(?!.*embed_tokens)",
    ),
    "trainable groups": Feature(options=dict(kl_weight=0, trainable_groups=["attention"]), trains="self_attn"),
    "LoRA with groups": Feature("LoRA", dict(kl_weight=0, trainable_groups=["re:q_proj|up_proj"]), trains="lora_"),
    "teacher": Feature(),
    "teacher, LoRA": Feature("LoRA", trains="lora_"),
    "teacher, trainable groups": Feature(options=dict(trainable_groups=["attention"]), trains="self_attn"),
    "another teacher": Feature(arguments=other_teacher),
    "teacher cache": Feature(options=CACHE),
    "teacher cache, packing": Feature("packing", CACHE),
    "anchors": Feature(**anchors()),
    "anchors, packing": Feature("packing", **anchors()),
    "anchors, padding-free, cache": Feature("padding-free", **anchors(**CACHE)),
    "anchors, no KL on the rows": Feature(**anchors(kl_weight=0)),
    "anchors of itself, tied": Feature("tied", SELF),
    "anchors of itself, LoRA, snapshot": Feature("LoRA", SELF | dict(teacher_snapshot_steps=1), trains="lora_"),
    "snapshot": Feature(options=dict(teacher_snapshot_steps=1)),
    "snapshot after the checkpoint": Feature(options=dict(teacher_snapshot_steps=3)),
    "snapshot of an adapter": Feature("LoRA", dict(teacher_snapshot_steps=1), trains="lora_"),
    **{f"teacher, {base}": Feature(base) for base in ("packing", "padding-free", "MoE", "checkpointing", "stream")},
}


class RandomStates(TrainerCallback):
    """The state of each generator of random numbers after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, **kwargs):
        numbers = np.random.get_state()
        self.states.append((torch.get_rng_state().tolist(), random.getstate(), numbers[1].tolist(), numbers[2]))


class Run(NamedTuple):
    trainer: SFTTrainer
    before: dict[str, torch.Tensor]
    random_states: list


def train(folder, feature: Feature, trainer_class=SelfDistillSFTTrainer, resume=None, dropout=0.2, **options) -> Run:
    base = BASES[feature.base]
    recorder = RandomStates()
    arguments = dict(train_dataset=Dataset.from_list(ROWS), callbacks=[recorder]) | base.arguments()
    settings = dict(max_steps=4, learning_rate=2e-2) | base.options | options
    if trainer_class is not SFTTrainer:
        arguments |= feature.arguments()
        settings |= feature.options
    if "teacher_cache_dir" in settings:
        settings["teacher_cache_dir"] = str(folder / "cache")
    run = trainer(folder, base.model(attention_dropout=dropout), arguments, trainer_class, **settings)
    before = weights(run.model)
    run.train(resume_from_checkpoint=resume)
    return Run(run, before, recorder.states)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """`ran(name)`: a run of four steps with a feature, `ran(base, SFTTrainer)`: that of SFTTrainer; each made once."""
    done = {}

    def run(name, trainer_class=SelfDistillSFTTrainer) -> Run:
        if (name, trainer_class) not in done:
            saves = trainer_class is not SFTTrainer
            options = dict(save_strategy="steps", save_steps=2) if saves else {}
            feature = FEATURES[name] if saves else Feature(name)
            done[name, trainer_class] = train(tmp_path_factory.mktemp("run"), feature, trainer_class, **options)
        return done[name, trainer_class]

    return run


NOTHING = [(base, SelfDistillSFTTrainer, dict(kl_weight=0)) for base in BASES]
NOTHING += [("plain", FrozenGroupsSFTTrainer, dict(frozen_groups=[]))]


@pytest.mark.parametrize("base, trainer_class, options", NOTHING)
def test_without_kl_and_groups_it_is_sft_trainer_bit_for_bit(tmp_path, ran, base, trainer_class, options):
    ours, theirs = train(tmp_path, Feature(base, options), trainer_class), ran(base, SFTTrainer)
    assert getattr(ours.trainer, "teacher", None) is None and ours.trainer.group_table is None
    assert logs(ours.trainer) == logs(theirs.trainer) and len(logs(ours.trainer)) == 5
    assert_same_weights(ours.trainer.model, theirs.trainer.model)
    assert ours.random_states == theirs.random_states and len(ours.random_states) == 4
    callbacks = [[type(callback) for callback in run.trainer.callback_handler.callbacks] for run in (ours, theirs)]
    assert callbacks[0] == callbacks[1]


@pytest.mark.parametrize("name", FEATURES)
def test_resumed_is_uninterrupted_bit_for_bit(ran, name):
    whole = ran(name).trainer
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed = train(Path(whole.args.output_dir).parent, FEATURES[name], resume=checkpoint)
    assert resumed.trainer.state.global_step == 4 and len(resumed.random_states) == 2
    assert_same_weights(resumed.trainer.model, whole.model)
    assert resumed.random_states == ran(name).random_states[2:]
    for row, expected in zip(logs(resumed.trainer)[:4], logs(whole)[:4], strict=True):
        assert row == expected | {"num_tokens": row["num_tokens"]}  # SFTTrainer counts them anew


@pytest.mark.parametrize("name", FEATURES)
def test_the_random_state_is_that_of_sft_trainer_after_each_step(ran, name):
    expected = ran(FEATURES[name].base, SFTTrainer).random_states
    assert ran(name).random_states == expected and len({str(state) for state in expected}) == 4


@pytest.mark.parametrize("name", FEATURES)
def test_frozen_tensors_stay_bit_for_bit_and_the_others_move(ran, name):
    run = ran(name)
    own = {key: value for key, value in run.trainer.model.named_parameters() if key in run.before}
    moved = {key for key, value in own.items() if not torch.equal(value, run.before[key])}
    assert moved == {key for key in run.before if re.search(FEATURES[name].trains, key)}
    kl = [row["kl_loss"] for row in logs(run.trainer) if "kl_loss" in row]
    assert kl[-1] > 1e-6 if FEATURES[name].options.get("kl_weight") != 0 else kl == []


# A mean over the micro-batch by itself is what TRL makes of the router loss; a stream has no epochs of eight
SPLIT = [name for name in FEATURES if not re.search("MoE|stream|checkpoint", name)]


@pytest.mark.parametrize("name", SPLIT)
def test_the_split_into_micro_batches_changes_nothing(tmp_path, name):
    runs = [
        train(
            tmp_path / str(size),
            FEATURES[name],
            dropout=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **dict(max_steps=4 if "snapshot" in name else 2, optim="sgd", learning_rate=0.5, max_grad_norm=0.0),
        ).trainer
        for size in (8, 4, 1)
    ]
    for other in runs[1:]:
        assert_same_weights(other.model, runs[0].model, rtol=1e-4, atol=1e-6)
