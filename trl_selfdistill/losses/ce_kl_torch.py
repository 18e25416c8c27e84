# SPDX-License-Identifier: Apache-2.0
"""The tile kernel in PyTorch, for every device, and what every kernel reads: rows few enough to stay in the cache."""

from typing import NamedTuple

import torch


# Elements of a block of rows. On a CPU each of its five fp32 buffers is then 2 MiB, so that the dozen elementwise
# passes run in the cache; elsewhere a pass over few elements would leave the device idle.
BLOCK_ELEMENTS = {"cpu": 2**19, "other": 2**24}


class Tile(NamedTuple):
    """Products of hidden states and an LM head. The logits are `softcap * tanh(scale * products / softcap)`."""

    products: torch.Tensor  # (num_tokens, vocab_size), contiguous
    scale: float
    softcap: float | None


class TileObjective(NamedTuple):
    """`grad_scale * (ce_weight * CE + kl_weight * temperature**2 * KL(teacher ‖ student))`, summed over the rows."""

    ce_weight: float
    kl_weight: float  # at 0 there is no teacher
    temperature: float  # of both distributions in the KL; the cross-entropy is at temperature 1
    grad_scale: float  # one over the number of labels in the batch

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Returns the loss, from the tokens' sums `(4,)` of cross-entropy, KL, entropy and top-1."""
        return (self.ce_weight * sums[0] + self.kl_weight * self.temperature**2 * sums[1]) * self.grad_scale


def ce_kl_tile_(
    student: Tile,
    teacher: Tile | None,  # None when kl_weight is 0
    labels: torch.Tensor,  # (num_tokens,), none ignored
    objective: TileObjective,
    grad: torch.Tensor | None,  # (num_tokens, vocab_size), contiguous
) -> torch.Tensor:
    """
    Computes the losses of each row, and fills `grad` with the objective's gradient with respect to the student's
    products. It may be these products themselves, or of another dtype; what is left in the tiles is undefined.

    Returns:
        `torch.Tensor` of shape `(num_tokens, 4)`, fp32 (fp64 for fp64 tiles): cross-entropy, KL and entropy in nats,
        and whether the label is the most likely token (1.0 or 0.0).
    """
    num_tokens, vocab_size = student.products.shape
    dtype = torch.float64 if student.products.dtype == torch.float64 else torch.float32
    rows = max(1, BLOCK_ELEMENTS["cpu" if labels.device.type == "cpu" else "other"] // vocab_size)
    buffers = student.products.new_empty((5, min(rows, num_tokens), vocab_size), dtype=dtype)
    losses = student.products.new_zeros((num_tokens, 4), dtype=dtype)
    for start in range(0, num_tokens, rows):
        block = slice(start, min(start + rows, num_tokens))
        sides = [tile and tile._replace(products=tile.products[block]) for tile in (student, teacher)]
        outputs = (losses[block], None if grad is None else grad[block])
        _block(*sides, labels[block, None], objective, *outputs, buffers[:, : block.stop - start])
    return losses


def scaled(grad: torch.Tensor, upstream: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Writes `grad * upstream * scale` to `out`, which may be `grad`; `upstream` is a scalar."""
    if out is grad and grad.device.type == "cpu" and upstream * scale == 1:  # else looking at it waits for the device
        return
    torch.mul(grad, upstream * scale, out=out)


def _block(student, teacher, labels, objective, losses, grad, buffers):
    """Fills `losses` and `grad` for one block of rows."""
    student_buffer, teacher_buffer, probs, teacher_probs, scratch = buffers  # (rows, vocab_size) each
    temperature = objective.temperature
    logits = _logits(student, student_buffer)
    top, log_sum_exp = _softmax(logits, probs)
    losses[:, 0:1] = log_sum_exp - logits.gather(-1, labels)
    losses[:, 2:3] = log_sum_exp - torch.mul(probs, logits, out=scratch).sum(-1, keepdim=True)
    # `logits.argmax(-1) == labels`, ties going to the first token, in a fourth of the time
    losses[:, 3:4] = logits.gather(-1, labels) == top
    tied = torch.eq(logits, top, out=scratch).sum(-1) > 1
    if tied.any():
        losses[tied, 3:4] = (logits[tied].argmax(-1, keepdim=True) == labels[tied]).to(losses.dtype)
    if teacher is not None:
        teacher_logits = _logits(teacher, teacher_buffer)
        if temperature != 1.0:
            teacher_logits.mul_(1 / temperature)
        _, teacher_log_sum_exp = _softmax(teacher_logits, teacher_probs)
        differences = teacher_logits.sub_(logits, alpha=1 / temperature)
        cross = torch.mul(teacher_probs, differences, out=scratch).sum(-1, keepdim=True)
        # The student's exponentials at the temperature, up to a factor for each row, and their log-sum-exp
        powers = teacher_logits  # in its memory
        if temperature == 1.0:
            power_sum, power_log_sum_exp = 1.0, log_sum_exp
            powers.copy_(probs)
        elif temperature == 0.5:  # p^(1 / 0.5) needs no second exponential
            power_sum = torch.mul(probs, probs, out=powers).sum(-1, keepdim=True)
            power_log_sum_exp = 2 * log_sum_exp + power_sum.log()
        else:
            power_sum = torch.sub(logits, top, out=powers).mul_(1 / temperature).exp_().sum(-1, keepdim=True)
            power_log_sum_exp = top / temperature + power_sum.log()
        kl = cross - teacher_log_sum_exp + power_log_sum_exp
        losses[:, 1:2] = kl.clamp_(min=0.0)  # of equal models, rounding may leave -1e-7
    if grad is None:
        return
    slope = None if student.softcap is None else 1 - (logits / student.softcap).square_()
    ce_scale = objective.ce_weight * objective.grad_scale
    if teacher is None:
        logits_grad = torch.mul(probs, ce_scale, out=logits)
    else:
        kl_scale = objective.kl_weight * temperature * objective.grad_scale
        kl_grad = powers.mul_(kl_scale / power_sum).sub_(teacher_probs, alpha=kl_scale)
        logits_grad = torch.add(kl_grad, probs, alpha=ce_scale, out=logits)
    logits_grad.scatter_add_(-1, labels, logits_grad.new_full((1, 1), -ce_scale).expand_as(labels))
    if slope is not None:
        logits_grad.mul_(slope)
    if student.scale != 1.0:
        logits_grad.mul_(student.scale)
    if logits_grad.data_ptr() != grad.data_ptr():  # not in place
        grad.copy_(logits_grad)


def _logits(tile: Tile, buffer: torch.Tensor) -> torch.Tensor:
    """Returns the logits, in place where the tile has the dtype of the arithmetic."""
    logits = tile.products if tile.products.dtype == buffer.dtype else buffer.copy_(tile.products)
    if tile.scale != 1.0:
        logits.mul_(tile.scale)
    if tile.softcap is not None:
        logits.div_(tile.softcap).tanh_().mul_(tile.softcap)
    return logits


def _softmax(logits: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills `probs`. Returns the largest logit and the log-sum-exp of each row, `(rows, 1)`."""
    torch.softmax(logits, -1, out=probs)
    top = logits.amax(-1, keepdim=True)
    return top, top - probs.amax(-1, keepdim=True).log()  # the largest probability is 1 / sum(exp(logits - top))
