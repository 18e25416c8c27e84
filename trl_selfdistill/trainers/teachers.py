# SPDX-License-Identifier: Apache-2.0
"""
The teacher, a frozen model that the student is pulled to: a model beside it ([`ModelTeacher`]), the same base model
with another adapter or none (adapter_teacher.py), or answers on disk (teacher_cache.py).
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..losses import LMHead, ModelSide
from ..parameters.hashes import gathered, hash_model
from ..parameters.structure import base_causal_lm
from ..slick.prompt_tokens import text_tokenizer
from .label_head import check_label_head, label_hidden_states, lm_head_of
from .sft_internals import (
    add_label_head_forward,
    create_model_from_path,
    frozen_copy,
    get_config_model_id,
    prepare_teacher,
)


logger = logging.get_logger(__name__)


class Teacher:
    """A frozen model that the student is pulled to."""

    sha256: str  # of its weights and settings: a run resumes only with a teacher of the same hash
    model: PreTrainedModel | None = None  # where it is one of its own

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        """
        The teacher's last hidden states at the label positions of a batch, `(num_label_tokens, teacher_hidden_size)`,
        and its LM head, without gradients. `student` is the prepared model, `inputs` are its forward's, with `labels`.
        """
        raise NotImplementedError

    def as_model(self, student: torch.nn.Module) -> AbstractContextManager[PreTrainedModel]:
        """The teacher as a model, in a wrapper or not, that can write (`generate`) within the block."""
        return nullcontext(self.model)

    def keep(self, folder: Path) -> None:
        """Saves to `folder` what a resumed run could not load from anywhere else."""

    def restore(self, student: torch.nn.Module, folder: Path, saved: dict | None) -> None:
        """Takes the place of the teacher in `folder`, if it is `saved`, that of the checkpoint to resume from."""

    def release(self, student: torch.nn.Module) -> None:
        """Removes from the student what the teacher has added to it."""


class ModelTeacher(Teacher):
    """
    A model beside the student, frozen in place, in the student's mixed precision and, under FSDP and ZeRO-3, sharded
    like it. A `ValueError` under FSDP if only the main process holds the weights.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        model.requires_grad_(False).eval()
        self.sha256 = hash_model(model)  # before it is prepared: a shard would have another hash
        add_label_head_forward(base_causal_lm(model))
        self._accelerator = accelerator
        is_fsdp = accelerator.distributed_type == DistributedType.FSDP
        if is_fsdp and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError("`fsdp_cpu_ram_efficient_loading: true` leaves processes no weights. Set it to false.")
        self._lm_head: LMHead | None = None
        if is_fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            # It is read outside of the forward, where shards are not gathered: each process keeps it whole
            self._lm_head = frozen_head(model).map_tensors(lambda tensor: tensor.to(accelerator.device, copy=True))
        self.model = prepare_teacher(model, accelerator)
        whole = base_causal_lm(model) if self._lm_head is None else self.model
        check_label_head(whole, accelerator, "teacher_model")

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        with torch.no_grad():
            hidden_states = label_hidden_states(self.model, inputs)
        lm_head = self._lm_head or frozen_head(self._accelerator.unwrap_model(self.model))
        return ModelSide(hidden_states, lm_head)


def frozen_head(model: PreTrainedModel) -> LMHead:
    """A model's LM head without gradients. Under ZeRO-3, where this is a collective, a copy that is whole."""
    head = lm_head_of(base_causal_lm(model))
    if not hasattr(head.weight, "ds_id"):
        return head.map_tensors(torch.Tensor.detach)
    with gathered(head.weight, head.bias):
        return head.map_tensors(lambda tensor: tensor.detach().clone())


def load_teacher(teacher: str | PreTrainedModel, trainer) -> PreTrainedModel:
    """
    Loads the teacher of a trainer by path or Hub id, or takes the one that was passed in. A `ValueError` if it shares
    parameters with the student, or its vocabulary or tokenizer is not the student's.
    """
    args = trainer.args
    if isinstance(teacher, str):
        init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
        # As `SFTTrainer` does for the model: each process holds the whole of it
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            init_kwargs["device_map"] = None
        teacher = create_model_from_path(teacher, **init_kwargs)
    if not _storages(teacher).isdisjoint(_storages(trainer.model)):
        raise ValueError(
            "`teacher_model` is the model in training itself, or shares parameters. Leave it unset for a frozen copy."
        )
    refuse_adapter_on_head(teacher, "teacher_model")
    _check_vocabulary(teacher, trainer)
    return frozen_copy(teacher) if "forward" in base_causal_lm(teacher).__dict__ else teacher


def refuse_adapter_on_head(model: torch.nn.Module, name: str) -> None:
    """Raises `ValueError` if an adapter, which no loss would see, adds to the LM head of the argument `name`."""
    head = base_causal_lm(model).get_output_embeddings()
    if hasattr(head, "token_adapter") or hasattr(head, "base_layer"):
        raise ValueError(
            f"In `{name}`, an adapter ({type(head).__name__}) adds to the LM head, or to embeddings that it is tied "
            "to, which the loss does not see. `merge_and_unload` it, use `modules_to_save`, or set `kl_weight=0`."
        )


def _storages(model: torch.nn.Module) -> set[int]:
    # Addresses, as `load_state_dict(assign=True)` shares the memory, not the `Parameter`
    return {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()} - {0}


def _check_vocabulary(teacher: PreTrainedModel, trainer) -> None:
    args = trainer.args
    heads = [base_causal_lm(model).get_output_embeddings().weight for model in (trainer.model, teacher)]
    sizes = [getattr(head, "ds_shape", head.shape)[0] for head in heads]  # under ZeRO-3 the tensor itself is empty
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The model's vocabulary has {sizes[0]} tokens and that of `teacher_model` {sizes[1]}: take one of the "
            "same size, or `resize_token_embeddings` of the teacher where the difference is padding."
        )
    if not (name := get_config_model_id(teacher.config)):
        return  # built in memory: there is no tokenizer to compare with
    try:
        options = {"revision": (args.teacher_model_init_kwargs or {}).get("revision")}
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)
    except (ImportError, OSError, ValueError) as error:  # without one, transformers 4 asks for protobuf or tiktoken
        logger.warning(f"The tokenizer of the teacher {name!r} could not be compared with the student's: {error}")
        return
    # The student's may have more, such as a token for padding
    if not theirs.get_vocab().items() <= text_tokenizer(trainer.processing_class).get_vocab().items():
        raise ValueError(f"The tokenizer of the teacher {name!r} is not the student's. Take a teacher with that one.")


def check_teacher(teacher: Teacher | None, saved: dict | None, checkpoint: Path) -> None:
    """Raises `ValueError` if a run's teacher (`None` before its snapshot) is not `saved`, that of its checkpoint."""
    if (teacher is None) != (saved is None):
        raise ValueError(
            f"{checkpoint} was written with{'out' if saved is None else ''} a teacher, and this run would go on with"
            f"{'out' if teacher is None else ''} one. Set `kl_weight` and the snapshot's step as they were."
        )
    if teacher is not None and teacher.sha256 != saved["sha256"]:
        raise ValueError(
            f"The teacher is not the one that {checkpoint} was trained with: pass `teacher_model_name_or_path="
            f"{saved['name_or_path']!r}` or, without one, the model that the run was started with, as `model`."
        )
