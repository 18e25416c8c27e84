# SPDX-License-Identifier: Apache-2.0
"""The control of self-distillation: a pull of the student's weights, rather than of its outputs, to the snapshot
(arXiv 2604.15574, section 4.1)."""

import torch
from transformers import PreTrainedModel

from ..losses import ModelSide
from ..parameters.structure import base_causal_lm
from ..slick.generation import evaluation_mode
from .model_identity import hash_model
from .sft_internals import DistillationTargets, lm_head_of


class L2ToTeacher:
    """
    The penalty `weight / 2 * ||student - teacher||^2` over the trainable parameters, the teacher being the student as
    it is when this is made.

    Args:
        model ([`~transformers.PreTrainedModel`]): The student.
        weight (`float`, *optional*): Strength of the pull. [`calibrate`] finds one that matches the KL's.

    Attributes:
        sha256 (`str`): Hash of the teacher's weights.
    """

    def __init__(self, model: PreTrainedModel, weight: float | None = None):
        self.sha256 = hash_model(model)
        self.weight = weight
        self._teacher = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    def penalty(self, model: PreTrainedModel) -> torch.Tensor:
        """The penalty of the student as it is now, a scalar with gradients."""
        distances = [
            (parameter - self._teacher[name].to(parameter.device)).square().sum()
            for name, parameter in model.named_parameters()
            if name in self._teacher
        ]
        return self.weight / 2 * torch.stack(distances).sum()

    def calibrate(
        self, model: PreTrainedModel, inputs: dict, kl_weight: float, temperature: float, learning_rate: float
    ) -> float:
        """
        The weight at which the penalty's gradient is as large as that of `kl_weight * temperature**2 * KL`.

        At the snapshot both gradients are zero. So they are compared where Adam's first step on `inputs` leads:
        `learning_rate` times the sign of the cross-entropy's gradient away. It matters where, as the KL is quadratic
        in the distance on far smaller steps only.

        Args:
            model ([`~transformers.PreTrainedModel`]): The student, still the snapshot; unchanged afterwards.
            inputs (`dict[str, torch.Tensor]`): The calibration batch, `labels` among it.
            kl_weight (`float`): λ of the KL that is matched.
            temperature (`float`): Its τ.
            learning_rate (`float`): The peak learning rate of the training.

        Raises:
            ValueError: If the batch has no label tokens, so that there is no gradient to match.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with evaluation_mode(model):
            hidden_states = model(**inputs, distillation="hidden_states")
            head = lm_head_of(base_causal_lm(model)).map_tensors(lambda tensor: tensor.detach().clone())
            teacher = ModelSide(hidden_states, head)
            direction = self._gradient(model, inputs, DistillationTargets(teacher, 1.0, 0.0, temperature, None))
            if not any(gradient.any() for gradient in direction):
                raise ValueError(
                    '`regularizer="l2"` matches its strength to the KL\'s on the first batch, which has no label '
                    "tokens. Give `l2_weight`, or shuffle the dataset."
                )
            try:
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, direction, strict=True):
                        parameter.sub_(learning_rate * gradient.sign())
                    distance = _norm([p - t for p, t in zip(parameters, self._teacher.values(), strict=True)])
                targets = DistillationTargets(teacher, 0.0, kl_weight, temperature, None)
                pull = _norm(self._gradient(model, inputs, targets))
            finally:
                with torch.no_grad():
                    for parameter, tensor in zip(parameters, self._teacher.values(), strict=True):
                        parameter.copy_(tensor)
        return float(pull / distance)

    @staticmethod
    @torch.enable_grad()
    def _gradient(model: PreTrainedModel, inputs: dict, targets: DistillationTargets) -> list[torch.Tensor]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = model(**inputs, distillation=targets).ce_kl.loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.detach().float()) for t in tensors]))
