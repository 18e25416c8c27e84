# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy plus KL to a teacher, from hidden states and LM heads (arXiv 2604.15574, equations 1-2)."""

import importlib.util
from math import inf
from typing import Literal, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from .ce_kl_torch import TileObjective
from .fused_head import fused_losses
from .lm_head import LMHead, ModelSide


IGNORE_INDEX = -100


class CEKLOutput(NamedTuple):
    """
    Output of [`linear_ce_kl`]: scalars over the labels other than -100. All but `loss` are detached.

    Args:
        loss (`torch.Tensor`): Sum of `ce_weight * CE + kl_weight * temperature**2 * KL` over `num_items_in_batch`.
        ce_loss (`torch.Tensor`): Mean cross-entropy at temperature 1, in nats per token.
        kl_loss (`torch.Tensor`): Mean KL(teacher ‖ student) at `temperature`, in nats per token, without factors.
        entropy (`torch.Tensor`): Mean entropy of the student at temperature 1, in nats.
        top1_accuracy (`torch.Tensor`): Share of the labels that are the student's most likely token, in [0, 1].
        num_tokens (`torch.Tensor`): Number of labels.
    """

    loss: torch.Tensor
    ce_loss: torch.Tensor
    kl_loss: torch.Tensor
    entropy: torch.Tensor
    top1_accuracy: torch.Tensor
    num_tokens: torch.Tensor


@torch.compiler.disable  # the number of chunks changes from batch to batch, and there is nothing to fuse
def linear_ce_kl(
    student_hidden_states: torch.Tensor,
    student_lm_head: LMHead,
    teacher_hidden_states: torch.Tensor | None,
    teacher_lm_head: LMHead | None,
    shift_labels: torch.Tensor,
    *,
    ce_weight: float = 1.0,
    kl_weight: float,
    temperature: float = 1.0,
    num_items_in_batch: int | torch.Tensor | None = None,
    impl: Literal["auto", "triton", "torch"] = "auto",
    logits_dtype: torch.dtype | None = None,
    memory_budget_mib: float = 1024.0,
) -> CEKLOutput:
    """
    Computes the cross-entropy of the labels plus the KL divergence from a teacher over the same tokens:

    ```python
    student_logits, teacher_logits = student_lm_head.logits(...), teacher_lm_head.logits(...)
    ce = F.cross_entropy(student_logits, shift_labels, reduction="none")
    kl = F.kl_div(log_softmax(student_logits / temperature), softmax(teacher_logits / temperature)).sum(-1)
    loss = (ce_weight * ce + kl_weight * temperature**2 * kl).sum() / num_items_in_batch
    ```

    The gradient with respect to the student's logits z, with the teacher's t and τ = `temperature`, is
    `ce_weight (softmax(z) - onehot) + kl_weight τ (softmax(z / τ) - softmax(t / τ))`.

    Args:
        student_hidden_states (`torch.Tensor` of shape `(num_tokens, student_hidden_size)`):
            The student's last hidden states. Pass the label positions only.
        student_lm_head ([`LMHead`]): The student's LM head.
        teacher_hidden_states (`torch.Tensor` of shape `(num_tokens, teacher_hidden_size)`, *optional*):
            The teacher's last hidden states at the same positions. No gradient flows to the teacher.
        teacher_lm_head ([`LMHead`], *optional*): The teacher's, of the same vocabulary; `None` if `kl_weight` is 0.
        shift_labels (`torch.Tensor` of shape `(num_tokens,)`): The next token's id at each position; -100 is ignored.
        ce_weight (`float`, *optional*, defaults to `1.0`): Weight of the cross-entropy.
        kl_weight (`float`): Weight of the KL. At 0 no work is done for the teacher.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature of both distributions in the KL.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Number of labels in the whole (accumulated, distributed) batch. Defaults to those in `shift_labels`.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"triton"` runs on CUDA, `"torch"` on any device; `"auto"` takes the first that runs.
        logits_dtype (`torch.dtype`, *optional*):
            `torch.float32` keeps the logits of half-precision products in fp32: a fifth of the gradients' rounding
            error, for 1.2 times the time on a GPU. By default they are rounded to the products' dtype.
        memory_budget_mib (`float`, *optional*, defaults to `1024.0`):
            Memory for the logits of a chunk, in MiB. A chunk has at least 1 token, and on a CPU at most 512.

    Returns:
        [`CEKLOutput`]. Without any label the loss is 0 with zero gradients, and still connected to the graph. A
        `ValueError` if a shape, vocabulary, label or option does not fit.
    """
    if not (0 <= ce_weight < inf and 0 <= kl_weight < inf and 0 < temperature < inf):
        raise ValueError(
            "`ce_weight`, `kl_weight` and `temperature` must be finite, >= 0, and `temperature` > 0, got "
            f"{ce_weight}, {kl_weight} and {temperature}."
        )
    vocab_size = len(student_lm_head.weight)
    student = _checked_side("student", student_hidden_states, student_lm_head, shift_labels, vocab_size)
    teacher = None
    if kl_weight:
        if teacher_hidden_states is None or teacher_lm_head is None:
            raise ValueError("The teacher's hidden states and head are needed, or `kl_weight=0`. Got None.")
        teacher = _checked_side("teacher", teacher_hidden_states, teacher_lm_head, shift_labels, vocab_size)
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"`impl` must be 'auto', 'triton' or 'torch', got {impl!r}.")
    if impl == "auto":
        runs_triton = student_hidden_states.is_cuda and torch.version.cuda and importlib.util.find_spec("triton")
        impl = "triton" if runs_triton and student_hidden_states.dtype != torch.float64 else "torch"
    num_items = None if num_items_in_batch is None else float(num_items_in_batch)  # one look, if it is on a GPU
    if num_items is not None and not 0 <= num_items < inf:
        raise ValueError(f"`num_items_in_batch` must be finite and >= 0, got {num_items}.")
    if shift_labels.dtype.is_floating_point or shift_labels.dtype == torch.bool:
        raise ValueError(f"`shift_labels` must be integers, got {shift_labels.dtype}.")
    if logits_dtype not in (None, torch.float32):
        raise ValueError(f"`logits_dtype` must be None or torch.float32, got {logits_dtype}.")
    if not 0 < memory_budget_mib < inf:
        raise ValueError(f"`memory_budget_mib` must be finite and > 0, got {memory_budget_mib}.")
    kept = shift_labels != IGNORE_INDEX
    outside = kept & ((shift_labels < 0) | (shift_labels >= vocab_size))
    # Once: each look at a GPU's values waits for all that it has to do
    counts = torch.stack([kept.sum(), outside.sum()])
    num_labels, num_outside = counts.tolist()
    if num_outside:
        raise ValueError(
            f"`shift_labels` must be {IGNORE_INDEX} or in [0, {vocab_size}), got {int(shift_labels[outside][0])}."
        )
    labels = shift_labels.long()
    if num_labels < len(labels):
        index = kept.nonzero().squeeze(1)
        labels = labels[index]
        student = student._replace(hidden_states=student.hidden_states[index])
        teacher = teacher and teacher._replace(hidden_states=teacher.hidden_states[index])
    denominator = max(1.0, num_labels if num_items is None else num_items)
    objective = TileObjective(ce_weight, kl_weight, temperature, grad_scale=1 / denominator)
    loss, sums = fused_losses(student, teacher, labels, objective, impl, logits_dtype, memory_budget_mib)
    return CEKLOutput(loss, *(sums.detach() / max(1, num_labels)).unbind(), counts[0])


def _checked_side(name: str, hidden_states: torch.Tensor, lm_head: LMHead, labels: torch.Tensor, vocab_size: int):
    """Returns the [`ModelSide`] called `name` if its shapes fit, with FSDP2 shards gathered, differentiably."""
    lm_head = lm_head.map_tensors(lambda x: x.full_tensor() if isinstance(x, DTensor) else x)
    hidden_size, tensors = lm_head.weight.size(-1), (hidden_states, lm_head.weight, labels)
    expected = [(len(labels), hidden_size), (vocab_size, hidden_size), (len(labels),)]
    if [tensor.shape for tensor in tensors] != expected or len({tensor.device for tensor in tensors}) > 1:
        found = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
        raise ValueError(
            f"`{name}_hidden_states` must have shape (num_tokens, hidden_size), `{name}_lm_head.weight` the shape "
            f"({vocab_size}, hidden_size), with the student's vocabulary, and `shift_labels` (num_tokens,), on one "
            f"device. Got {found}. Gather weights of DeepSpeed ZeRO-3 with `deepspeed.zero.GatheredParameters`."
        )
    if lm_head.bias is not None and lm_head.bias.shape != (vocab_size,):
        raise ValueError(f"`{name}_lm_head.bias` must have shape ({vocab_size},), got {tuple(lm_head.bias.shape)}.")
    if lm_head.logit_softcap is not None and not lm_head.logit_softcap > 0:
        raise ValueError(f"`{name}_lm_head.logit_softcap` must be > 0 or None, got {lm_head.logit_softcap}.")
    return ModelSide(hidden_states, lm_head)
