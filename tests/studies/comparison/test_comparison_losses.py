# SPDX-License-Identifier: Apache-2.0
"""The L2 control: a pull of the weights to the start, as strong as that of the KL. EAFT's weights of tokens."""

import math

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from peft import LoraConfig
from sft_runs import FACTS, TOKENIZER, StopAt, assert_same_weights, logs, train, trainer, weights
from trl import SFTTrainer

from trl_selfdistill.studies.comparison.losses import EAFTSFTTrainer, L2ToStartSFTTrainer


def l2(**arguments) -> dict:
    return dict(trainer_class=L2ToStartSFTTrainer, arguments=arguments)


class AddsPull(SFTTrainer):
    """`SFTTrainer` whose optimizer adds the gradient of `3 / 2 * ||student - start||^2` to what it gets."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        start = weights(self.model)

        def pull(*_):
            for name, parameter in self.model.named_parameters():
                parameter.grad += 3.0 * (parameter.detach() - start[name])

        optimizer.register_step_pre_hook(pull)
        return optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_steps_are_those_of_sft_with_the_gradient_of_the_penalty(tmp_path, accumulation):
    options = dict(optim="sgd", max_steps=3, learning_rate=0.05, max_grad_norm=0.0)
    options |= dict(gradient_accumulation_steps=accumulation)
    run = train(tmp_path, **l2(l2_weight=3.0), **options)
    assert_same_weights(run.model, train(tmp_path, trainer_class=AddsPull, **options).model, rtol=1e-5, atol=1e-7)
    rows = [row["l2_loss"] for row in logs(run) if "l2_loss" in row]
    assert rows[0] == 0 < rows[1]


def test_the_matched_weight_makes_the_gradients_equally_large(tmp_path):
    """Against HF's own loss and the KL of whole logits, one step of Adam from the start."""
    matched, start, model = (build_model(TOKENIZER, initializer_range=0.4).eval() for _ in range(3))
    run = trainer(tmp_path, matched, **l2(), learning_rate=1e-3)
    inputs = next(iter(run.get_train_dataloader()))
    weight = run.match_l2_weight(inputs).item()
    assert_same_weights(run.model, start)

    model(**inputs).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad.sign()
    distance = total_norm(p - q for p, q in zip(model.parameters(), start.parameters(), strict=True))
    mask = inputs["labels"][:, 1:] != -100
    student, teacher = ((each(**inputs).logits[:, :-1][mask] / 0.5).log_softmax(-1) for each in (model, start))
    kl = 0.5**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    gradient = torch.autograd.grad(kl, [*model.parameters()])
    assert weight == pytest.approx((total_norm(gradient) / distance).item(), 1e-3)


def total_norm(tensors) -> torch.Tensor:
    return sum(tensor.square().sum() for tensor in tensors).sqrt()


def test_it_is_matched_on_the_first_batch_of_training_and_kept_across_a_resume(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, trainable_groups=["attention"], kl_weight=0.0)
    data = dict(eval_dataset=Dataset.from_list(FACTS[4:]))
    whole = train(tmp_path / "whole", **l2(**data), eval_on_start=True, eval_strategy="steps", eval_steps=4, **options)
    assert len(whole.start) < len([*whole.model.parameters()])
    evaluations = [row for row in whole.state.log_history if "eval_loss" in row]
    assert "eval_l2_loss" not in evaluations[0] and evaluations[-1]["eval_l2_loss"] > 0
    train(tmp_path / "cut", **l2(callbacks=[StopAt(2)]), **options)
    resumed = train(tmp_path / "cut", resume=True, **l2(), **options)
    assert resumed.l2_weight == whole.l2_weight > 0
    assert_same_weights(resumed.model, whole.model)


def test_eaft_weighs_tokens_by_an_entropy_without_a_gradient(tmp_path):
    run = trainer(tmp_path, build_model(TOKENIZER, initializer_range=0.4), trainer_class=EAFTSFTTrainer)
    inputs = next(iter(run.get_train_dataloader()))
    mask = inputs["labels"][:, 1:] != -100
    logits, labels = run.model(**inputs).logits[:, :-1][mask], inputs["labels"][:, 1:][mask]
    weights = torch.distributions.Categorical(logits=logits.detach().topk(20).values).entropy() / math.log(20)
    expected = (weights * torch.nn.functional.cross_entropy(logits, labels, reduction="none")).mean()
    halved = 2 * run.compute_loss(run.model, inputs, num_items_in_batch=2 * len(labels))
    losses = expected, run.compute_loss(run.model, inputs), halved
    expected, *found = (torch.autograd.grad(loss, [*run.model.parameters()]) for loss in losses)
    for gradients in found:
        torch.testing.assert_close(gradients, expected)


def test_what_it_is_not_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train without PEFT"):
        trainer(tmp_path, **l2(peft_config=LoraConfig(target_modules=["q_proj"])))
