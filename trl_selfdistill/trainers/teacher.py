# SPDX-License-Identifier: Apache-2.0
"""The teacher as the trainer sees it: what it knows at the label positions of a batch, and who it is."""

from abc import ABC, abstractmethod

import torch
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedModel

from ..losses import LMHead, ModelSide
from ..parameters.structure import base_causal_lm
from ..slick.generation import evaluation_mode
from .model_identity import hash_model
from .sft_internals import add_distillation_forward, lm_head_of, prepare_deepspeed, prepare_fsdp
from .zero3 import gathered


class Teacher(ABC):
    """
    A frozen model that the student is pulled to.

    Attributes:
        sha256 (`str`): Hash of its weights and settings. A run resumes only with a teacher of the same hash.
    """

    sha256: str

    @abstractmethod
    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        """
        Its last hidden states at the label positions of a batch, `(num_label_tokens, teacher_hidden_size)`, and its LM
        head, both without gradients.

        Args:
            student (`torch.nn.Module`): The model in training as accelerate has prepared it.
            inputs (`dict[str, torch.Tensor]`): What the student's forward gets, `labels` among it.
        """


class ModelTeacher(Teacher):
    """
    A model beside the student, sharded like it under FSDP.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The teacher; frozen in place.
        accelerator ([`~accelerate.Accelerator`]): It places or shards the teacher and gives it the student's mixed
            precision.

    Raises:
        ValueError: Under FSDP, if only the main process holds the weights.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        model.requires_grad_(False).eval()
        self.sha256 = hash_model(model)  # before it is prepared: a shard would have another hash
        add_distillation_forward(base_causal_lm(model))
        self._accelerator = accelerator
        # The head is read outside of the forward, where shards are not gathered: then each process keeps it whole
        self._lm_head: LMHead | None = None
        if accelerator.distributed_type == DistributedType.FSDP:
            refuse_empty_ranks(accelerator)
            head = lm_head_of(base_causal_lm(model))
            self._lm_head = head.map_tensors(lambda tensor: tensor.detach().to(accelerator.device, copy=True))
            self.model = prepare_fsdp(model, accelerator)
        elif accelerator.distributed_type == DistributedType.DEEPSPEED:
            if accelerator.state.deepspeed_plugin.zero_stage == 3:
                self._lm_head = whole_head(model)
            self.model = prepare_deepspeed(model, accelerator)
        else:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        with torch.no_grad():
            hidden_states = self.model(**inputs, distillation="hidden_states")
        if self._lm_head is not None:
            return ModelSide(hidden_states, self._lm_head)
        return ModelSide(hidden_states, lm_head_of(base_causal_lm(self._accelerator.unwrap_model(self.model))))


class UntrainedStudent(Teacher):
    """
    The student until its first step: what a copy of it would answer, without the copy. For answers in advance only.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student.
    """

    def __init__(self, model: PreTrainedModel):
        self.sha256 = hash_model(model)

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        with torch.no_grad(), evaluation_mode(student):
            hidden_states = student(**inputs, distillation="hidden_states")
        return ModelSide(hidden_states, lm_head_of(base_causal_lm(student)).map_tensors(torch.Tensor.detach))


def whole_head(model: PreTrainedModel) -> LMHead:
    """A copy of a model's LM head, of which each process has the whole under ZeRO-3. A collective there."""
    head = lm_head_of(base_causal_lm(model))
    with gathered(head.weight, head.bias):
        return head.map_tensors(lambda tensor: tensor.detach().clone())


def refuse_empty_ranks(accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: If only the main process has loaded the model: what the teacher is copied from is empty elsewhere.
    """
    if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading: true` leaves the model empty on all processes but one until it is "
            "sharded, and the teacher is copied before that. Set it to false, as "
            "scripts/accelerate_configs/fsdp2.yaml does, or set `kl_weight=0`."
        )
