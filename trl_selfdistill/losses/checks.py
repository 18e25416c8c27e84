# SPDX-License-Identifier: Apache-2.0
"""What does not fit is refused before any work, by the argument's name, what it got and what it wants."""

from typing import NamedTuple

import torch

from .lm_head import LMHead, ModelSide


class LabelCounts(NamedTuple):
    """What the host needs to know of the labels, fetched from the device at once."""

    num_tokens: int  # labels that count
    denominator: float


def check_options(
    ce_weight: float, kl_weight: float, temperature: float, divergence: str | float, memory_budget_mib: float | None
) -> None:
    """Refuses numbers that are out of range."""
    for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"`{name}` must be a finite number >= 0, got {weight}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be a finite number > 0, got {temperature}.")
    if divergence not in ("forward_kl", "reverse_kl") and not (
        isinstance(divergence, (int, float)) and 0 < divergence < 1
    ):
        raise ValueError(
            "`divergence` must be 'forward_kl', 'reverse_kl' or a number in (0, 1), the teacher's share in the "
            f"mixture of the generalized JSD, got {divergence!r}."
        )
    if memory_budget_mib is not None and not memory_budget_mib > 0:
        raise ValueError(f"`memory_budget_mib` must be > 0, or None for the default, got {memory_budget_mib}.")


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Refuses a weight that is no matrix, or that is not here."""
    if getattr(weight, "ds_id", None) is not None and weight.numel() == 0:
        raise ValueError(
            f"`{name}_lm_head.weight` is partitioned by DeepSpeed ZeRO-3 and empty here. Call this inside "
            "`deepspeed.zero.GatheredParameters([weight])`."
        )
    if weight.dim() != 2 or weight.size(0) == 0:
        raise ValueError(
            f"`{name}_lm_head.weight` must have shape (vocab_size, hidden_size), got {tuple(weight.shape)}."
        )


def check_side(name: str, side: ModelSide, num_tokens: int, device: torch.device, autocast: bool) -> None:
    """Refuses hidden states and a head (of side `name`) whose shapes, dtypes or devices do not fit each other."""
    hidden_states, lm_head = side
    weight, bias = lm_head.weight, lm_head.bias
    if hidden_states.shape != (num_tokens, weight.size(1)):
        raise ValueError(
            f"`{name}_hidden_states` must have shape ({num_tokens}, {weight.size(1)}): one row a label, the width of "
            f"`{name}_lm_head.weight`. Got {tuple(hidden_states.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`{name}_lm_head.bias` must have shape ({weight.size(0)},), got {tuple(bias.shape)}.")
    for what, tensor in (("hidden_states", hidden_states), ("lm_head.weight", weight), ("lm_head.bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}_{what}` must hold floating-point numbers, got {tensor.dtype}.")
        if tensor.device != device:
            raise ValueError(
                f"`{name}_{what}` is on {tensor.device}, `student_hidden_states` on {device}. Move it there with "
                f"`.to('{device}')`."
            )
        if not autocast and tensor.dtype != hidden_states.dtype:
            raise ValueError(
                f"`{name}_{what}` has dtype {tensor.dtype}, `{name}_hidden_states` {hidden_states.dtype}. Cast one, "
                "or call this under `torch.autocast`."
            )


def check_teacher_is_given(hidden_states: torch.Tensor | None, lm_head: LMHead | None) -> None:
    """Refuses a divergence without a teacher."""
    if hidden_states is None or lm_head is None:
        raise ValueError(
            "`teacher_hidden_states` and `teacher_lm_head` are needed when `kl_weight` is not 0, got None. Pass both, "
            "or set `kl_weight=0`."
        )


def check_vocabularies(student_lm_head: LMHead, teacher_lm_head: LMHead) -> None:
    """Refuses heads of different vocabularies."""
    sizes = len(student_lm_head.weight), len(teacher_lm_head.weight)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher_lm_head` has a vocabulary of {sizes[1]} tokens, `student_lm_head` of {sizes[0]}. KL compares "
            "whole distributions: use a teacher of the same vocabulary, or resize its embeddings to the student's "
            "(`resize_token_embeddings`)."
        )


def check_labels(
    labels: torch.Tensor, ignore_index: int, vocab_size: int, num_items_in_batch: int | torch.Tensor | None
) -> LabelCounts:
    """Refuses labels that are no token ids of the vocabulary, and counts them: one wait for the device in all."""
    if labels.dim() != 1:
        raise ValueError(f"`shift_labels` must have shape (num_tokens,), got {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"`shift_labels` must hold integers (token ids), got {labels.dtype}.")
    counted = labels != ignore_index
    outside = counted & ((labels < 0) | (labels >= vocab_size))
    items = torch.as_tensor(0 if num_items_in_batch is None else num_items_in_batch, device=labels.device)
    if items.numel() != 1:
        raise ValueError(f"`num_items_in_batch` must be one number, got shape {tuple(items.shape)}.")
    num_tokens, num_outside, items = torch.stack([counted.sum(), outside.sum(), items.reshape(())]).tolist()
    if num_outside:
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"`shift_labels` must be {ignore_index} or in [0, {vocab_size}), the vocabulary of `student_lm_head`, got "
            f"{int(labels[position])} at position {position}."
        )
    return LabelCounts(int(num_tokens), float(max(1, num_tokens if num_items_in_batch is None else items)))


def check_finite(name: str, hidden_states: torch.Tensor) -> None:
    """Refuses NaN and inf, by their first position."""
    bad = ~hidden_states.isfinite()
    if bad.any():
        token, dimension = bad.nonzero()[0].tolist()
        raise ValueError(
            f"`{name}` must be finite, got {float(hidden_states[token, dimension])} at token {token}, dimension "
            f"{dimension} ({int(bad.any(-1).sum())} of {len(bad)} tokens have such values). Check the teacher's "
            "checkpoint, and its precision: fp16 overflows where bf16 does not."
        )
