# SPDX-License-Identifier: Apache-2.0
"""The tile kernel in Triton: one program a row, one pass for the losses and one that writes the gradient in place.

The first pass keeps running maxima, so that the log-sum-exps of student (at temperature 1 and τ) and teacher, and the
sums that cross-entropy, divergence and entropy need, come from reading both rows once.
"""

import torch
import triton
import triton.language as tl

from .objective import LogitTransform, TileObjective


# Columns of a row that one program holds at a time, and its warps: 8 columns a thread keep the two passes within the
# registers (tests/kernels compiles them for sm_80 and sm_90 and looks for spills).
BLOCK_SIZE, NUM_WARPS = 2048, 8


@triton.jit
def load_logits(row, columns, vocab_size, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """fp32 logits of a block of one row, -inf outside of the vocabulary."""
    logits = tl.load(row + columns, mask=columns < vocab_size, other=0.0).to(tl.float32) * SCALE
    if SOFTCAP is not None:
        logits = SOFTCAP * (2 * tl.sigmoid(2 * logits / SOFTCAP) - 1)  # SOFTCAP * tanh(logits / SOFTCAP)
    return tl.where(columns < vocab_size, logits, float("-inf"))


@triton.jit
def load_log_probs(row, columns, vocab_size, inverse_temperature, log_sum, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Log-probabilities at the temperature, from the log-sum-exp at the temperature."""
    return load_logits(row, columns, vocab_size, SCALE, SOFTCAP) * inverse_temperature - log_sum


@triton.jit
def row_sums(
    student_row, teacher_row, label, label_logit, vocab_size, inverse_temperature,
    HAS_TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr, SQUARES: tl.constexpr,
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over both rows. The sums are kept lane by lane and relative to the running maxima."""
    top, teacher_top = float("-inf"), float("-inf")
    exp_sum = tl.zeros([BLOCK], tl.float32)  # of exp(logit - top)
    weighted_sum = tl.zeros([BLOCK], tl.float32)  # of exp(logit - top) * logit
    power_sum = tl.zeros([BLOCK], tl.float32)  # of exp((logit - top) / τ)
    teacher_sum = tl.zeros([BLOCK], tl.float32)
    cross_sum = tl.zeros([BLOCK], tl.float32)  # of the logits' difference under the divergence's first argument
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
            if SQUARES:
                powers, power_shrink = exps * exps, shrink * shrink
            else:
                powers = tl.exp((logits - new_top) * inverse_temperature)
                power_shrink = tl.exp((top - new_top) * inverse_temperature)
            power_sum = power_sum * power_shrink + powers
            teacher_logits = load_logits(teacher_row, columns, vocab_size, TEACHER_SCALE, TEACHER_SOFTCAP)
            new_teacher_top = tl.maximum(teacher_top, tl.max(teacher_logits))
            teacher_shrink = tl.exp((teacher_top - new_teacher_top) * inverse_temperature)
            teacher_exps = tl.exp((teacher_logits - new_teacher_top) * inverse_temperature)
            teacher_sum = teacher_sum * teacher_shrink + teacher_exps
            difference = tl.where(columns < vocab_size, teacher_logits - logits, 0.0)
            if DIVERGENCE == 0:
                cross_sum = cross_sum * teacher_shrink + teacher_exps * difference
            else:
                cross_sum = cross_sum * power_shrink - powers * difference
            teacher_top = new_teacher_top
        top = new_top
    exp_total, power_total, teacher_total = tl.sum(exp_sum), tl.sum(power_sum), tl.sum(teacher_sum)
    log_sum = top + tl.log(exp_total)
    entropy = log_sum - tl.sum(weighted_sum) / exp_total
    power_log_sum, teacher_log_sum, kl = 0.0, 0.0, 0.0
    if HAS_TEACHER:
        power_log_sum = top * inverse_temperature + tl.log(power_total)
        teacher_log_sum = teacher_top * inverse_temperature + tl.log(teacher_total)
        cross = tl.sum(cross_sum) * inverse_temperature
        if DIVERGENCE == 0:
            kl = cross / teacher_total + power_log_sum - teacher_log_sum
        else:
            kl = cross / power_total + teacher_log_sum - power_log_sum
    return log_sum, entropy, tl.sum(num_above) == 0, power_log_sum, teacher_log_sum, kl


@triton.jit
def log_mixture(log_probs, teacher_log_probs, jsd_beta):
    """log(β teacher + (1 - β) student); where both are zero, the student's, so that their ratio is 1."""
    mixture = jsd_beta * tl.exp(teacher_log_probs) + (1 - jsd_beta) * tl.exp(log_probs)
    return tl.where(mixture > 0, tl.log(mixture), log_probs)


@triton.jit
def mixture_kls(
    student_row, teacher_row, vocab_size, inverse_temperature, jsd_beta, power_log_sum, teacher_log_sum,
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL(student ‖ mixture) and KL(teacher ‖ mixture): the mixture takes both normalisers, hence a pass of its own."""
    student_sum, teacher_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_probs = load_log_probs(
            student_row, columns, vocab_size, inverse_temperature, power_log_sum, STUDENT_SCALE, STUDENT_SOFTCAP
        )
        teacher_log_probs = load_log_probs(
            teacher_row, columns, vocab_size, inverse_temperature, teacher_log_sum, TEACHER_SCALE, TEACHER_SOFTCAP
        )
        log_mix = log_mixture(log_probs, teacher_log_probs, jsd_beta)
        student_term = tl.exp(log_probs) * (log_probs - log_mix)
        teacher_term = tl.exp(teacher_log_probs) * (teacher_log_probs - log_mix)
        student_sum += tl.where(columns < vocab_size, student_term, 0.0)
        teacher_sum += tl.where(columns < vocab_size, teacher_term, 0.0)
    return tl.sum(student_sum), tl.sum(teacher_sum)


@triton.jit
def write_gradient(
    student_row, teacher_row, label, vocab_size, ce_scale, kl_scale, inverse_temperature, jsd_beta,
    log_sum, power_log_sum, teacher_log_sum, student_kl,
    HAS_TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr,
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrites the student's row with the gradient."""
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = load_logits(student_row, columns, vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP)
        grad = ce_scale * (tl.exp(logits - log_sum) - (columns == label).to(tl.float32))
        if HAS_TEACHER:
            log_probs = logits * inverse_temperature - power_log_sum
            teacher_log_probs = load_log_probs(
                teacher_row, columns, vocab_size, inverse_temperature, teacher_log_sum, TEACHER_SCALE, TEACHER_SOFTCAP
            )
            probs = tl.exp(log_probs)
            if DIVERGENCE == 0:
                grad += kl_scale * (probs - tl.exp(teacher_log_probs))
            elif DIVERGENCE == 1:
                grad += kl_scale * probs * (log_probs - teacher_log_probs - student_kl)
            else:
                log_mix = log_mixture(log_probs, teacher_log_probs, jsd_beta)
                grad += kl_scale * (1 - jsd_beta) * probs * (log_probs - log_mix - student_kl)
        if STUDENT_SOFTCAP is not None:
            capped = logits / STUDENT_SOFTCAP
            grad *= 1 - capped * capped
        tl.store(
            student_row + columns, (grad * STUDENT_SCALE).to(student_row.dtype.element_ty), mask=columns < vocab_size
        )


@triton.jit
def ce_kl_rows(
    student_tile, teacher_tile, labels, losses, student_stride, teacher_stride, vocab_size,
    ce_scale,  # ce_weight * grad_scale
    kl_scale,  # kl_weight * temperature * grad_scale
    inverse_temperature, jsd_beta,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,  # 0: forward KL, 1: reverse KL, 2: generalized JSD
    SQUARES: tl.constexpr,  # temperature 0.5: p^(1 / 0.5) is a square, no second exponential
    STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the four losses of one row, then its gradient."""
    row = tl.program_id(0).to(tl.int64)
    student_row, teacher_row = student_tile + row * student_stride, teacher_tile + row * teacher_stride
    label = tl.load(labels + row)
    label_logit = tl.max(load_logits(student_row, label + tl.arange(0, 1), vocab_size, STUDENT_SCALE, STUDENT_SOFTCAP))
    log_sum, entropy, is_top, power_log_sum, teacher_log_sum, kl = row_sums(
        student_row, teacher_row, label, label_logit, vocab_size, inverse_temperature,
        HAS_TEACHER, DIVERGENCE, SQUARES, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, BLOCK,
    )  # fmt: skip
    divergence = kl
    if DIVERGENCE == 2:
        kl, teacher_kl = mixture_kls(
            student_row, teacher_row, vocab_size, inverse_temperature, jsd_beta, power_log_sum, teacher_log_sum,
            STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, BLOCK,
        )  # fmt: skip
        divergence = jsd_beta * teacher_kl + (1 - jsd_beta) * kl
    tl.store(losses + row * 4, log_sum - label_logit)
    tl.store(losses + row * 4 + 1, tl.where(divergence < 0, 0.0, divergence))  # rounding; nan stays nan
    tl.store(losses + row * 4 + 2, entropy)
    tl.store(losses + row * 4 + 3, is_top.to(tl.float32))
    if WITH_GRAD:
        write_gradient(
            student_row, teacher_row, label, vocab_size, ce_scale, kl_scale, inverse_temperature, jsd_beta,
            log_sum, power_log_sum, teacher_log_sum, kl,
            HAS_TEACHER, DIVERGENCE, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_SCALE, TEACHER_SOFTCAP, BLOCK,
        )  # fmt: skip


def ce_kl_tile_(
    student_tile: torch.Tensor,
    teacher_tile: torch.Tensor | None,
    labels: torch.Tensor,
    student_transform: LogitTransform,
    teacher_transform: LogitTransform | None,
    objective: TileObjective,
    *,
    with_grad: bool,
) -> torch.Tensor:
    """[`~trl_selfdistill.losses.ce_kl_torch.ce_kl_tile_`] on CUDA, for fp32, bf16 and fp16 tiles."""
    num_tokens, vocab_size = student_tile.shape
    losses = torch.empty((num_tokens, 4), dtype=torch.float32, device=student_tile.device)
    has_teacher = teacher_tile is not None
    teacher_transform = teacher_transform or LogitTransform()
    ce_kl_rows[(num_tokens,)](
        student_tile,
        teacher_tile if has_teacher else student_tile,  # not read without a teacher
        labels,
        losses,
        student_tile.stride(0),
        teacher_tile.stride(0) if has_teacher else 0,
        vocab_size,
        float(objective.ce_weight * objective.grad_scale),
        float(objective.kl_weight * objective.temperature * objective.grad_scale),
        float(1 / objective.temperature),
        float(objective.jsd_beta),
        HAS_TEACHER=has_teacher,
        DIVERGENCE={0: 0, 1: 1}.get(objective.jsd_beta, 2) if has_teacher else 0,
        SQUARES=objective.temperature == 0.5,
        STUDENT_SCALE=float(student_transform.scale),
        STUDENT_SOFTCAP=student_transform.softcap,
        TEACHER_SCALE=float(teacher_transform.scale),
        TEACHER_SOFTCAP=teacher_transform.softcap,
        WITH_GRAD=with_grad,
        BLOCK=min(BLOCK_SIZE, triton.next_power_of_2(vocab_size)),
        num_warps=NUM_WARPS,
    )
    return losses
