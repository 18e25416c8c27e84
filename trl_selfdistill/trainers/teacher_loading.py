# SPDX-License-Identifier: Apache-2.0
"""A teacher that the user names or hands over: loaded, and refused if it does not fit the student."""

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..parameters.structure import base_causal_lm
from .self_distill_sft_config import SelfDistillSFTConfig
from .sft_internals import create_model_from_path, frozen_copy, get_config_model_id
from .unsupported import refuse_adapter_on_head


logger = logging.get_logger(__name__)


def load_teacher(
    teacher: str | PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SelfDistillSFTConfig,
) -> PreTrainedModel:
    """
    Loads (or takes) a given teacher.

    Raises:
        ValueError: If it shares parameters with the student, or its vocabulary or tokenizer is not the student's.
    """
    if isinstance(teacher, str):
        init_kwargs = dict(args.teacher_model_init_kwargs or {})
        if args.teacher_model_revision is not None:
            init_kwargs.setdefault("revision", args.teacher_model_revision)
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        # As `SFTTrainer` does for the model: each process holds the whole of it
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            init_kwargs["device_map"] = None
        teacher = create_model_from_path(teacher, **init_kwargs)
    if not _storages(teacher).isdisjoint(_storages(student)):
        raise ValueError(
            "`teacher_model` is the model in training itself, or shares parameters with it, which would make it a "
            "moving teacher. Leave `teacher_model` unset to take a frozen copy of the model."
        )
    refuse_adapter_on_head(teacher, "teacher_model")
    _check_vocabulary(teacher, student, tokenizer, args)
    return frozen_copy(teacher) if "forward" in base_causal_lm(teacher).__dict__ else teacher


def _storages(model: torch.nn.Module) -> set[int]:
    """Where a model's parameters lie. By address, as `load_state_dict(assign=True)` shares the memory only."""
    return {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()} - {0}


def _check_vocabulary(teacher, student, tokenizer, args: SelfDistillSFTConfig) -> None:
    heads = [base_causal_lm(m).get_output_embeddings().weight for m in (student, teacher)]
    sizes = [getattr(head, "ds_shape", head.shape)[0] for head in heads]  # under ZeRO-3 the tensor itself is empty
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The model has a vocabulary of {sizes[0]} tokens and `teacher_model` one of {sizes[1]}. The KL "
            "compares whole next-token distributions: take a teacher of the same vocabulary, or resize its "
            "embeddings (`teacher_model.resize_token_embeddings`) where the difference is padding."
        )
    name = get_config_model_id(teacher.config)
    if not name:
        return  # built in memory: there is no tokenizer to compare with
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(
            name, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        logger.warning(f"The tokenizer of the teacher {name!r} could not be compared with the student's: {error}")
        return
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer of the teacher {name!r} is not the student's: the same ids would mean other tokens. "
            "Use a teacher that was trained with the student's tokenizer."
        )
