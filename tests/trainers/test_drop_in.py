# SPDX-License-Identifier: Apache-2.0
"""What TRL promises of `SFTTrainer` holds for both trainers: models by name, evaluation, noise, compilation."""

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from sft_runs import FACTS, ROUNDING, TOKENIZER, assert_same_weights, config, logs, other_teacher, trainer
from trl import SFTConfig

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer


DATA = Dataset.from_list(FACTS)
CLASSES = [SelfDistillSFTTrainer, FrozenGroupsSFTTrainer]


@pytest.fixture(params=CLASSES)
def build(request, tmp_path):
    """A factory of one of the trainers: with a KL to another model than the student, or with frozen MLPs."""

    def make(model=None, arguments=None, **options):
        if request.param is SelfDistillSFTTrainer:
            return trainer(tmp_path, model, other_teacher() | (arguments or {}), **options)
        return trainer(tmp_path, model, arguments, FrozenGroupsSFTTrainer, frozen_groups=["mlp"], **options)

    return make


@pytest.mark.parametrize("trainer_class", CLASSES)
def test_model_by_path_with_init_kwargs_and_arguments_by_position(tmp_path, model_dir, trainer_class):
    options = dict(model_init_kwargs=dict(attn_implementation="eager", dtype="bfloat16"))
    args = config(tmp_path, **options) if trainer_class is SelfDistillSFTTrainer else None
    args = args or config(tmp_path, SFTConfig, **options)  # a plain config's values are kept
    run = trainer_class(str(model_dir), args, None, DATA)
    assert run.model.config._attn_implementation == "eager" and run.model.dtype == torch.bfloat16
    assert run.model.model_tags == run.tags == trainer_class._tag_names and run._name == run.method_name
    run.train()


@pytest.mark.parametrize("trainer_class", CLASSES)
def test_without_arguments(tmp_path, trainer_class, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model = get_peft_model(build_model(TOKENIZER), LoraConfig(target_modules=["q_proj"]))
    model.config._name_or_path = "org/tiny"
    run = trainer_class(model, train_dataset=DATA, processing_class=build_tokenizer())
    assert run.args.output_dir == f"tiny-{trainer_class.method_name}" and run.group_table is None


PROMPTS = Dataset.from_list([{"prompt": "Q", "text": "A"}])
WRONG = [
    ({"train_dataset": PROMPTS.select([])}, "`train_dataset` has no rows"),
    ({"train_dataset": PROMPTS.rename_column("text", "answer")}, "the columns answer, prompt: give"),
    ({"train_dataset": PROMPTS.to_iterable_dataset()}, "the columns prompt, text: give prompt and completion"),
    ({"eval_dataset": {"one": DATA, "two": DATA.select([])}}, "`eval_dataset` has no rows"),
]


@pytest.mark.parametrize("data, message", WRONG)
def test_rows_that_trl_cannot_read_are_refused(build, data, message):
    with pytest.raises(ValueError, match=message):
        build(None, data)


def test_several_evaluation_sets_and_the_best_checkpoint(build):
    sets = DatasetDict(a=Dataset.from_list(FACTS[:2]), b=Dataset.from_list(FACTS[2:]))
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="eval_b_loss")
    run = build(None, dict(eval_dataset=sets), **options)
    run.train()
    values = [row["eval_b_loss"] for row in logs(run) if "eval_b_loss" in row]
    assert len(values) == 3 and run.state.best_metric == min(values)
    assert run.evaluate(sets)["eval_b_loss"] == pytest.approx(min(values), rel=1e-5)


def test_neftune_noise_is_the_students_alone(tmp_path, calls_of):
    losses, targets = [], []
    for alpha in (None, 5.0):
        run = trainer(tmp_path, None, other_teacher(), max_steps=2, neftune_noise_alpha=alpha)
        targets.append(calls_of(run.teacher, "targets"))
        run.train()
        losses.append(logs(run)[0]["loss"])
    plain, noisy = targets
    assert losses[0] != losses[1] and len(plain) == len(noisy) == 2
    pairs = zip(plain, noisy, strict=True)
    assert all(torch.equal(a.result.hidden_states, b.result.hidden_states) for a, b in pairs)


def test_torch_compile_changes_nothing(tmp_path):
    options = dict(max_steps=2, optim="sgd", pad_to_multiple_of=32, save_strategy="steps", save_steps=1)
    compiled = dict(torch_compile=True, torch_compile_backend="eager")
    runs = [trainer(tmp_path, None, other_teacher(), **options, **extra) for extra in ({}, compiled)]
    for run in runs:
        run.train()
    plain, other = runs
    assert_same_weights(other.accelerator.unwrap_model(other.model), plain.model, atol=1e-6)
    for row, expected in zip(logs(other)[:2], logs(plain)[:2], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=ROUNDING) and row["kl_loss"] > 1e-3
