# SPDX-License-Identifier: Apache-2.0
"""The tile kernel in Triton: one program for each row, one pass for the losses and one that writes the gradient.

The first pass keeps running maxima, so that it reads both rows once for all log-sum-exps and losses. Each thread keeps
its own, of the columns that it reads, and they meet after the last column: a maximum of the whole block would make all
threads wait for each other at every step, and that took twice as long (docs/fused_head.md).
"""

import torch
import triton
import triton.language as tl

from .ce_kl_torch import Tile, TileObjective


WIDTH_BYTES = 16  # adjacent columns of a thread at a time: one load
NUM_WARPS = 16
SCALED_ELEMENTS = 4096  # of a program that scales
LOWEST = tl.constexpr(-1e30)  # logit of a column outside of the vocabulary; of -inf the differences would be nan


@triton.jit
def load_logits(row, columns, vocab_size, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """fp32 logits of the `columns` of a row, `LOWEST` outside of the vocabulary."""
    logits = tl.load(row + columns, mask=columns < vocab_size, other=0.0).to(tl.float32) * SCALE
    if SOFTCAP is not None:
        logits = SOFTCAP * (2 * tl.sigmoid(2 * logits / SOFTCAP) - 1)  # SOFTCAP * tanh(logits / SOFTCAP)
    return tl.where(columns < vocab_size, logits, LOWEST)


@triton.jit
def power(probs, logits, INVERSE_TEMPERATURE: tl.constexpr):
    """`exp(logits / τ)`, of which `probs` is that of τ = 1: no second exponential at the usual temperatures."""
    if INVERSE_TEMPERATURE == 1.0:
        return probs
    elif INVERSE_TEMPERATURE == 2.0:
        return probs * probs
    else:
        return tl.exp(logits * INVERSE_TEMPERATURE)


@triton.jit
def row_sums(
    student_row, teacher_row,  # pointers to the products of one token, (vocab_size,)
    first_columns,  # (LANES, WIDTH); a thread has a lane
    label, label_logit,  # its id and the student's logit
    vocab_size, INVERSE_TEMPERATURE: tl.constexpr, HAS_TEACHER: tl.constexpr,  # this and all below as in `ce_kl_rows`
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One pass over both rows, with sums of each lane relative to its running maxima. Returns six scalars."""
    top = tl.full([LANES], LOWEST, tl.float32)
    early_top = tl.full([LANES], LOWEST, tl.float32)  # of the columns before the label
    teacher_top = tl.full([LANES], LOWEST, tl.float32)
    exp_sum = tl.zeros([LANES], tl.float32)  # of exp(logit - top)
    weighted_sum = tl.zeros([LANES], tl.float32)  # of exp(logit - top) * logit
    power_sum = tl.zeros([LANES], tl.float32)  # of exp((logit - top) / τ)
    teacher_sum = tl.zeros([LANES], tl.float32)  # of exp((teacher_logit - teacher_top) / τ)
    cross_sum = tl.zeros([LANES], tl.float32)  # of exp((teacher_logit - teacher_top) / τ) * (teacher_logit - logit)
    for start in range(0, vocab_size, LANES * WIDTH):
        columns = start + first_columns
        logits = load_logits(student_row, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
        early_top = tl.maximum(early_top, tl.max(tl.where(columns < label, logits, LOWEST), 1))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink, exps = tl.exp(top - new_top), tl.exp(logits - new_top[:, None])
        exp_sum = exp_sum * shrink + tl.sum(exps, 1)
        weighted_sum = weighted_sum * shrink + tl.sum(exps * logits, 1)
        if HAS_TEACHER:
            power_shrink = power(shrink, top - new_top, INVERSE_TEMPERATURE)
            powers = power(exps, logits - new_top[:, None], INVERSE_TEMPERATURE)
            power_sum = power_sum * power_shrink + tl.sum(powers, 1)
            teacher_logits = load_logits(teacher_row, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
            new_teacher_top = tl.maximum(teacher_top, tl.max(teacher_logits, 1))
            teacher_shrink = tl.exp((teacher_top - new_teacher_top) * INVERSE_TEMPERATURE)
            teacher_exps = tl.exp((teacher_logits - new_teacher_top[:, None]) * INVERSE_TEMPERATURE)
            teacher_sum = teacher_sum * teacher_shrink + tl.sum(teacher_exps, 1)
            cross_sum = cross_sum * teacher_shrink + tl.sum(teacher_exps * (teacher_logits - logits), 1)
            teacher_top = new_teacher_top
        top = new_top
    row_top = tl.max(top)
    shrink = tl.exp(top - row_top)
    exp_total = tl.sum(exp_sum * shrink)
    log_sum_exp = row_top + tl.log(exp_total)
    entropy = log_sum_exp - tl.sum(weighted_sum * shrink) / exp_total
    # As argmax, which takes the first of equal logits
    is_top = (row_top == label_logit) & (tl.max(early_top) < label_logit)
    power_log_sum_exp, teacher_log_sum_exp, kl = 0.0, 0.0, 0.0
    if HAS_TEACHER:
        power_total = tl.sum(power_sum * power(shrink, top - row_top, INVERSE_TEMPERATURE))
        power_log_sum_exp = row_top * INVERSE_TEMPERATURE + tl.log(power_total)
        teacher_row_top = tl.max(teacher_top)
        teacher_shrink = tl.exp((teacher_top - teacher_row_top) * INVERSE_TEMPERATURE)
        teacher_total = tl.sum(teacher_sum * teacher_shrink)
        teacher_log_sum_exp = teacher_row_top * INVERSE_TEMPERATURE + tl.log(teacher_total)
        cross = tl.sum(cross_sum * teacher_shrink) * INVERSE_TEMPERATURE / teacher_total
        kl = cross + power_log_sum_exp - teacher_log_sum_exp
    return log_sum_exp, entropy, is_top, power_log_sum_exp, teacher_log_sum_exp, kl


@triton.jit
def ce_kl_rows(
    student_products,  # (num_tokens, vocab_size), contiguous
    teacher_products,  # the same; read if HAS_TEACHER
    grads,  # the same, written if WITH_GRAD; may be the student's products
    labels,  # (num_tokens,)
    losses,  # (num_tokens, 4) fp32, written: cross-entropy, KL, entropy, top-1
    vocab_size,
    ce_scale,  # ce_weight * grad_scale
    kl_scale,  # kl_weight * τ * grad_scale
    INVERSE_TEMPERATURE: tl.constexpr,  # 1 / τ
    HAS_TEACHER: tl.constexpr,
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,  # a softcap is None if there is none
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,  # LANES * WIDTH columns at a time, powers of two
):  # fmt: skip
    """One program: the four losses of one row, then its gradient."""
    row = tl.program_id(0).to(tl.int64)
    student_row, teacher_row = student_products + row * vocab_size, teacher_products + row * vocab_size
    grad_row = grads + row * vocab_size
    first_columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    label = tl.load(labels + row)
    label_logit = tl.max(load_logits(student_row, label + tl.arange(0, 1), vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP))
    log_sum_exp, entropy, is_top, power_log_sum_exp, teacher_log_sum_exp, kl = row_sums(
        student_row, teacher_row, first_columns, label, label_logit, vocab_size, INVERSE_TEMPERATURE, HAS_TEACHER,
        STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, LANES, WIDTH,
    )  # fmt: skip
    tl.store(losses + row * 4, log_sum_exp - label_logit)
    tl.store(losses + row * 4 + 1, tl.where(kl < 0, 0.0, kl))  # rounding; nan stays nan
    tl.store(losses + row * 4 + 2, entropy)
    tl.store(losses + row * 4 + 3, is_top.to(tl.float32))
    if WITH_GRAD:
        # exp(logit / τ) is a power of the probability, times this: at most the number of columns where it is used
        power_factor = tl.exp(log_sum_exp * INVERSE_TEMPERATURE - power_log_sum_exp)
        for start in range(0, vocab_size, LANES * WIDTH):
            columns = start + first_columns
            logits = load_logits(student_row, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
            probs = tl.exp(logits - log_sum_exp)
            grad = ce_scale * (probs - (columns == label).to(tl.float32))
            if HAS_TEACHER:
                teacher_logits = load_logits(teacher_row, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
                teacher_probs = tl.exp(teacher_logits * INVERSE_TEMPERATURE - teacher_log_sum_exp)
                if INVERSE_TEMPERATURE == 1.0 or INVERSE_TEMPERATURE == 2.0:
                    powers = power(probs, logits, INVERSE_TEMPERATURE) * power_factor
                else:
                    powers = tl.exp(logits * INVERSE_TEMPERATURE - power_log_sum_exp)
                grad += kl_scale * (powers - teacher_probs)
            if STUDENT_SOFTCAP is not None:
                capped = logits / STUDENT_SOFTCAP
                grad *= 1 - capped * capped
            grad = (grad * STUDENT_SCALE).to(grad_row.dtype.element_ty)
            tl.store(grad_row + columns, grad, mask=columns < vocab_size)


def ce_kl_tile_(
    student: Tile, teacher: Tile | None, labels: torch.Tensor, objective: TileObjective, grad: torch.Tensor | None
) -> torch.Tensor:
    """[`~trl_selfdistill.losses.ce_kl_torch.ce_kl_tile_`] on CUDA, for fp32, bf16 and fp16 tiles."""
    num_tokens, vocab_size = student.products.shape
    losses = student.products.new_empty((num_tokens, 4), dtype=torch.float32)
    teacher_or_any = teacher or student  # not read without a teacher
    width = WIDTH_BYTES // student.products.itemsize
    with torch.cuda.device_of(losses):  # Triton launches on the current device
        ce_kl_rows[(num_tokens,)](
            student.products,
            teacher_or_any.products,
            student.products if grad is None else grad,
            labels,
            losses,
            vocab_size,
            float(objective.ce_weight * objective.grad_scale),
            float(objective.kl_weight * objective.temperature * objective.grad_scale),
            INVERSE_TEMPERATURE=float(1 / objective.temperature),
            HAS_TEACHER=teacher is not None,
            STUDENT_SCALE=float(student.scale),
            STUDENT_SOFTCAP=student.softcap,
            TEACHER_SCALE=float(teacher_or_any.scale),
            TEACHER_SOFTCAP=teacher_or_any.softcap,
            WITH_GRAD=grad is not None,
            LANES=min(32 * NUM_WARPS, triton.next_power_of_2(triton.cdiv(vocab_size, width))),
            WIDTH=width,
            num_warps=NUM_WARPS,
        )
    return losses


@triton.jit
def scale_elements(source, target, upstream, scale, num_elements, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """`target = source * upstream * scale`, of `num_elements` each; a factor of 1 in place moves no memory."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(upstream).to(tl.float32) * scale
    size = num_elements
    if IN_PLACE:
        size = tl.where(factor == 1, 0, num_elements)
    values = tl.load(source + offsets, mask=offsets < size).to(tl.float32) * factor
    tl.store(target + offsets, values, mask=offsets < size)


def scaled(grad: torch.Tensor, upstream: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """[`~trl_selfdistill.losses.ce_kl_torch.scaled`] of dense tensors, fast for two dtypes, too."""
    with torch.cuda.device_of(grad):
        grid = (triton.cdiv(grad.numel(), SCALED_ELEMENTS),)
        scale_elements[grid](grad, out, upstream, scale, grad.numel(), IN_PLACE=out is grad, BLOCK=SCALED_ELEMENTS)
