# SPDX-License-Identifier: Apache-2.0
"""The teacher as the trainer sees it: what it knows at the label positions of a batch, and who it is."""

from abc import ABC, abstractmethod

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..losses import ModelSide
from ..parameter_groups import digest_groups, hash_parameters
from .sft_internals import add_distillation_forward, base_causal_lm, lm_head_of


class Teacher(ABC):
    """
    A frozen model that the student is pulled to.

    Attributes:
        sha256 (`str`): Hash of its weights. A run resumes only with a teacher of the same hash.
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
    A model beside the student.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The teacher; frozen in place.
        accelerator ([`~accelerate.Accelerator`]): It places the teacher and gives it the student's mixed precision.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        model.requires_grad_(False).eval()
        self.sha256 = hash_model(model)  # before it is prepared: a shard would have another hash
        add_distillation_forward(base_causal_lm(model))
        # Under FSDP accelerate would leave it to the sharding to place a model, but the teacher is not sharded
        placement = True if accelerator.distributed_type == "FSDP" else None
        self._accelerator = accelerator
        self.model = accelerator.prepare_model(model, device_placement=placement, evaluation_mode=True)

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        with torch.no_grad():
            hidden_states = self.model(**inputs, distillation="hidden_states")
            return ModelSide(hidden_states, lm_head_of(base_causal_lm(self._accelerator.unwrap_model(self.model))))


def hash_model(model: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a frozen model's parameters (about a second for 1 GB)."""
    hashes = {f"{group} {name}": h for group, names in hash_parameters(model).items() for name, h in names.items()}
    return digest_groups({"teacher": hashes})["teacher"]
