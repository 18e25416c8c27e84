# SPDX-License-Identifier: Apache-2.0
"""The tile kernel in Triton: one program for each row, one pass for the losses and one that writes the gradient.

The first pass keeps running maxima, so that it reads both rows once for all log-sum-exps and losses.
"""

import torch
import triton
import triton.language as tl

from .ce_kl_torch import Tile, TileObjective


# Columns of a row that one program holds at a time, and its warps: 8 columns a thread keep the two passes within the
# registers (tests/losses compiles them for sm_80 and sm_90 and looks for spills).
BLOCK_SIZE, NUM_WARPS = 2048, 8


@triton.jit
def load_logits(row, columns, vocab_size, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """fp32 logits of the `columns` of a row, -inf outside of the vocabulary."""
    logits = tl.load(row + columns, mask=columns < vocab_size, other=0.0).to(tl.float32) * SCALE
    if SOFTCAP is not None:
        logits = SOFTCAP * (2 * tl.sigmoid(2 * logits / SOFTCAP) - 1)  # SOFTCAP * tanh(logits / SOFTCAP)
    return tl.where(columns < vocab_size, logits, float("-inf"))


@triton.jit
def row_sums(
    student_row, teacher_row,  # pointers to the products of one token, (vocab_size,)
    label, label_logit,  # its id and the student's logit
    vocab_size, inverse_temperature, HAS_TEACHER: tl.constexpr,  # this and all below as in `ce_kl_rows`
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over both rows, with sums lane by lane and relative to the running maxima. Returns six scalars."""
    top, teacher_top = float("-inf"), float("-inf")
    exp_sum = tl.zeros([BLOCK], tl.float32)  # of exp(logit - top)
    weighted_sum = tl.zeros([BLOCK], tl.float32)  # of exp(logit - top) * logit
    power_sum = tl.zeros([BLOCK], tl.float32)  # of exp((logit - top) / τ)
    teacher_sum = tl.zeros([BLOCK], tl.float32)  # of exp((teacher_logit - teacher_top) / τ)
    cross_sum = tl.zeros([BLOCK], tl.float32)  # of exp((teacher_logit - teacher_top) / τ) * (teacher_logit - logit)
    num_above = tl.zeros([BLOCK], tl.int32)  # tokens that argmax prefers to the label
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = load_logits(student_row, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
        num_above += ((logits > label_logit) | ((logits == label_logit) & (columns < label))).to(tl.int32)
        new_top = tl.maximum(top, tl.max(logits))
        shrink, exps = tl.exp(top - new_top), tl.exp(logits - new_top)
        exp_sum = exp_sum * shrink + exps
        weighted_sum = weighted_sum * shrink + tl.where(columns < vocab_size, exps * logits, 0.0)
        if HAS_TEACHER:
            power_shrink = tl.exp((top - new_top) * inverse_temperature)
            power_sum = power_sum * power_shrink + tl.exp((logits - new_top) * inverse_temperature)
            teacher_logits = load_logits(teacher_row, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
            new_teacher_top = tl.maximum(teacher_top, tl.max(teacher_logits))
            teacher_shrink = tl.exp((teacher_top - new_teacher_top) * inverse_temperature)
            teacher_exps = tl.exp((teacher_logits - new_teacher_top) * inverse_temperature)
            teacher_sum = teacher_sum * teacher_shrink + teacher_exps
            difference = tl.where(columns < vocab_size, teacher_logits - logits, 0.0)
            cross_sum = cross_sum * teacher_shrink + teacher_exps * difference
            teacher_top = new_teacher_top
        top = new_top
    exp_total = tl.sum(exp_sum)
    log_sum_exp = top + tl.log(exp_total)
    entropy = log_sum_exp - tl.sum(weighted_sum) / exp_total
    power_log_sum_exp, teacher_log_sum_exp, kl = 0.0, 0.0, 0.0
    if HAS_TEACHER:
        teacher_total = tl.sum(teacher_sum)
        power_log_sum_exp = top * inverse_temperature + tl.log(tl.sum(power_sum))
        teacher_log_sum_exp = teacher_top * inverse_temperature + tl.log(teacher_total)
        cross = tl.sum(cross_sum) * inverse_temperature / teacher_total
        kl = cross + power_log_sum_exp - teacher_log_sum_exp
    return log_sum_exp, entropy, tl.sum(num_above) == 0, power_log_sum_exp, teacher_log_sum_exp, kl


@triton.jit
def ce_kl_rows(
    student_products,  # (num_tokens, vocab_size), contiguous; overwritten with the gradient if WITH_GRAD
    teacher_products,  # (num_tokens, vocab_size), contiguous; read if HAS_TEACHER
    labels,  # (num_tokens,)
    losses,  # (num_tokens, 4) fp32, written: cross-entropy, KL, entropy, top-1
    vocab_size,
    ce_scale,  # ce_weight * grad_scale
    kl_scale,  # kl_weight * τ * grad_scale
    inverse_temperature,  # 1 / τ
    HAS_TEACHER: tl.constexpr,
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,  # a softcap is None if there is none
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,  # columns at a time, a power of two
):  # fmt: skip
    """One program: the four losses of one row, then its gradient."""
    row = tl.program_id(0).to(tl.int64)
    student_row, teacher_row = student_products + row * vocab_size, teacher_products + row * vocab_size
    label = tl.load(labels + row)
    label_logit = tl.max(load_logits(student_row, label + tl.arange(0, 1), vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP))
    log_sum_exp, entropy, is_top, power_log_sum_exp, teacher_log_sum_exp, kl = row_sums(
        student_row, teacher_row, label, label_logit, vocab_size, inverse_temperature, HAS_TEACHER,
        STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, BLOCK,
    )  # fmt: skip
    tl.store(losses + row * 4, log_sum_exp - label_logit)
    tl.store(losses + row * 4 + 1, tl.where(kl < 0, 0.0, kl))  # rounding; nan stays nan
    tl.store(losses + row * 4 + 2, entropy)
    tl.store(losses + row * 4 + 3, is_top.to(tl.float32))
    if WITH_GRAD:
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = load_logits(student_row, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
            grad = ce_scale * (tl.exp(logits - log_sum_exp) - (columns == label).to(tl.float32))
            if HAS_TEACHER:
                teacher_logits = load_logits(teacher_row, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
                teacher_probs = tl.exp(teacher_logits * inverse_temperature - teacher_log_sum_exp)
                grad += kl_scale * (tl.exp(logits * inverse_temperature - power_log_sum_exp) - teacher_probs)
            if STUDENT_SOFTCAP is not None:
                capped = logits / STUDENT_SOFTCAP
                grad *= 1 - capped * capped
            grad = (grad * STUDENT_SCALE).to(student_row.dtype.element_ty)
            tl.store(student_row + columns, grad, mask=columns < vocab_size)


def ce_kl_tile_(
    student: Tile, teacher: Tile | None, labels: torch.Tensor, objective: TileObjective, *, with_grad: bool
) -> torch.Tensor:
    """[`~trl_selfdistill.losses.ce_kl_torch.ce_kl_tile_`] on CUDA, for fp32, bf16 and fp16 tiles."""
    num_tokens, vocab_size = student.products.shape
    losses = student.products.new_empty((num_tokens, 4), dtype=torch.float32)
    teacher_or_any = teacher or student  # not read without a teacher
    with torch.cuda.device_of(losses):  # Triton launches on the current device
        ce_kl_rows[(num_tokens,)](
            student.products,
            teacher_or_any.products,
            labels,
            losses,
            vocab_size,
            float(objective.ce_weight * objective.grad_scale),
            float(objective.kl_weight * objective.temperature * objective.grad_scale),
            float(1 / objective.temperature),
            HAS_TEACHER=teacher is not None,
            STUDENT_SCALE=float(student.scale),
            STUDENT_SOFTCAP=student.softcap,
            TEACHER_SCALE=float(teacher_or_any.scale),
            TEACHER_SOFTCAP=teacher_or_any.softcap,
            WITH_GRAD=with_grad,
            BLOCK=min(BLOCK_SIZE, triton.next_power_of_2(vocab_size)),
            num_warps=NUM_WARPS,
        )
    return losses
