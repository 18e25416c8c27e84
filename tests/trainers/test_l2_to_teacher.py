# SPDX-License-Identifier: Apache-2.0
"""`regularizer="l2"`: a pull of the weights, as strong as that of the KL."""

import json

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from peft import LoraConfig
from sft_runs import FACTS, TOKENIZER, StopAt, assert_same_weights, config, logs, train, trainer, weights
from trl import SFTTrainer

from trl_selfdistill.trainers.l2_to_teacher import L2ToTeacher


def batch(run) -> dict:
    inputs = next(iter(run.get_train_dataloader()))
    return {**inputs, "use_cache": False}


def distance(model, other) -> float:
    pairs = zip(weights(model).values(), weights(other).values(), strict=True)
    return sum((a - b).square().sum().item() for a, b in pairs) ** 0.5


def test_a_weight_of_zero_is_sft(tmp_path):
    run = train(tmp_path, regularizer="l2", l2_weight=0.0)
    assert_same_weights(run.model, train(tmp_path, trainer_class=SFTTrainer).model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_steps_are_those_of_sft_with_the_gradient_of_the_penalty(tmp_path, accumulation):
    options = dict(optim="sgd", max_steps=4, learning_rate=0.05, max_grad_norm=0.0, lr_scheduler_type="constant")
    options |= dict(gradient_accumulation_steps=accumulation)
    run = train(tmp_path, regularizer="l2", l2_weight=3.0, **options)

    class AddsGradient(SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.start = weights(self.model)

        def _clip_grad_norm(self, model):
            return None

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: self.pull())
            return optimizer

        def pull(self):
            for name, parameter in self.model.named_parameters():
                parameter.grad += 3.0 * (parameter.detach() - self.start[name])

    assert_same_weights(run.model, train(tmp_path, trainer_class=AddsGradient, **options).model, rtol=1e-5, atol=1e-7)


def test_the_pull_keeps_the_student_near(tmp_path):
    start = build_model(TOKENIZER)
    distances = [
        distance(train(tmp_path, regularizer="l2", l2_weight=w, max_steps=10).model, start)
        for w in (0.0, 10.0, 1000.0)
    ]
    assert distances[0] > 1.2 * distances[1] > 1.2 * distances[2]


def test_the_penalty_is_logged(tmp_path):
    run = train(tmp_path, regularizer="l2", l2_weight=2.0)
    rows = [row for row in logs(run) if "l2_loss" in row]
    assert rows[0]["l2_loss"] == 0 < rows[1]["l2_loss"]
    penalty = run.teacher.penalty(run.model).item()
    assert penalty == pytest.approx(distance(run.model, build_model(TOKENIZER)) ** 2, rel=1e-5)


def test_the_matched_weight_makes_the_gradients_equally_large(tmp_path):
    """Against finite steps: the KL's gradient at the displaced student, by autograd through both whole logits."""
    run = trainer(tmp_path, build_model(TOKENIZER, initializer_range=0.4), regularizer="l2", temperature=0.7)
    inputs = batch(run)
    before = weights(run.model)
    weight = run.teacher.calibrate(run.model, inputs, kl_weight=2.0, temperature=0.7, learning_rate=1e-3)
    assert all(torch.equal(before[name], parameter) for name, parameter in run.model.named_parameters())

    model = run.model.eval()
    labels = inputs["labels"][:, 1:]
    mask = labels != -100

    def logits():
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return model.lm_head(hidden[:, :-1][mask])

    teacher = (logits() / 0.7).log_softmax(-1).detach()
    parameters = list(model.parameters())
    ce = torch.nn.functional.cross_entropy(logits(), labels[mask])
    direction = torch.autograd.grad(ce, parameters)
    with torch.no_grad():
        for parameter, d in zip(parameters, direction, strict=True):
            parameter -= 1e-3 * d.sign()
    step = 1e-3 * sum((d != 0).sum() for d in direction).sqrt()
    student = (logits() / 0.7).log_softmax(-1)
    kl = 2.0 * 0.7**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    pull = sum(g.square().sum() for g in torch.autograd.grad(kl, parameters)).sqrt()
    assert weight == pytest.approx((pull / step).item(), rel=1e-3)


def test_the_matched_weight_grows_with_the_kl_weight(tmp_path):
    run = trainer(tmp_path, regularizer="l2")
    inputs = batch(run)
    one, three = (run.teacher.calibrate(run.model, inputs, kl_weight, 0.5, 1e-3) for kl_weight in (1.0, 3.0))
    assert three == pytest.approx(3 * one, rel=1e-3) and one > 0


def test_it_is_matched_on_the_first_batch_and_kept(tmp_path):
    options = dict(regularizer="l2", max_steps=8, save_strategy="steps", save_steps=4)
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "cut", arguments={"callbacks": [StopAt(4)]}, **options)
    record = json.loads((tmp_path / "cut/run/checkpoint-4/teacher.json").read_text())
    assert record["l2_weight"] == whole.teacher.weight > 0
    resumed = train(tmp_path / "cut", resume=True, **options)
    assert resumed.teacher.weight == whole.teacher.weight
    assert_same_weights(resumed.model, whole.model)
    with pytest.raises(ValueError, match="`regularizer` is not the one .* which was 'l2'"):
        train(tmp_path / "cut", resume=True, **options | dict(regularizer="kl"))


def test_an_evaluation_before_the_first_step_does_not_match_it(tmp_path):
    other = dict(eval_dataset=Dataset.from_list(FACTS[4:]))
    first, plain = (
        train(tmp_path, arguments=dict(other), regularizer="l2", eval_on_start=on_start, eval_strategy="steps")
        for on_start in (True, False)
    )
    assert first.teacher.weight == plain.teacher.weight > 0
    rows = [row for row in first.state.log_history if "eval_loss" in row]
    assert "eval_l2_loss" not in rows[0] and rows[-1]["eval_l2_loss"] > 0


def test_the_card_says_what_was_done(tmp_path):
    run = train(tmp_path, regularizer="l2", save_strategy="steps", save_steps=2)
    card = (next(iter((tmp_path / "run").glob("checkpoint-*"))) / "README.md").read_text()
    assert "loss = CE + l2_weight / 2 * ||student - teacher||²" in card and "KL(teacher" not in card
    assert str(run.teacher.weight) in card and "l2-to-start-sft" in card


def test_only_what_is_trained_is_pulled(tmp_path):
    run = train(tmp_path, regularizer="l2", trainable_groups=["attention"])
    assert run.teacher._teacher and all("self_attn" in name for name in run.teacher._teacher)


def test_a_batch_without_labels_cannot_be_matched(tmp_path):
    run = trainer(tmp_path, regularizer="l2")
    inputs = batch(run)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with pytest.raises(ValueError, match="no label tokens.*l2_weight"):
        L2ToTeacher(run.model).calibrate(run.model, inputs, 1.0, 0.5, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(regularizer="l1"), "kl, l2, got 'l1'"),
        (dict(regularizer="l2", l2_weight=-1.0), "l2_weight"),
        (dict(l2_weight=1.0), "for `regularizer='l2'`"),
        (dict(regularizer="l2", precompute_teacher=True), "precompute_teacher"),
        (dict(regularizer="l2", teacher_snapshot_steps=1), "teacher_snapshot_steps=1"),
        (dict(regularizer="l2", teacher_model_name_or_path="a/b"), "teacher_model_name_or_path"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_what_it_is_not_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a PEFT model"):
        trainer(tmp_path, arguments={"peft_config": LoraConfig(target_modules=["q_proj"])}, regularizer="l2")
    with pytest.raises(ValueError, match="got `teacher_model`"):
        trainer(tmp_path, arguments={"teacher_model": build_model(TOKENIZER, seed=1)}, regularizer="l2")
