# SPDX-License-Identifier: Apache-2.0
"""Both LM heads, the losses and their gradients in one pass over chunks of tokens.

The loss is a sum over tokens whose weights are known in the forward pass, so the gradient can be formed there. Each
chunk is projected by both heads, the kernel overwrites the student's logits with their gradient, and two products turn
it into the gradients of the hidden states and of the head. That is four matrix products in all, the least there can
be, and the memory is that of one chunk. The backward pass only multiplies by the upstream gradient.
"""

import functools
import math

import torch

from .ce_kl_torch import Tile, TileObjective
from .lm_head import LMHead, ModelSide


# Each chunk reads and writes the gradient of the whole head; on a CPU larger chunks than this gain nothing
_MOST_TOKENS_ON_CPU = 512

# Gradients are as small as 1e-9, which fp16 cannot hold: its tiles carry gradients times this power of two, and the
# division by the number of tokens follows in the backward pass.
_FP16_GRAD_SCALE = 64.0

# cuBLAS writes half-precision products to an fp32 matrix, or adds them to it, where PyTorch lets it (2.8)
_WRITES_FP32 = "dtype_out" in torch.ops.aten.addmm.overloads()

# A bias of -inf masks a token, and 0 * (-inf) would be nan. fp16 gets its lowest number instead
_LOWEST_LOGIT = -1e30


def fused_losses(
    student: ModelSide,
    teacher: ModelSide | None,
    labels: torch.Tensor,  # (num_tokens,), none ignored
    objective: TileObjective,
    impl: str,  # "triton" or "torch"
    logits_dtype: torch.dtype | None,
    memory_budget_mib: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the objective, differentiable, and the tokens' sums `(4,)` of cross-entropy, KL, entropy and top-1."""
    if impl == "triton":
        from .ce_kl_triton import ce_kl_tile_, scaled
    else:
        from .ce_kl_torch import ce_kl_tile_, scaled
    inputs = (student.hidden_states, student.lm_head.weight, student.lm_head.bias)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    # The products run in autocast's dtype if it is enabled, or else in the wider of their factors'
    dtype, device_type = torch.promote_types(inputs[0].dtype, inputs[1].dtype), labels.device.type
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device_type)
    logits_dtype = torch.promote_types(dtype, logits_dtype or dtype)
    if device_type != "cuda" or not _WRITES_FP32:
        dtype = logits_dtype  # of both factors, too
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tile_objective = objective._replace(grad_scale=_FP16_GRAD_SCALE) if dtype == torch.float16 else objective
    sides = [student] if teacher is None else [student, teacher]
    bytes_per_logit = len(sides) * logits_dtype.itemsize + (dtype.itemsize if logits_dtype != dtype else 0)
    chunk_size = _chunk_size(labels, len(student.lm_head.weight) * bytes_per_logit, memory_budget_mib)
    # bf16 has the range of fp32, which fp16 has not: a gradient that is wanted in bf16 is summed in it (the logits'
    # rounding is the larger error, docs/fused_head.md), and a single product is kept in it
    in_bf16 = dtype == torch.bfloat16 and (inputs[1].dtype == dtype or chunk_size == len(labels))
    weight_dtype = dtype if in_bf16 else sum_dtype
    new = torch.empty_like if len(labels) else torch.zeros_like
    grads = [
        new(x, dtype=grad_dtype) if is_needed else None
        for x, grad_dtype, is_needed in zip(inputs, (dtype, weight_dtype, sum_dtype), needed, strict=True)
    ]
    sums = torch.zeros(4, dtype=sum_dtype, device=labels.device)
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        # Autocast's casts, once instead of once a chunk
        heads = [side.lm_head.map_tensors(lambda x: x.to(dtype)) for side in sides]
        buffers = [labels.new_empty((chunk_size, len(head.weight)), dtype=logits_dtype) for head in heads]
        # The gradient takes the student's place, unless the products need another dtype
        grad_buffer = buffers[0] if logits_dtype == dtype else torch.empty_like(buffers[0], dtype=dtype)
        for start in range(0, len(labels), chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden_states = [side.hidden_states[chunk].to(dtype) for side in sides]
            tiles = [_project(*parts) for parts in zip(hidden_states, heads, buffers, strict=True)]
            tiles += [None] * (2 - len(tiles))
            grad_logits = grad_buffer[: len(labels[chunk])] if any(needed) else None
            sums += ce_kl_tile_(*tiles, labels[chunk], tile_objective, grad_logits).sum(0)
            if needed[0]:
                torch.mm(grad_logits, heads[0].weight, out=grads[0][chunk])
            if needed[1]:
                _add_product_(grads[1], grad_logits.T, hidden_states[0], beta=0 if start == 0 else 1)
            if needed[2]:
                bias_grad = grad_logits.sum(0, dtype=sum_dtype)
                grads[2] = bias_grad if start == 0 else grads[2] + bias_grad
    scaled = functools.partial(scaled, scale=objective.grad_scale / tile_objective.grad_scale)
    return _KnownGradients.apply(objective.total(sums), grads, scaled, *inputs), sums


class _KnownGradients(torch.autograd.Function):
    """Makes `loss` a function of `inputs` with the gradients `grads`, scaled; `None` for those not needed."""

    @staticmethod
    def forward(ctx, loss, grads, scaled, *inputs):
        ctx.save_for_backward(*grads)
        ctx.scaled, ctx.dtypes = scaled, [x if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        # With `retain_graph=True` there may be another pass, which needs them as they are
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        results = []
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if grad is not None:
                out = grad if in_place and grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
                ctx.scaled(grad, upstream, out=out)
            results.append(None if grad is None else out)
        return None, None, None, *results


def _chunk_size(labels: torch.Tensor, bytes_per_token: int, memory_budget_mib: float) -> int:
    """Returns the tokens of a chunk: as many as fit, spread evenly over the chunks, in multiples of 64."""
    most = max(1, int(memory_budget_mib * 2**20) // bytes_per_token)
    if labels.device.type == "cpu":
        most = min(most, _MOST_TOKENS_ON_CPU)
    num_tokens = max(1, len(labels))
    evenly = math.ceil(num_tokens / math.ceil(num_tokens / most))
    return min(num_tokens, most, 64 * math.ceil(evenly / 64))


def _project(hidden_states: torch.Tensor, lm_head: LMHead, buffer: torch.Tensor) -> Tile:
    products = buffer[: len(hidden_states)]
    if lm_head.bias is not None:
        products.copy_(lm_head.bias)
    _add_product_(products, hidden_states, lm_head.weight.T, beta=0 if lm_head.bias is None else 1)
    if lm_head.bias is not None:
        products.clamp_(min=max(_LOWEST_LOGIT, torch.finfo(products.dtype).min))
    return Tile(products, lm_head.logit_scale, lm_head.logit_softcap)


def _add_product_(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, beta: int) -> None:
    """Writes `beta * total + first @ second` to `total`, which may be of a wider dtype."""
    if total.dtype == first.dtype:
        total.addmm_(first, second, beta=beta)
    elif first.is_cuda and _WRITES_FP32:
        torch.addmm(total, first, second, beta=beta, out_dtype=total.dtype, out=total)
    elif first.dtype == torch.float16:  # the sums of many tokens may pass its largest number
        total.addmm_(first.float(), second.float(), beta=beta)
    elif beta:
        total += first @ second
    else:
        total.copy_(first @ second)
