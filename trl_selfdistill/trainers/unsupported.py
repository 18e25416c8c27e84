# SPDX-License-Identifier: Apache-2.0
"""Settings of a run that cannot be combined with self-distillation: refused when the trainer is made, with the
reason."""

import torch
from accelerate import DistributedType
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ..parameters.structure import base_causal_lm
from .zero3 import is_partitioned


def refuse_settings(args: SFTConfig) -> None:
    """
    Refuses what can be told from the configuration, before a model is loaded.

    Raises:
        ValueError: If activations are to be offloaded where there is no accelerator to offload them from.
    """
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError(
            "`activation_offloading=True` moves activations from an accelerator to the CPU, and there is no "
            "accelerator here. Set `activation_offloading=False`; `gradient_checkpointing=True` saves memory on a CPU."
        )


def refuse_contradictions(
    args: SFTConfig, teacher_model: str | PreTrainedModel | None, rehearsal_dataset: Dataset | None
) -> None:
    """
    Refuses a trainer's arguments and a configuration that say two things.

    Raises:
        ValueError: If the teacher or the prompts are given twice, or options are for a teacher that is not loaded.
    """
    if teacher_model is not None and args.teacher_model_name_or_path is not None:
        raise ValueError(
            f"The teacher is given twice: `teacher_model` and `args.teacher_model_name_or_path="
            f"{args.teacher_model_name_or_path!r}`. Set one of them."
        )
    if teacher_model is not None and (args.teacher_snapshot_steps or args.teacher_snapshot_epochs):
        raise ValueError(
            "`teacher_model` was given together with `teacher_snapshot_steps` or `teacher_snapshot_epochs`, "
            "which make a snapshot of the model the teacher. Set one of them."
        )
    if rehearsal_dataset is not None and args.rehearsal_dataset_name is not None:
        raise ValueError(
            "The prompts are given twice: `rehearsal_dataset` and `args.rehearsal_dataset_name="
            f"{args.rehearsal_dataset_name!r}`. Set one of them."
        )
    given = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
        if getattr(args, name) is not None and not isinstance(given, str):
            raise ValueError(
                f"`{name}` is for a teacher that is loaded by name, and no teacher is. Name it in `teacher_model` "
                f"or `args.teacher_model_name_or_path`, or leave `{name}` unset."
            )


def refuse_kl(trainer: SFTTrainer) -> None:
    """
    Refuses what splits the model so that there is no KL to be had, or what DDP cannot reduce.

    Raises:
        ValueError: With sequence or context parallelism; under DDP with re-entrant checkpoints and a loss that takes a
            forward of its own beside the KL's.
    """
    if needs_own_ce(trainer) and _has_reentrant_checkpoints(trainer) and _is_ddp(trainer):
        raise ValueError(
            "Under DDP, re-entrant gradient checkpointing allows one forward a step, and `loss_type="
            f"{trainer.args.loss_type!r}`, label smoothing or `compute_loss_func` takes one beside that of the KL. "
            "Set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.sp_enabled or parallelism.cp_enabled):
        raise ValueError(
            "`kl_weight > 0` is not supported with sequence or context parallelism (`sp_size` or `cp_size` > 1): "
            "each rank holds a part of the sequence. Use FSDP or ZeRO-2 without it, or set `kl_weight=0`."
        )


def needs_own_ce(trainer: SFTTrainer) -> bool:
    """
    Whether `SFTTrainer` computes its loss otherwise than by one pass of the fused head: then it is kept as it is, and
    the KL, which takes a forward of its own, is added to it.
    """
    args = trainer.args
    return args.loss_type != "nll" or trainer.label_smoother is not None or trainer.compute_loss_func is not None


def _has_reentrant_checkpoints(trainer: SFTTrainer) -> bool:
    args = trainer.args
    return args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)


def _is_ddp(trainer: SFTTrainer) -> bool:
    return trainer.accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def refuse_l2(trainer: SFTTrainer, teacher_model: str | PreTrainedModel | None) -> None:
    """
    Refuses what has no full weights of its own to pull.

    Raises:
        ValueError: With a teacher given, an adapter, FSDP or DeepSpeed.
    """
    unsuited = {
        "`teacher_model`": teacher_model is not None,
        "a PEFT model": hasattr(trainer.model, "peft_config"),
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
    }
    if what := [name for name, applies in unsuited.items() if applies]:
        raise ValueError(
            "`regularizer='l2'` pulls the weights of a full model to those it was handed over with, got "
            f"{what[0]}. Set `regularizer='kl'`, or leave that out."
        )


def refuse_rehearsal(trainer: SFTTrainer) -> None:
    """
    Refuses `rehearsal_dataset` where its rows cannot be put among those of `train_dataset`, or come from a model that
    does not know the format yet.

    Raises:
        ValueError: If `train_dataset` is a stream or not tokenised by the trainer, or stage 1 is part of the run.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if args.teacher_snapshot_steps or args.teacher_snapshot_epochs:
        raise ValueError(
            "`rehearsal_dataset` is answered before training, and `teacher_snapshot_steps` and "
            "`teacher_snapshot_epochs` train plain SFT first. Train stage 1 by itself and start this run from its "
            "model, or leave `rehearsal_dataset` out."
        )
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        what = "makes its tokens in the batch" if isinstance(dataset, Dataset) else f"is a {type(dataset).__name__}"
        raise ValueError(
            "`rehearsal_dataset` is mixed into the tokenised rows of `train_dataset`, which "
            f"{what}. Pass a `datasets.Dataset` of text, or leave `rehearsal_dataset` out."
        )


def refuse_adapter_on_head(model: torch.nn.Module, name: str = "model") -> None:
    """
    Refuses an adapter on the LM head that is more than other weights: the head is read, not called.

    Args:
        model (`torch.nn.Module`): The student or the teacher.
        name (`str`, *optional*, defaults to `"model"`): The trainer's argument that it is.

    Raises:
        ValueError: If single tokens of the head are trained, as with `trainable_token_indices` and tied embeddings, or
            an adapter adds to its weights.
    """
    head = base_causal_lm(model).get_output_embeddings()
    if hasattr(head, "token_adapter"):
        raise ValueError(
            f"In `{name}`, `trainable_token_indices` trains tokens of the embeddings, to which the LM head is tied, "
            "and the CE and KL are computed from the head's weights as they are stored. Use "
            "`modules_to_save=['embed_tokens']`, or a model with a head of its own, or set `kl_weight=0`."
        )
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"In `{name}`, an adapter ({type(head).__name__}) adds to the LM head, and the CE and KL are computed "
            "from the head's weights as they are stored. Merge it (`merge_and_unload`), or use "
            "`modules_to_save=['lm_head']`."
        )


def refuse_joined_sequences(trainer: SFTTrainer, teacher: PreTrainedModel | None) -> None:
    """
    Refuses a student or teacher that does not tell joined sequences apart.

    Packing (`bfd`, `bfd_split`) and `padding_free=True` join sequences in one row, and positions that start anew tell
    the model where. A model that ignores them lets each sequence see the ones before it, so that the KL per token
    would not be that of the sequences by themselves. Whether it does is found out by a forward of eight tokens.

    Raises:
        ValueError: If it is a prompt-learning adapter, or a model with layers that carry a state across the border.
    """
    if not trainer.padding_free:
        return
    advice = "Set `packing=False` (or `packing_strategy='wrapped'`) and `padding_free=False`"
    for name, side in (("model", trainer.model), ("teacher_model", teacher)):
        if side is None:
            continue
        adapter = getattr(side, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise ValueError(
                "Packing and `padding_free=True` join sequences in one row, and with the adapter of the "
                f"`{name}` ({adapter.peft_type.value}) the model does not get the `position_ids` that tell them "
                f"apart. {advice}, or train another kind of adapter."
            )
        model = base_causal_lm(side)
        # A model that is placed and sharded later may have other kernels there, and its weights may not be here yet
        if model.device.type != trainer.args.device.type or any(map(is_partitioned, model.parameters())):
            continue
        with trainer.accelerator.autocast():
            why = why_joined_sequences_meet(model)
        if why is not None:
            raise ValueError(
                f"Packing and `padding_free=True` join sequences in one row, and in the `{name}` "
                f"({type(model).__name__}) {why}. {advice}."
            )


@torch.no_grad()
def why_joined_sequences_meet(model: PreTrainedModel) -> str | None:
    """`None` if what comes first in a row of two joined sequences leaves the second one's hidden states unchanged."""
    length = 4
    starts = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=model.device)
    joined = {
        "position_ids": torch.arange(length, device=model.device).repeat(2)[None],
        "seq_idx": torch.arange(2, dtype=torch.int32, device=model.device).repeat_interleave(length)[None],
        **dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=length, max_length_k=length, use_cache=False),
    }
    second = torch.arange(length, device=model.device)
    training = model.training
    model.eval()
    try:
        states = [
            model.base_model(input_ids=torch.cat([first, second])[None], **joined).last_hidden_state[0, length:]
            for first in (second, second.flip(0))
        ]
    except ValueError as error:  # transformers' own refusal, of kernels that are not installed
        return f"they cannot be told apart: {error}"
    finally:
        model.train(training)
    if (states[0] - states[1]).abs().max().item() <= 1e-3 * states[0].abs().max().item():
        return None
    return "each sequence sees the one before it, whatever the `position_ids` say"
