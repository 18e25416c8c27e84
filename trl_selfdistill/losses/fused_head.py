# SPDX-License-Identifier: Apache-2.0
"""Both LM heads, the losses and their gradients in one pass over chunks of tokens.

The loss is a weighted sum of the tokens' losses, known in the forward pass, so its gradient can be formed there: a
chunk is projected by both heads, the kernel overwrites the student's logits with their gradient, and two products turn
it into the gradients of the hidden states and of the head. That is four matrix products in all, the least there can
be, and the memory is that of one chunk; the backward pass only multiplies by the upstream gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .lm_head import LMHead, ModelSide
from .objective import LogitTransform, TileObjective


# Probabilities are as small as 1e-9, which fp16 cannot hold: its tiles carry gradients times this power of two, which
# the fp32 sums are divided by.
_FP16_GRAD_SCALE = 64.0

# cuBLAS adds to an fp32 matrix what it multiplies in half precision, where PyTorch lets it (2.8)
_ADDS_TO_FP32 = "dtype_out" in torch.ops.aten.addmm.overloads()

# A bias of -inf masks a token, and 0 * (-inf) would be nan. fp16 gets its lowest number instead
_LOWEST_LOGIT = -1e30


class HeadPass(NamedTuple):
    """How the pass is made: `tile_kernel` is `ce_kl_tile_` of one of the modules of `kernels`."""

    tile_kernel: Callable[..., torch.Tensor]
    product_dtype: torch.dtype
    memory_budget_bytes: int
    with_grad: bool


def fused_losses(
    student: ModelSide,
    teacher: ModelSide | None,
    labels: torch.Tensor,  # (num_tokens,), none ignored
    objective: TileObjective,
    head_pass: HeadPass,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The objective of all tokens, times its `grad_scale` and differentiable, and the sums of cross-entropy, divergence,
    entropy and top-1 over the tokens, of shape `(4,)`.
    """
    # Autograd sees the tensors that it is handed by themselves only
    head = student.lm_head
    inputs = (student.hidden_states, head.weight, head.bias)
    return _FusedHead.apply(*inputs, head, teacher, labels, objective, head_pass)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, lm_head, teacher, labels, objective, head_pass):
        needed = [head_pass.with_grad and needs_grad for needs_grad in ctx.needs_input_grad[:3]]
        ctx.dtypes = [x.dtype if x is not None else None for x in (hidden_states, weight, bias)]
        ctx.unscale = 1.0
        tile_objective = objective
        if head_pass.product_dtype == torch.float16:
            ctx.unscale = objective.grad_scale / _FP16_GRAD_SCALE
            tile_objective = objective._replace(grad_scale=_FP16_GRAD_SCALE)
        student = ModelSide(hidden_states, lm_head).detached()
        with torch.autocast(hidden_states.device.type, enabled=False):
            sums, grads = _run(student, teacher, labels, tile_objective, head_pass, needed)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(sums)
        return objective.total(sums), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        factor = upstream.float() * ctx.unscale if upstream.dtype != torch.float64 else upstream
        grads = [_scaled(x, factor, dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*grads, None, None, None, None, None)


def _scaled(grad: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if grad is None:
        return None
    if grad.device.type == "cpu" and factor == 1:  # elsewhere looking at it would wait for the device
        return grad.to(dtype)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _run(student, teacher, labels, objective, head_pass, needed):
    """The sums of the losses, and the gradients of the hidden states, the weight and the bias where `needed`."""
    dtype = head_pass.product_dtype
    sides = [student] if teacher is None else [student, teacher]
    num_tokens, vocab_size = len(labels), len(student.lm_head.weight)
    chunk_size = _chunk_size(num_tokens, len(sides) * vocab_size * dtype.itemsize, head_pass.memory_budget_bytes)
    tiles = [labels.new_empty((chunk_size, vocab_size), dtype=dtype) for _ in sides]
    # Autocast's casts, once instead of once a chunk
    heads = [side.lm_head.map_tensors(lambda x: x.to(dtype)) for side in sides]
    transforms = [LogitTransform(head.logit_scale, head.logit_softcap) for head in heads] + [None]

    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad_hidden = torch.empty_like(student.hidden_states, dtype=sum_dtype) if needed[0] else None
    grad_weight = None  # begins as the product of the first chunk: zeros would be written and read for nothing
    grad_bias = torch.zeros_like(student.lm_head.bias, dtype=sum_dtype) if needed[2] else None
    sums = torch.zeros(4, dtype=sum_dtype, device=labels.device)
    for start in range(0, num_tokens, chunk_size):
        chunk = slice(start, min(start + chunk_size, num_tokens))
        hidden_states = [side.hidden_states[chunk].to(dtype) for side in sides]
        products = zip(tiles, hidden_states, heads, strict=True)
        student_logits, teacher_logits, *_ = [
            *(_project_(tile[: len(x)], x, head) for tile, x, head in products),
            None,
        ]
        losses = head_pass.tile_kernel(
            student_logits, teacher_logits, labels[chunk], *transforms[:2], objective, with_grad=any(needed)
        )
        sums += losses.sum(0)
        grad_logits = student_logits  # written over them
        if needed[0]:
            grad_hidden[chunk] = grad_logits @ heads[0].weight
        if needed[1]:
            # bf16 has the range of fp32, so that a single product need not be kept in fp32; fp16 has not
            total_dtype = dtype if chunk_size == num_tokens and dtype != torch.float16 else sum_dtype
            grad_weight = _plus_product(grad_weight, grad_logits.T, hidden_states[0], total_dtype)
        if needed[2]:
            grad_bias += grad_logits.sum(0, dtype=sum_dtype)
    if needed[1] and num_tokens == 0:
        grad_weight = torch.zeros_like(student.lm_head.weight)
    return sums, (grad_hidden, grad_weight, grad_bias)


def _chunk_size(num_tokens: int, bytes_per_token: int, memory_budget_bytes: int) -> int:
    """Tokens of a chunk: as many as the budget holds, spread evenly over the chunks, in multiples of 64."""
    most = max(1, memory_budget_bytes // bytes_per_token)
    num_chunks = -(-num_tokens // most)
    even = -(-num_tokens // max(1, num_chunks))
    return min(most, -(-even // 64) * 64) if num_chunks > 1 else max(1, num_tokens)


def _project_(tile: torch.Tensor, hidden_states: torch.Tensor, lm_head: LMHead) -> torch.Tensor:
    """The logits, before scale and softcap, written into `tile`."""
    if lm_head.bias is None:
        return torch.mm(hidden_states, lm_head.weight.T, out=tile)
    torch.addmm(lm_head.bias, hidden_states, lm_head.weight.T, out=tile)
    return tile.clamp_(min=max(_LOWEST_LOGIT, torch.finfo(tile.dtype).min))


def _plus_product(
    total: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`total + first @ second` in `dtype`, in place; the product alone where `total` is `None`."""
    if dtype == first.dtype:
        return first @ second if total is None else total.addmm_(first, second)
    if first.is_cuda and _ADDS_TO_FP32:
        if total is None:
            return torch.mm(first, second, out_dtype=dtype)
        return torch.addmm(total, first, second, out_dtype=dtype, out=total)
    if first.dtype == torch.float16:  # the sums of many tokens may pass its largest number
        first, second = first.float(), second.float()
    product = first @ second
    return product.to(dtype) if total is None else total.add_(product)
