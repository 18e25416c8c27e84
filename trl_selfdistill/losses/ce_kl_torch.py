# SPDX-License-Identifier: Apache-2.0
"""The tile kernel in PyTorch, for every device: blocks of rows small enough to stay in the processor's cache."""

import math
from typing import NamedTuple

import torch

from .objective import LogitTransform, TileObjective


# Elements of a block of rows. On a CPU each of its five fp32 buffers is then 2 MiB, so that the dozen elementwise
# passes run in the cache; elsewhere a pass over few elements would leave the device idle.
BLOCK_ELEMENTS = {"cpu": 2**19, "other": 2**24}


class _Buffers(NamedTuple):
    """Scratch memory of one block, `(rows, vocab_size)` each, in the dtype of the arithmetic."""

    student: torch.Tensor
    teacher: torch.Tensor
    probs: torch.Tensor
    teacher_probs: torch.Tensor
    products: torch.Tensor


def ce_kl_tile_(
    student_tile: torch.Tensor,  # (num_tokens, vocab_size)
    teacher_tile: torch.Tensor | None,  # (num_tokens, vocab_size), None when kl_weight is 0
    labels: torch.Tensor,  # (num_tokens,), none ignored
    student_transform: LogitTransform,
    teacher_transform: LogitTransform | None,
    objective: TileObjective,
    *,
    with_grad: bool,
) -> torch.Tensor:
    """
    Losses of each row of a tile. With `with_grad`, `student_tile` is overwritten with the objective's gradient with
    respect to it; what is left in the tiles otherwise is undefined.

    Returns:
        `torch.Tensor` of shape `(num_tokens, 4)`, fp32 (fp64 for fp64 tiles): cross-entropy, divergence and entropy in
        nats, and whether the label is the most likely token (1.0 or 0.0).
    """
    num_tokens, vocab_size = student_tile.shape
    dtype = torch.float64 if student_tile.dtype == torch.float64 else torch.float32
    block_elements = BLOCK_ELEMENTS.get(student_tile.device.type, BLOCK_ELEMENTS["other"])
    rows = max(1, min(num_tokens, block_elements // vocab_size))
    scratch = student_tile.new_empty((len(_Buffers._fields), rows, vocab_size), dtype=dtype)
    losses = student_tile.new_zeros((num_tokens, 4), dtype=dtype)
    for start in range(0, num_tokens, rows):
        block = slice(start, start + rows)
        buffers = _Buffers(*scratch[:, : min(rows, num_tokens - start)])
        _block(
            student_tile[block],
            teacher_tile[block] if objective.kl_weight else None,
            labels[block, None],
            student_transform,
            teacher_transform,
            objective,
            buffers,
            losses[block],
            with_grad,
        )
    return losses


def _block(student, teacher, labels, student_transform, teacher_transform, objective, buffers, losses, with_grad):
    """One block of rows: fills `losses`, and `student` with the gradient."""
    logits = _logits(student, student_transform, buffers.student)
    probs = torch.softmax(logits, -1, out=buffers.probs)
    top = logits.amax(-1, keepdim=True)
    log_sum_exp = _log_sum_exp(top, probs)
    losses[:, 0:1] = log_sum_exp - logits.gather(-1, labels)
    losses[:, 2:3] = log_sum_exp - _row_dot(probs, logits, buffers)
    losses[:, 3:4] = _is_most_likely(logits, labels, top)
    grad = None
    if objective.kl_weight:
        teacher_logits = _logits(teacher, teacher_transform, buffers.teacher)
        divergence = _forward_kl if objective.jsd_beta == 0 else _generalized_jsd
        values, grad = divergence(logits, top, log_sum_exp, teacher_logits, objective, buffers, with_grad)
        losses[:, 1:2] = values.clamp_(min=0.0)  # of equal models, rounding may leave -1e-7
    if not with_grad:
        return
    slope = None  # of the softcap; it needs the logits, which the gradient overwrites
    if student_transform.softcap is not None:
        slope = 1 - (logits / student_transform.softcap).square_()
    ce_scale = objective.ce_weight * objective.grad_scale
    if grad is None:
        grad = torch.mul(probs, ce_scale, out=logits)
    else:
        grad = torch.add(grad, probs, alpha=ce_scale, out=logits)
    grad.scatter_add_(-1, labels, grad.new_full((1, 1), -ce_scale).expand_as(labels))
    if slope is not None:
        grad.mul_(slope)
    if student_transform.scale != 1.0:
        grad.mul_(student_transform.scale)
    if grad.dtype != student.dtype:
        student.copy_(grad)


def _logits(tile: torch.Tensor, transform: LogitTransform, buffer: torch.Tensor) -> torch.Tensor:
    """The logits, in place where the tile has the dtype of the arithmetic."""
    logits = tile if tile.dtype == buffer.dtype else buffer.copy_(tile)
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits


def _row_dot(first: torch.Tensor, second: torch.Tensor, buffers: _Buffers) -> torch.Tensor:
    """Dot products of the rows, `(rows, 1)`. (PyTorch's batched product of rows is 17 times as slow on a CPU.)"""
    return torch.mul(first, second, out=buffers.products).sum(-1, keepdim=True)


def _log_sum_exp(top: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """From the largest logit of each row and its softmax, whose largest entry is 1 / sum(exp(logits - top))."""
    return top - probs.amax(-1, keepdim=True).log()


def _is_most_likely(logits: torch.Tensor, labels: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(-1) == labels` with ties going to the first token, in maxima, which take a tenth of its time."""
    label_logits = logits.gather(-1, labels)
    is_top = label_logits == top
    rival = logits.scatter_(-1, labels, -torch.inf).amax(-1, keepdim=True)
    logits.scatter_(-1, labels, label_logits)
    tied = (is_top & (rival == top)).squeeze(-1)
    if tied.any():
        is_top[tied] = logits[tied].argmax(-1, keepdim=True) == labels[tied]
    return is_top


def _forward_kl(logits, top, log_sum_exp, teacher_logits, objective, buffers, with_grad):
    """KL(teacher ‖ student) of each row, and its scaled gradient with respect to the student's logits."""
    temperature = objective.temperature
    if temperature != 1.0:
        teacher_logits.mul_(1 / temperature)
    teacher_probs = torch.softmax(teacher_logits, -1, out=buffers.teacher_probs)
    teacher_log_sum_exp = _log_sum_exp(teacher_logits.amax(-1, keepdim=True), teacher_probs)
    cross = _row_dot(teacher_probs, teacher_logits.sub_(logits, alpha=1 / temperature), buffers)
    # The student's exponentials at the temperature, up to the factor 1 / total, in the memory of the teacher's logits
    if temperature == 1.0:
        powers, total, shifted = teacher_logits.copy_(buffers.probs), 1.0, log_sum_exp
    elif temperature == 0.5:  # p^(1 / 0.5) needs no second exponential
        powers = torch.mul(buffers.probs, buffers.probs, out=teacher_logits)
        total = powers.sum(-1, keepdim=True)
        shifted = 2 * log_sum_exp + total.log()
    else:
        powers = torch.sub(logits, top, out=teacher_logits).mul_(1 / temperature).exp_()
        total = powers.sum(-1, keepdim=True)
        shifted = top / temperature + total.log()
    divergence = cross - teacher_log_sum_exp + shifted
    if not with_grad:
        return divergence, None
    kl_scale = objective.kl_weight * temperature * objective.grad_scale
    return divergence, powers.mul_(kl_scale / total).sub_(teacher_probs, alpha=kl_scale)


def _generalized_jsd(logits, top, log_sum_exp, teacher_logits, objective, buffers, with_grad):
    """As [`_forward_kl`] for the reverse KL (`jsd_beta` 1) and the divergences in between."""
    beta = objective.jsd_beta
    log_probs = torch.log_softmax(logits / objective.temperature, -1)
    teacher_log_probs = torch.log_softmax(teacher_logits / objective.temperature, -1)
    if beta == 1:
        student_weight, log_mixture = 1.0, teacher_log_probs
    else:
        student_weight = 1 - beta
        log_mixture = torch.logaddexp(teacher_log_probs + math.log(beta), log_probs + math.log(student_weight))
    probs, log_ratio = log_probs.exp(), log_probs - log_mixture
    student_kl = _row_dot(probs, log_ratio, buffers)  # KL(student ‖ mixture)
    divergence = student_weight * student_kl
    if beta != 1:
        divergence += beta * _row_dot(teacher_log_probs.exp(), teacher_log_probs - log_mixture, buffers)
    kl_scale = objective.kl_weight * objective.temperature * objective.grad_scale * student_weight
    return divergence, log_ratio.sub_(student_kl).mul_(probs).mul_(kl_scale) if with_grad else None
