# SPDX-License-Identifier: Apache-2.0
"""Rivals that train with another loss: the L2 control of self-distillation, and entropy-adaptive fine-tuning."""

import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.utils import get_total_norm
from trl import SFTTrainer

from ...losses import IGNORE_INDEX
from ...slick.generation import evaluation_mode
from ...trainers import PAPER_SETTING, FrozenGroupsSFTTrainer


_TOP_K = 20  # of EAFT, the paper's


class L2ToStartSFTTrainer(FrozenGroupsSFTTrainer):
    """
    The control of self-distillation (arXiv 2604.15574, section 4.1): `SFTTrainer` with the penalty `l2_weight / 2 *
    ||student - start||^2` over the trainable parameters. For full models on one device or under DDP.

    Args:
        l2_weight (`float`, *optional*): Strength of the pull. Without it, it is matched on the first batch to the KL
            of self-distillation (see [`L2ToStartSFTTrainer.match_l2_weight`]), and kept across a resume.
        args, kwargs: Those of [`FrozenGroupsSFTTrainer`].

    Raises:
        ValueError: With an adapter, FSDP or DeepSpeed: a process has no full weights to pull.
    """

    def __init__(self, *args, l2_weight: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if hasattr(self.model, "peft_config") or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("The L2 control pulls the weights of a full model: train without PEFT, FSDP, DeepSpeed.")
        self.l2_weight = l2_weight
        self.start = [parameter.detach().clone() for parameter in self._trained()]

    def describe_run(self) -> dict:
        return {**super().describe_run(), "l2_weight": self.l2_weight}

    def check_run(self, saved: dict, checkpoint: Path) -> None:
        super().check_run(saved, checkpoint)
        self.l2_weight = saved["l2_weight"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.l2_weight is None and self.model.training:
            # Each process has a batch of its own
            self.l2_weight = self.accelerator.reduce(self.match_l2_weight(inputs), "mean").item()
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.l2_weight is None:  # an evaluation before the first step: the student is the start
            return result
        loss, outputs = result if return_outputs else (result, None)
        penalty = self.l2_weight / 2 * sum(difference.square().sum() for difference in self._differences())
        self.log_means("train" if self.model.training else "eval", l2_loss=penalty.item())
        # A term of the whole step: with `num_items_in_batch`, Trainer leaves accumulation to the loss
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = loss + penalty / steps
        return (loss, outputs) if return_outputs else loss

    def match_l2_weight(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The weight at which the penalty's gradient is as large as that of `temperature**2 * KL` on `inputs`, a batch
        with `labels` before the first step.

        At the start both gradients are zero. So they are compared where Adam's first step leads: `args.learning_rate`
        times the sign of the cross-entropy's gradient away (nearer, the KL is quadratic). The model stays as it is.
        """
        labels = inputs["labels"][:, 1:]
        mask = labels != IGNORE_INDEX
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"} | {"use_cache": False}
        with evaluation_mode(self.model):
            with torch.enable_grad():
                logits = self.model(**inputs).logits[:, :-1][mask].float()
                direction = self._gradient(cross_entropy(logits, labels[mask]))
            temperature = PAPER_SETTING["temperature"]  # of a KL whose weight λ is 1, too
            start = (logits.detach() / temperature).log_softmax(-1)
            for parameter, gradient in zip(self._trained(), direction, strict=True):
                parameter.sub_(self.args.learning_rate * gradient.sign())
            distance = get_total_norm(self._differences())
            with torch.enable_grad():
                logits = self.model(**inputs).logits[:, :-1][mask].float()
                student = (logits / temperature).log_softmax(-1)
                kl = temperature**2 * kl_div(student, start, reduction="batchmean", log_target=True)
                pull = get_total_norm(self._gradient(kl))
            for parameter, tensor in zip(self._trained(), self.start, strict=True):
                parameter.copy_(tensor)
        return pull / distance

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _gradient(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # An expert that no token was sent to has none
        return torch.autograd.grad(loss, self._trained(), allow_unused=True, materialize_grads=True)

    def _differences(self) -> list[torch.Tensor]:
        pairs = zip(self._trained(), self.start, strict=True)
        return [parameter - tensor.to(parameter.device) for parameter, tensor in pairs]


class EAFTSFTTrainer(SFTTrainer):
    """
    Entropy-adaptive fine-tuning (arXiv 2601.02151): each token's cross-entropy is weighted by the entropy of the
    model's 20 most likely tokens over ln 20, without a gradient. Where the model is sure of another token than the
    label, as of a fact that it knows, it is left alone.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        labels = inputs["labels"][:, 1:]
        is_label = labels != IGNORE_INDEX
        log_probs = outputs.logits[:, :-1][is_label].float().log_softmax(-1)  # (num_label_tokens, vocab_size)
        nll = -log_probs.gather(-1, labels[is_label][:, None])[:, 0]
        top = log_probs.detach().topk(_TOP_K).values.log_softmax(-1)
        weights = -(top.exp() * top).sum(-1) / math.log(_TOP_K)  # (num_label_tokens,)
        loss = (weights * nll).sum() / (is_label.sum() if num_items_in_batch is None else num_items_in_batch)
        # It is of all processes then, over which DDP averages the gradients
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss
