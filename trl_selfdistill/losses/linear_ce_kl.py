# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy plus KL to a teacher, from hidden states and LM heads (arXiv 2604.15574, equations 1-2)."""

import importlib.util
import os
from typing import Literal, NamedTuple

import torch

from .checks import check_finite as refuse_not_finite
from .checks import check_labels, check_options, check_side, check_teacher_is_given, check_vocabularies, check_weight
from .fused_head import HeadPass, fused_losses
from .lm_head import LMHead, ModelSide
from .objective import TileObjective
from .reference import reference_losses


IGNORE_INDEX = -100

# For the logits of one chunk. Each chunk reads and writes the gradient of the whole head, so that chunks of few tokens
# cost time; on a CPU more than this many gain nothing.
_DEFAULT_BUDGET_MIB = 1024.0
_ENOUGH_TOKENS_ON_CPU = 512


class CEKLOutput(NamedTuple):
    """
    Output of [`linear_ce_kl`]. All but `loss` are detached scalars, for logging.

    Args:
        loss (`torch.Tensor`):
            Differentiable scalar: the sum of `ce_weight * CE + kl_weight * temperature**2 * KL` over the counted
            tokens, divided by `num_items_in_batch`, or by `num_tokens` where that is `None`.
        ce_loss (`torch.Tensor`):
            Mean cross-entropy at temperature 1 over the counted tokens, in nats per token.
        kl_loss (`torch.Tensor`):
            Mean KL(teacher ‖ student), or the `divergence` asked for, at `temperature` over the counted tokens, in
            nats per token, without the factors `kl_weight` and `temperature**2`. Zero when `kl_weight` is zero.
        entropy (`torch.Tensor`):
            Mean entropy of the student's next-token distribution at temperature 1, in nats.
        top1_accuracy (`torch.Tensor`):
            Share of the counted tokens whose label is the student's most likely token, in [0, 1].
        num_tokens (`torch.Tensor`):
            How many tokens were counted (labels other than `ignore_index`).
    """

    loss: torch.Tensor
    ce_loss: torch.Tensor
    kl_loss: torch.Tensor
    entropy: torch.Tensor
    top1_accuracy: torch.Tensor
    num_tokens: torch.Tensor


def linear_ce_kl(
    student_hidden_states: torch.Tensor,  # (num_tokens, student_hidden_size), what the student's lm_head receives
    student_lm_head: LMHead,
    teacher_hidden_states: torch.Tensor | None,  # (num_tokens, teacher_hidden_size), gets no gradient
    teacher_lm_head: LMHead | None,
    shift_labels: torch.Tensor,  # (num_tokens,), the next token's id at each position
    *,
    ce_weight: float = 1.0,
    kl_weight: float,
    temperature: float = 1.0,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    divergence: Literal["forward_kl", "reverse_kl"] | float = "forward_kl",
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
    memory_budget_mib: float | None = None,
    check_finite: bool = False,
) -> CEKLOutput:
    """
    Cross-entropy of the labels plus the KL divergence from a teacher, over the same tokens and the same denominator:

    ```python
    student_logits, teacher_logits = student_lm_head.logits(...), teacher_lm_head.logits(...)
    ce = F.cross_entropy(student_logits, shift_labels)
    kl = F.kl_div(log_softmax(student_logits / temperature), softmax(teacher_logits / temperature))
    loss = (ce_weight * ce + kl_weight * temperature**2 * kl).sum() / num_items_in_batch
    ```

    The gradient with respect to the student's logits z, with the teacher's t, is
    `ce_weight (softmax(z) - onehot) + kl_weight τ (softmax(z / τ) - softmax(t / τ))`: `temperature` acts in the KL
    only.

    Args:
        student_hidden_states (`torch.Tensor` of shape `(num_tokens, student_hidden_size)`):
            The student's last hidden states. Pass the label positions only: nothing is gained from the others.
        student_lm_head ([`LMHead`]):
            The student's LM head, of `vocab_size` rows.
        teacher_hidden_states (`torch.Tensor` of shape `(num_tokens, teacher_hidden_size)`):
            The teacher's last hidden states at the same positions. May be `None` when `kl_weight` is 0.
        teacher_lm_head ([`LMHead`]):
            The teacher's LM head, of as many rows. May be `None` when `kl_weight` is 0.
        shift_labels (`torch.Tensor` of shape `(num_tokens,)`):
            Token ids; positions equal to `ignore_index` count in neither term.
        ce_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy.
        kl_weight (`float`):
            Weight λ of the KL. At 0 no work is done for the teacher.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature τ of both distributions in the KL.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Denominator: the number of labels in the whole (accumulated, distributed) batch. Defaults to those counted.
        ignore_index (`int`, *optional*, defaults to `-100`):
            Label of the positions to leave out.
        divergence (`str` or `float`, *optional*, defaults to `"forward_kl"`):
            What stands for KL: `"forward_kl"` is KL(teacher ‖ student), `"reverse_kl"` KL(student ‖ teacher), and a
            number β in (0, 1) the generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649),
            β KL(teacher ‖ m) + (1 - β) KL(student ‖ m) with m = β teacher + (1 - β) student.
        impl (`str`, *optional*, defaults to `"auto"`):
            `"triton"` (CUDA) and `"torch"` (any device) form the gradients in the forward pass, in chunks of tokens;
            `"reference"` is the formula above under autograd, with all logits in memory. `"auto"` takes the first of
            these that runs.
        memory_budget_mib (`float`, *optional*):
            Memory for logits, in MiB: it sets how many tokens make a chunk. Defaults to 1024, on a CPU to
            that of 512 tokens if it is less. The result does not depend on it.
        check_finite (`bool`, *optional*, defaults to `False`):
            Whether to refuse NaN and inf in the teacher's hidden states.

    Returns:
        [`CEKLOutput`]. With every position ignored the loss is 0, with zero gradients, and still connected to the
        graph.

    Raises:
        ValueError: If a shape, dtype, device, vocabulary, label or option does not fit.
    """
    check_options(ce_weight, kl_weight, temperature, divergence, memory_budget_mib)
    student, teacher = ModelSide(student_hidden_states, student_lm_head).gathered(), None
    device, vocab_size = student_hidden_states.device, student.lm_head.weight.size(0)
    autocast = torch.is_autocast_enabled(device.type)
    check_weight("student", student.lm_head.weight)
    counts = check_labels(shift_labels, ignore_index, vocab_size, num_items_in_batch)
    check_side("student", student, len(shift_labels), device, autocast)
    if kl_weight:
        check_teacher_is_given(teacher_hidden_states, teacher_lm_head)
        teacher = ModelSide(teacher_hidden_states, teacher_lm_head).detached().gathered()
        check_weight("teacher", teacher.lm_head.weight)
        check_side("teacher", teacher, len(shift_labels), device, autocast)
        check_vocabularies(student.lm_head, teacher.lm_head)
        if check_finite:
            refuse_not_finite("teacher_hidden_states", teacher_hidden_states)
    tile_kernel = _tile_kernel(impl, student_hidden_states)

    labels = shift_labels.long()
    if counts.num_tokens < len(labels):
        kept = labels != ignore_index
        labels, student = labels[kept], student._replace(hidden_states=student.hidden_states[kept])
        teacher = teacher and teacher._replace(hidden_states=teacher.hidden_states[kept])
    jsd_beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(divergence, divergence)
    objective = TileObjective(ce_weight, kl_weight, temperature, jsd_beta, grad_scale=1 / counts.denominator)
    if tile_kernel is None:
        sums = reference_losses(student, teacher, labels, objective).sum(0)
        loss = objective.total(sums)
    else:
        head_pass = _head_pass(tile_kernel, student, teacher is not None, memory_budget_mib)
        loss, sums = fused_losses(student, teacher, labels, objective, head_pass)
    means = sums.detach() / max(1, counts.num_tokens)
    return CEKLOutput(loss, *means.unbind(), torch.tensor(counts.num_tokens, device=device))


def _head_pass(tile_kernel, student: ModelSide, has_teacher: bool, memory_budget_mib: float | None) -> HeadPass:
    device, dtype = student.hidden_states.device.type, student.hidden_states.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    budget = int((memory_budget_mib or _DEFAULT_BUDGET_MIB) * 2**20)
    if memory_budget_mib is None and device == "cpu":
        bytes_per_token = (1 + has_teacher) * len(student.lm_head.weight) * dtype.itemsize
        budget = min(budget, _ENOUGH_TOKENS_ON_CPU * bytes_per_token)
    return HeadPass(tile_kernel, dtype, budget, torch.is_grad_enabled())


def _tile_kernel(impl: str, hidden_states: torch.Tensor):
    """The kernel behind `impl`, `None` for the reference."""
    if impl not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f"`impl` must be 'auto', 'triton', 'torch' or 'reference', got {impl!r}.")
    if impl == "reference":
        return None
    has_triton = importlib.util.find_spec("triton") is not None
    on_cuda = hidden_states.is_cuda and torch.version.cuda is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    runs_triton = has_triton and (on_cuda or interpreted) and hidden_states.dtype != torch.float64
    if impl == "triton" and not runs_triton:
        raise ValueError(
            f"`impl='triton'` needs Triton (installed: {has_triton}) and fp32, bf16 or fp16 tensors on a CUDA device, "
            f"got {hidden_states.dtype} on {hidden_states.device}. Take `impl='auto'`."
        )
    if impl == "triton" or (impl == "auto" and runs_triton and on_cuda):
        from .ce_kl_triton import ce_kl_tile_
    else:
        from .ce_kl_torch import ce_kl_tile_
    return ce_kl_tile_
