# SPDX-License-Identifier: Apache-2.0
"""Weights that DeepSpeed ZeRO-3 has partitioned: an empty tensor on each process until they are gathered."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds it in parts, gathered at the moment or not."""
    return hasattr(tensor, "ds_id")


@contextmanager
def gathered(*tensors: torch.Tensor | None) -> Iterator[None]:
    """
    The tensors whole on each process, for reading. A collective under ZeRO-3, nothing without it.

    Args:
        tensors (`torch.Tensor`, *optional*): Weights; those that are whole stay as they are.
    """
    # By identity: tied weights come twice, and DeepSpeed takes each once
    parts = {id(tensor): tensor for tensor in tensors if tensor is not None and is_partitioned(tensor)}
    parts = [tensor for tensor in parts.values() if tensor.numel() != tensor.ds_numel]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def copy_partitioned(model: PreTrainedModel) -> PreTrainedModel:
    """
    A copy of a partitioned model, partitioned alike, with no process ever holding it whole.

    Args:
        model ([`~transformers.PreTrainedModel`]): As `from_pretrained` leaves it under ZeRO-3.

    Raises:
        ValueError: If it is wrapped by PEFT.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The teacher would be a copy of the model with its adapter, whose weights DeepSpeed ZeRO-3 has "
            "partitioned. Use ZeRO-2 or FSDP, pass a `teacher_model`, or set `kl_weight=0`."
        )
    config = copy.deepcopy(model.config)
    # While ZeRO-3 is on, transformers partitions what it makes, in the same way
    twin = type(model)._from_config(config, dtype=model.dtype, attn_implementation=config._attn_implementation)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.ds_tensor.copy_(theirs.ds_tensor)
        for ours, theirs in zip(twin.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    return twin
