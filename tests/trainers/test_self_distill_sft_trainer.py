# SPDX-License-Identifier: Apache-2.0
"""SelfDistillSFTTrainer is SFTTrainer with CE + kl_weight * temperature**2 * KL(teacher || student) for a loss."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig
from sft_runs import ARCHITECTURES, FACTS, ROUNDING, TOKENIZER, architecture, config, logs, train, trainer
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback
from trl import SFTTrainer, TrlParser

from trl_selfdistill import FrozenGroupsSFTConfig, SelfDistillSFTConfig, SelfDistillSFTTrainer


IDS = [TOKENIZER(row["prompt"] + row["completion"])["input_ids"] for row in FACTS]
LABELLED = [{"input_ids": ids, "labels": [-100, *ids[1:-2], -100, ids[-1]]} for ids in IDS]
TEXTS = [{"text": row["prompt"] + row["completion"]} for row in FACTS]
ROLES = {"user": "prompt", "assistant": "completion"}
CHATS = [{"messages": [{"role": role, "content": row[name]} for role, name in ROLES.items()]} for row in FACTS]
LEARNT = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
# What each makes of the data is tested in test_label_head.py; here, that the metrics are TRL's
DATASETS = {
    "prompt-completion": (FACTS, {}),
    "pre-tokenised with labels": (LABELLED, dict(dataset_kwargs={"skip_prepare_dataset": True})),
    "assistant's turns": (CHATS, dict(assistant_only_loss=True)),
    "packed": (FACTS, dict(packing=True, max_length=64)),
    "padding-free": (FACTS, dict(padding_free=True, max_length=None)),
    "bf16": (FACTS, dict(bf16=True)),
    # Virtual tokens shift the positions, of the student and of its copy alike
    "prompt tuning": (FACTS, dict(peft_config=PromptTuningConfig(**LEARNT), learning_rate=1.0)),
    "prefix tuning": (FACTS, dict(peft_config=PrefixTuningConfig(**LEARNT), learning_rate=1.0)),
    "prompt tuning on text": (TEXTS, dict(peft_config=PromptTuningConfig(**LEARNT), learning_rate=1.0)),
}


@pytest.mark.parametrize(
    "name, rows, options",
    [
        *((name, FACTS, dict(gradient_accumulation_steps=2)) for name in ARCHITECTURES if name != "llama"),
        *(pytest.param("llama", *case, id=name) for name, case in DATASETS.items()),
    ],
)
def test_first_step_is_that_of_sft_trainer(tmp_path, name, rows, options):
    """The teacher is a copy, so that the KL and its gradient are 0; from the second step on they are not."""
    options = dict(max_steps=2, learning_rate=2e-2) | options
    arguments = dict(train_dataset=Dataset.from_list(rows), peft_config=options.pop("peft_config", None))
    ours = logs(train(tmp_path, architecture(name), arguments, **options))
    theirs = logs(train(tmp_path, architecture(name), arguments, SFTTrainer, **options))
    tolerance = 1e-2 if options.get("bf16") else 1e-5
    assert ours[0] == pytest.approx({**ours[0], **theirs[0]}, rel=tolerance, abs=ROUNDING)
    assert ours[0].keys() - theirs[0].keys() == {"ce_loss", "kl_loss"}
    assert abs(ours[0]["kl_loss"]) < 1e-6
    assert ours[1]["kl_loss"] > 1e-3
    assert ours[1]["entropy"] == pytest.approx(theirs[1]["entropy"], rel=10 * tolerance)


SPLITS = [
    dict(per_device_eval_batch_size=4),  # of six rows
    dict(gradient_accumulation_steps=3, per_device_train_batch_size=1, logging_steps=3),
    dict(gradient_accumulation_steps=2, packing=True, max_length=24, per_device_train_batch_size=1, logging_steps=3),
]


@pytest.mark.parametrize("kl_weight, temperature, split", [(1.0, 0.5, {}), *((3.0, 2.0, split) for split in SPLITS)])
def test_logged_loss_is_the_sum_of_the_logged_terms(tmp_path, kl_weight, temperature, split):
    run = train(
        tmp_path,
        architecture("qwen3"),
        arguments=dict(eval_dataset={"seen": Dataset.from_list(FACTS), "other": Dataset.from_list(FACTS[::2])}),
        **dict(kl_weight=kl_weight, temperature=temperature, eval_strategy="steps", eval_steps=3, learning_rate=2e-2),
        **split,
    )
    rows = [row for row in logs(run) if "loss" in row]
    for row in [*rows, run.evaluate(Dataset.from_list(FACTS))]:
        loss, ce, kl = (row.get(key, row.get(f"eval_{key}")) for key in ("loss", "ce_loss", "kl_loss"))
        assert loss == pytest.approx(ce + kl_weight * temperature**2 * kl, rel=1e-6, abs=ROUNDING)
    assert rows[-1]["kl_loss"] > 1e-3
    seen, other = [row for row in logs(run) if "eval_ce_loss" in row][:2]
    assert "eval_seen_loss" in seen and {"eval_other_loss", "eval_mean_token_accuracy"} <= other.keys()
    assert seen["eval_num_tokens"] == rows[-1]["num_tokens"]


def doubled_loss(outputs, labels, num_items_in_batch=None):
    ce = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:], reduction="sum")
    return 2 * ce / (num_items_in_batch or (labels[:, 1:] != -100).sum())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options, extra",
    [
        ({}, {}),
        ({}, dict(compute_loss_func=doubled_loss)),
        (dict(loss_type="dft"), {}),
        (dict(label_smoothing_factor=0.2), {}),
    ],
)
def test_kl_is_added_to_any_loss(tmp_path, options, extra):
    """DFT, label smoothing and a loss function of the user's keep what SFTTrainer makes of them, metrics too."""
    options = dict(max_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=0.0, **options)
    weights, teacher = dict(kl_weight=2.0, temperature=0.5), dict(teacher_model=architecture("llama", 1))
    extra = dict(eval_dataset=Dataset.from_list(FACTS[:2]), compute_metrics=token_metrics, **extra)
    models, whole = [architecture("mixtral"), architecture("mixtral")], []
    for model in models:  # the logits of all positions are not made once more
        model.lm_head.register_forward_hook(lambda head, *_: whole.append(head) if head.training else None)
    ours = logs(train(tmp_path, models[0], extra | teacher, **weights, **options))
    theirs = logs(train(tmp_path, models[1], extra, SFTTrainer, **options))
    assert len({*map(id, whole)}) != 1 and whole.count(models[0].lm_head) == whole.count(models[1].lm_head)
    assert ours[0].pop("grad_norm") != pytest.approx(theirs[0]["grad_norm"], rel=1e-2)
    for prefix, row, expected in zip(["", "eval_"], ours, theirs, strict=False):
        kl, _ = row.pop(f"{prefix}kl_loss"), row.pop(f"{prefix}ce_loss")
        loss = expected.pop(f"{prefix}loss") + 0.5 * kl
        assert kl > 0.1 and row.pop(f"{prefix}loss") == pytest.approx(loss, rel=1e-6, abs=ROUNDING)
        expected.pop("grad_norm", None)
        assert row.pop("eval_shape", None) == expected.pop("eval_shape", None)
        assert row == pytest.approx(expected)


def token_metrics(prediction):
    return {"shape": prediction.predictions.shape, "hits": (prediction.predictions.argmax(-1) == 5).sum()}


def test_config_is_parsed_from_the_command_line_and_from_yaml(tmp_path):
    parser = TrlParser(SelfDistillSFTConfig)
    line = "--output_dir out --use_cpu --report_to none --bf16 false --kl_weight 0.25 --temperature 2"
    line += """ --teacher_model_name_or_path org/t --teacher_model_init_kwargs {"dtype":"bfloat16"}"""
    line += " --frozen_groups mlp:0-11 re:q_proj --verify_frozen false"
    (args,) = parser.parse_args_and_config(line.split())
    assert (args.kl_weight, args.temperature, args.teacher_model_name_or_path) == (0.25, 2.0, "org/t")
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"} and args.teacher_snapshot_steps is None
    assert args.frozen_groups == ["mlp:0-11", "re:q_proj"] and args.verify_frozen is False
    file = tmp_path / "config.yaml"
    for groups, expected in (("[attention, 'norm:0']", ["attention", "norm:0"]), ("attention", ["attention"])):
        file.write_text(f"output_dir: out\nuse_cpu: true\nreport_to: none\ntrainable_groups: {groups}\n")
        (args,) = parser.parse_args_and_config(["--config", str(file)])
        assert args.trainable_groups == args.group_selection.entries == expected and args.frozen_groups is None
    assert "group_selection" not in args.to_dict()
    own = {*SelfDistillSFTConfig.__annotations__, *FrozenGroupsSFTConfig.__annotations__}
    assert {option.name for option in fields(args) if "help" in option.metadata} >= own


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kl_weight=-0.1), "`kl_weight` must be .* got -0.1"),
        (dict(kl_weight=float("nan")), "`kl_weight` .* got nan"),
        (dict(kl_weight="1.0"), "`kl_weight` must be a finite number, got '1.0'"),
        (dict(temperature=torch.tensor(1.0)), "`temperature` .* got tensor"),
        (dict(teacher_snapshot_steps=2.5), "`teacher_snapshot_steps` must be a whole number, got 2.5"),
        (dict(precompute_teacher="yes"), "`precompute_teacher` must be True or False, got 'yes'"),
        (dict(teacher_model_name_or_path=3), "`teacher_model_name_or_path` must be a text, got 3"),
        (dict(teacher_model_init_kwargs="dtype"), "`teacher_model_init_kwargs` must be a dict, got 'dtype'"),
        (dict(frozen_groups=[1]), r"`frozen_groups` must be a list of texts, got \[1\]"),
        (dict(trainable_groups={"mlp": True}), "`trainable_groups` must be a list of texts, got {"),
        (dict(temperature=0.0), "`temperature` must be .* got 0.0"),
        (dict(teacher_snapshot_steps=0), "`teacher_snapshot_steps` must be > 0, got 0"),
        (dict(teacher_snapshot_steps=1, teacher_model_name_or_path="org/t"), "Set one of them"),
        (dict(precompute_teacher=True, teacher_snapshot_steps=3), "before training, `teacher_snapshot_steps` in it"),
        (dict(precompute_teacher=True, teacher_cache_dtype="float16"), "bfloat16, float32, got 'float16'"),
        (dict(logits_dtype="bfloat16"), "float32, None, got 'bfloat16'"),
    ],
)
def test_config_refuses_what_no_model_can_do(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):  # before transformers says that there is no GPU
        config(tmp_path, use_cpu=False, bf16=True, **options)


def test_numbers_of_numpy_and_paths_are_made_plain(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = dict(
        kl_weight=np.float32(0.5), temperature=1, teacher_snapshot_steps=np.int64(2), verify_frozen=np.True_
    )
    args = config(tmp_path, **options, teacher_cache_dir=Path("~/cache"))
    values = {name: getattr(args, name) for name in (*options, "teacher_cache_dir")}
    assert values == options | dict(temperature=1.0, teacher_cache_dir=f"{tmp_path}/cache")
    assert [type(value) for value in values.values()] == [float, float, int, bool, str]
    build_model(TOKENIZER).save_pretrained(tmp_path / "teacher")
    assert trainer(tmp_path, None, dict(teacher_model=Path("~/teacher"))).teacher_model is not None


def test_a_batch_without_a_mask_is_evaluated_as_by_sft_trainer(tmp_path):
    collator = trainer(tmp_path).data_collator

    def without_mask(rows):
        return {name: value for name, value in collator(rows).items() if name != "attention_mask"}

    extra = dict(eval_dataset=Dataset.from_list(FACTS), data_collator=without_mask)
    runs = [trainer(tmp_path, None, extra, c) for c in (SelfDistillSFTTrainer, SFTTrainer)]
    ours, theirs = (run.evaluate() for run in runs)
    same = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens")
    assert [ours[name] for name in same] == pytest.approx([theirs[name] for name in same])
    runs[0].train()  # SFTTrainer needs a mask here, to count what it has seen
    assert logs(runs[0])[-1]["step"] == 3


class Twice(SelfDistillSFTTrainer):
    """As R-Drop and the like do."""

    def compute_loss(self, *args, **kwargs):
        return (super().compute_loss(*args, **kwargs) + super().compute_loss(*args, **kwargs)) / 2


@pytest.mark.parametrize("options", [dict(precompute_teacher=True), dict(anchors="kl", kl_weight=0.3)])
def test_a_subclass_may_take_the_loss_of_a_batch_twice(tmp_path, options):
    options |= dict(teacher_cache_dir=str(tmp_path)) if "precompute_teacher" in options else {}
    arguments = {"anchor_dataset": Dataset.from_list(TEXTS)} if "anchors" in options else {}
    runs = [train(tmp_path, None, arguments, cls, **options) for cls in (SelfDistillSFTTrainer, Twice)]
    once, twice = ([log["loss"] for log in logs(run)[:-1]] for run in runs)
    assert once == pytest.approx(twice, abs=1e-6)


class Late(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        args.kl_weight = 0.3


@pytest.mark.parametrize("options", [{}, dict(teacher_snapshot_steps=1)])
def test_a_kl_weight_that_comes_without_a_teacher_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="`kl_weight` is 0.3 now, and was 0 when .* Start with a small one"):
        train(tmp_path, None, dict(callbacks=[Late()]), kl_weight=0.0, **options)


def test_a_model_without_finite_logits_trains_as_with_sft_trainer(tmp_path):
    model = build_model(TOKENIZER)
    model.lm_head.weight.data.fill_(float("nan"))
    assert trainer(tmp_path, model).teacher is not None


def test_a_model_with_an_encoder_is_refused(tmp_path):
    sizes = dict(vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match="`model` is a T5ForConditionalGeneration, .* It has an encoder"):
        trainer(tmp_path, model)
