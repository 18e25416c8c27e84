# SPDX-License-Identifier: Apache-2.0
"""SelfDistillSFTTrainer is SFTTrainer with CE + kl_weight * temperature**2 * KL(teacher || student) for a loss."""

import re
from dataclasses import dataclass, fields

import pytest
import torch
from conftest import CITIES, build_model
from datasets import Dataset
from safetensors.torch import load_file
from sft_runs import (
    ARCHITECTURES,
    FACTS,
    TOKENIZER,
    architecture,
    assert_same_weights,
    config,
    logs,
    train,
    trainer,
)
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_selfdistill import FrozenGroupsSFTConfig, SelfDistillSFTConfig, SelfDistillSFTTrainer


TEXTS = [{"text": row["prompt"] + row["completion"]} for row in FACTS]
CHATS = [
    {"messages": [{"role": "user", "content": city}, {"role": "assistant", "content": country}]}
    for city, country in CITIES.items()
]
CHAT_FACTS = [{"prompt": chat["messages"][:1], "completion": chat["messages"][1:]} for chat in CHATS]
IDS = [{"input_ids": TOKENIZER(row["text"])["input_ids"]} for row in TEXTS]
LABELLED = [{**row, "labels": [-100, *row["input_ids"][1:-2], -100, row["input_ids"][-1]]} for row in IDS]


@pytest.mark.parametrize("options", [{}, dict(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2)])
def test_without_kl_weight_it_is_sft_trainer_bit_for_bit(tmp_path, options):
    arguments = dict(eval_dataset=Dataset.from_list(FACTS))
    ours = train(tmp_path, arguments=arguments, kl_weight=0, **options)
    theirs = train(tmp_path, arguments=arguments, trainer_class=SFTTrainer, **options)
    assert logs(ours) == logs(theirs) and len(logs(ours)) >= 4
    assert_same_weights(ours.model, theirs.model)
    callbacks = [[type(callback) for callback in each.callback_handler.callbacks] for each in (ours, theirs)]
    assert callbacks[0] == callbacks[1] and ours.teacher_model is None


DATASETS = {
    "prompt-completion": (FACTS, {}),
    "prompt-completion, all tokens": (FACTS, dict(completion_only_loss=False)),
    "conversational": (CHATS, {}),
    "conversational, assistant only": (CHATS, dict(assistant_only_loss=True)),
    "conversational prompt-completion": (CHAT_FACTS, {}),
    "text": (TEXTS, {}),
    "pre-tokenised": (IDS, {}),
    "pre-tokenised with labels": (LABELLED, dict(dataset_kwargs={"skip_prepare_dataset": True})),
    "packed": (TEXTS, dict(packing=True, max_length=64)),
    "packed, wrapped": (TEXTS, dict(packing=True, packing_strategy="wrapped", max_length=40)),
    "padding-free": (FACTS, dict(padding_free=True, max_length=None)),
    "accumulated": (FACTS, dict(gradient_accumulation_steps=3)),
    "checkpointed": (FACTS, dict(gradient_checkpointing=True)),
    "checkpointed, re-entrant": (
        FACTS,
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    ),
    "bf16": (FACTS, dict(bf16=True)),
}


@pytest.mark.parametrize(
    "name, rows, options",
    [
        *((name, FACTS, dict(gradient_accumulation_steps=2)) for name in ARCHITECTURES if name != "llama"),
        *(pytest.param("llama", *case, id=name) for name, case in DATASETS.items()),
        pytest.param("llama", Dataset.from_list(FACTS).to_iterable_dataset(), {}, id="streaming"),
    ],
)
def test_first_step_is_that_of_sft_trainer(tmp_path, name, rows, options):
    """The teacher is a copy, so that the KL and its gradient are 0; from the second step on they are not."""
    arguments = dict(train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows)
    options = dict(max_steps=2, learning_rate=2e-2, **options)
    ours = logs(train(tmp_path, architecture(name), arguments, **options))
    theirs = logs(train(tmp_path, architecture(name), arguments, SFTTrainer, **options))
    tolerance = 1e-2 if options.get("bf16") else 1e-5
    assert ours[0] == pytest.approx({**ours[0], **theirs[0]}, rel=tolerance)
    assert ours[0].keys() - theirs[0].keys() == {"ce_loss", "kl_loss"}
    assert abs(ours[0]["kl_loss"]) < 1e-6
    assert ours[1]["kl_loss"] > 1e-3
    assert ours[1]["entropy"] == pytest.approx(theirs[1]["entropy"], rel=10 * tolerance)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_with_a_tiny_kl_weight_the_router_loss_is_that_of_sft_trainer(tmp_path, name):
    options = dict(gradient_accumulation_steps=2, router_aux_loss_coef=0.5)
    ours = train(tmp_path, architecture(name), kl_weight=1e-9, **options)
    theirs = train(tmp_path, architecture(name), trainer_class=SFTTrainer, **options)
    assert_same_weights(ours.model, theirs.model, atol=1e-4)
    for row, expected in zip(logs(ours), logs(theirs), strict=True):
        assert row == pytest.approx({**row, **expected}, rel=1e-3)


@pytest.mark.parametrize("items", [None, 7])
def test_loss_is_the_formula_on_the_models_own_logits(tmp_path, items):
    run = trainer(
        tmp_path, arguments=dict(teacher_model=build_model(TOKENIZER, seed=1)), kl_weight=0.7, temperature=1.5
    )
    batch = next(iter(run.get_train_dataloader()))
    loss = run.compute_loss(run.model, dict(batch), num_items_in_batch=items)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][counted]
    student, teacher = (build_model(TOKENIZER, seed=seed)(**inputs).logits[:, :-1][counted] for seed in (0, 1))
    ce = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
    p, q = (torch.distributions.Categorical(logits=logits / 1.5) for logits in (teacher, student))
    kl = torch.distributions.kl_divergence(p, q).sum()
    torch.testing.assert_close(loss, (ce + 0.7 * 1.5**2 * kl) / (items or len(labels)))


@pytest.mark.parametrize("kl_weight, temperature", [(1.0, 0.5), (3.0, 2.0)])
def test_logged_loss_is_the_sum_of_the_logged_terms(tmp_path, kl_weight, temperature):
    run = train(
        tmp_path,
        arguments=dict(eval_dataset={"seen": Dataset.from_list(FACTS), "other": Dataset.from_list(FACTS[::2])}),
        **dict(kl_weight=kl_weight, temperature=temperature, eval_strategy="steps", eval_steps=3, learning_rate=2e-2),
    )
    rows = [row for row in logs(run) if "loss" in row]
    for row in [*rows, run.evaluate(Dataset.from_list(FACTS[:2]))]:
        loss, ce, kl = (row.get(key, row.get(f"eval_{key}")) for key in ("loss", "ce_loss", "kl_loss"))
        assert loss == pytest.approx(ce + kl_weight * temperature**2 * kl)
    assert rows[-1]["kl_loss"] > 1e-3
    evaluations = [row for row in logs(run) if "eval_ce_loss" in row]
    assert [key for row in evaluations for key in row if re.fullmatch("eval_.+_loss", key)][:3] == [
        "eval_seen_loss",
        "eval_ce_loss",
        "eval_kl_loss",
    ]
    assert "eval_other_loss" in evaluations[1] and "eval_mean_token_accuracy" in evaluations[1]
    assert evaluations[0]["eval_num_tokens"] == rows[-1]["num_tokens"]


UNLABELLED = {**LABELLED[0], "labels": [-100] * len(LABELLED[0]["labels"])}


@pytest.mark.parametrize("batch_size", [4, 1])
def test_gradient_accumulation_changes_nothing(tmp_path, batch_size):
    """Rows of uneven length, one of them (and so one micro-batch of 1) without any label."""
    arguments = dict(train_dataset=Dataset.from_list([*LABELLED, UNLABELLED, LABELLED[0]]))

    def run(size):
        teacher = build_model(TOKENIZER, seed=1, initializer_range=0.4)  # far from the student: a gradient in step 1
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, optim="sgd")
        options |= dict(max_steps=1, learning_rate=1.0, max_grad_norm=0.0, kl_weight=2.0)
        return train(tmp_path, architecture("llama"), {**arguments, "teacher_model": teacher}, **options)

    whole, split = run(8), run(batch_size)
    assert_same_weights(split.model, whole.model, atol=1e-5)
    assert not torch.allclose(whole.model.lm_head.weight, architecture("llama").lm_head.weight, atol=1e-2)
    assert logs(split)[0]["loss"] == pytest.approx(logs(whole)[0]["loss"])
    assert logs(split)[0]["num_tokens"] == logs(whole)[0]["num_tokens"]


def doubled_loss(outputs, labels, num_items_in_batch=None):
    ce = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:], reduction="sum")
    return 2 * ce / (num_items_in_batch or (labels[:, 1:] != -100).sum())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options, extra",
    [
        (dict(loss_type="dft"), {}),
        (dict(label_smoothing_factor=0.2), {}),
        ({}, dict(compute_loss_func=doubled_loss)),
    ],
)
def test_kl_is_added_to_another_loss(tmp_path, options, extra):
    """DFT, label smoothing and a loss function of the user's keep what SFTTrainer makes of them."""
    options = dict(max_steps=1, eval_strategy="steps", eval_steps=1, **options)
    extra = dict(eval_dataset=Dataset.from_list(FACTS[:2]), compute_metrics=token_metrics, **extra)
    distillation = dict(teacher_model=build_model(TOKENIZER, seed=1, initializer_range=0.4))
    ours = train(tmp_path, architecture("mixtral"), extra | distillation, kl_weight=2.0, **options)
    theirs = train(tmp_path, architecture("mixtral"), extra, SFTTrainer, **options)
    for prefix, row, expected in zip(["", "eval_"], logs(ours), logs(theirs), strict=False):
        assert row.keys() - expected.keys() == {f"{prefix}ce_loss", f"{prefix}kl_loss"}
        assert row[f"{prefix}kl_loss"] > 0.1
        if prefix == "":  # before the weights differ
            assert row["loss"] == pytest.approx(expected["loss"] + 2.0 * 0.25 * row["kl_loss"])
            assert row["grad_norm"] != pytest.approx(expected["grad_norm"], rel=1e-2)
            same = ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss")
            assert [row[key] for key in same] == pytest.approx([expected[key] for key in same])


def token_metrics(prediction):
    return {"shape": prediction.predictions.shape, "hits": (prediction.predictions.argmax(-1) == 5).sum()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compute_metrics_gets_the_logits(tmp_path):
    extra = dict(eval_dataset=Dataset.from_list(FACTS), compute_metrics=token_metrics)
    ours, theirs = (trainer(tmp_path, None, extra, c).evaluate() for c in (SelfDistillSFTTrainer, SFTTrainer))
    assert ours["eval_shape"] == theirs["eval_shape"] and ours["eval_hits"] == theirs["eval_hits"]
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"])


def test_student_learns_and_forgets_less(tmp_path):
    options = dict(max_steps=30, learning_rate=2e-2, per_device_train_batch_size=6)
    ours, sft = (train(tmp_path, kl_weight=weight, **options) for weight in (1.0, 0.0))
    assert logs(ours)[-2]["mean_token_accuracy"] > 0.9
    entropy = [logs(run)[-2]["entropy"] for run in (ours, sft)]
    assert entropy[0] > entropy[1]  # pulled to the teacher, which knows nothing


@dataclass
class OwnConfig(SFTConfig):
    note: str = "kept"


@pytest.mark.parametrize("config_class", [TrainingArguments, SFTConfig, OwnConfig])
def test_plain_arguments_are_kept(tmp_path, config_class):
    args = config(tmp_path, config_class, weight_decay=0.3)
    run = train(tmp_path, arguments=dict(args=args))
    assert isinstance(run.args, SelfDistillSFTConfig) and run.args.weight_decay == 0.3
    assert (run.args.kl_weight, run.args.temperature) == (1.0, 0.5) and logs(run)[1]["kl_loss"] > 0
    assert getattr(run.args, "note", None) == getattr(args, "note", None)


def test_no_arguments(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model.config._name_or_path = "org/tiny"
    run = SelfDistillSFTTrainer(model, train_dataset=Dataset.from_list(FACTS), processing_class=TOKENIZER)
    assert run.args.output_dir == "tiny-SelfDistillSFT" and run.teacher_model is not None


def test_model_by_name_and_arguments_by_position(tmp_path, model_dir):
    run = SelfDistillSFTTrainer(str(model_dir), config(tmp_path), None, Dataset.from_list(FACTS))
    run.train()
    assert logs(run)[1]["kl_loss"] > 0


def test_checkpoints_hold_the_student_alone_and_a_model_card(tmp_path):
    run = train(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    assert load_file(folder / "model.safetensors").keys() == build_model(TOKENIZER).state_dict().keys()
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), run.model)
    assert "_teacher" not in {path.name for path in (tmp_path / "run").iterdir()}
    card = (tmp_path / "run" / "README.md").read_text()
    assert re.search(r"^- self-distill-sft$", card, re.MULTILINE) and "2604.15574" in card
    assert run.model.model_tags == ["trl", "sft", "self-distill-sft"]


def test_config_is_parsed_from_the_command_line_and_from_yaml(tmp_path):
    parser = TrlParser(SelfDistillSFTConfig)
    line = "--output_dir out --use_cpu --report_to none --bf16 false --kl_weight 0.25 --temperature 2"
    line += """ --teacher_model_name_or_path org/t --teacher_model_init_kwargs {"dtype":"bfloat16"}"""
    (args,) = parser.parse_args_and_config(line.split())
    assert (args.kl_weight, args.temperature, args.teacher_model_name_or_path) == (0.25, 2.0, "org/t")
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"} and args.teacher_snapshot_steps is None
    file = tmp_path / "config.yaml"
    settings = "output_dir: out\nuse_cpu: true\nreport_to: none\nbf16: false\nkl_weight: 2\n"
    file.write_text(settings + "teacher_model_init_kwargs: {dtype: float16}\nteacher_model_revision: main\n")
    (args,) = parser.parse_args_and_config(["--config", str(file)])
    assert args.kl_weight == 2.0 and args.temperature == 0.5 and args.teacher_model_revision == "main"
    assert args.teacher_model_init_kwargs == {"dtype": "float16"}
    file.write_text(settings + "teacher_snapshot_epochs: 1\n")
    (args,) = parser.parse_args_and_config(["--config", str(file), "--kl_weight", "3"])
    assert args.teacher_snapshot_epochs == 1.0 and args.kl_weight == 3.0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kl_weight=-0.1), "`kl_weight` must be .* got -0.1"),
        (dict(kl_weight=float("nan")), "`kl_weight` .* got nan"),
        (dict(temperature=0.0), "`temperature` must be .* got 0.0.* `kl_weight=0`"),
        (dict(temperature=float("inf")), "`temperature` .* got inf"),
        (dict(teacher_snapshot_steps=0), "`teacher_snapshot_steps` must be > 0, got 0"),
        (dict(teacher_snapshot_epochs=-1.0), "`teacher_snapshot_epochs` must be > 0"),
        (dict(teacher_snapshot_steps=1, teacher_snapshot_epochs=1.0), "not both"),
        (dict(teacher_snapshot_steps=1, teacher_model_name_or_path="org/t"), "set one of them"),
    ],
)
def test_config_refuses_what_no_model_can_do(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_new_fields_are_documented():
    inherited = {field.name for field in fields(FrozenGroupsSFTConfig)}
    assert inherited > {field.name for field in fields(SFTConfig)}
    new = [field for field in fields(SelfDistillSFTConfig) if field.name not in inherited]
    assert {field.name for field in new} >= {"kl_weight", "temperature", "teacher_model_name_or_path"}
    for field in new:
        described = re.search(rf"^ +{field.name} \((.*)\):$", SelfDistillSFTConfig.__doc__, re.MULTILINE)
        assert field.metadata["help"] and described, field.name
        assert field.default is None or f"defaults to `{field.default}`" in described.group(1)
