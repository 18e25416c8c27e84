# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy plus KL to a teacher, from hidden states and LM heads (arXiv 2604.15574, equations 1-2).

The trainers call it with the label positions only. Tokens go through the heads in chunks that are recomputed in the
backward pass, so that no `(num_tokens, vocab_size)` tensor is held, however long the sequences are.
"""

from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


IGNORE_INDEX = -100

# Logits of one chunk, in elements: 2**27 fp32 values are 512 MiB, 1,024 tokens of a vocabulary of 128k.
_CHUNK_ELEMENTS = 2**27


class LMHead(NamedTuple):
    """
    The last layer of a causal language model: `softcap(logit_scale * (hidden_states @ weight.T + bias))`.

    Args:
        weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`):
            Output embedding, the same tensor as the input embedding where they are tied.
        bias (`torch.Tensor` of shape `(vocab_size,)`, *optional*):
            Bias of the projection.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplies the logits (Cohere, Granite, Falcon-H1 ...).
        logit_softcap (`float`, *optional*):
            If set, the scaled logits `z` become `logit_softcap * tanh(z / logit_softcap)` (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """fp32 (fp64 for fp64 inputs) logits of shape `(num_tokens, vocab_size)`; the product honours autocast."""
        logits = F.linear(hidden_states, self.weight, self.bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


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
            Mean KL(teacher ‖ student) at `temperature` over the counted tokens, in nats per token, without the factors
            `kl_weight` and `temperature**2`. Zero when `kl_weight` is zero.
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
    impl: Literal["auto", "torch"] = "auto",
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
        impl (`str`, *optional*, defaults to `"auto"`):
            Implementation: `"torch"`, chunked PyTorch for any device, is what `"auto"` takes.

    Returns:
        [`CEKLOutput`]. With every position ignored the loss is 0, with zero gradients, and still connected to the
        graph.

    Raises:
        ValueError: If a shape, a vocabulary, a label, a weight, the temperature or `impl` does not fit.
    """
    if impl not in ("auto", "torch"):
        raise ValueError(f"`impl` must be 'auto' or 'torch', got {impl!r}.")
    _check_options(ce_weight, kl_weight, temperature)
    _check_tensors(student_hidden_states, student_lm_head, shift_labels, ignore_index)
    if kl_weight:
        _check_teacher(
            teacher_hidden_states, teacher_lm_head, student_hidden_states.size(0), student_lm_head.weight.size(0)
        )
        teacher_hidden_states = teacher_hidden_states.detach()[shift_labels != ignore_index]
        teacher_lm_head = LMHead(*(x.detach() if isinstance(x, torch.Tensor) else x for x in teacher_lm_head))

    counted = shift_labels != ignore_index
    hidden_states, labels = student_hidden_states[counted], shift_labels[counted].long()
    num_tokens = counted.sum()
    chunk_size = max(1, _CHUNK_ELEMENTS // student_lm_head.weight.size(0))
    sums = []
    # At least one chunk, be it empty, so that a batch without labels gives a zero that is connected to the graph.
    for start in range(0, max(1, len(labels)), chunk_size):
        chunk = slice(start, start + chunk_size)
        teacher_chunk = teacher_hidden_states[chunk] if kl_weight else None
        inputs = (hidden_states[chunk], student_lm_head, teacher_chunk, teacher_lm_head, labels[chunk])
        inputs += (ce_weight, kl_weight, temperature)
        if len(labels) <= chunk_size:  # one chunk: its logits are smaller than the budget, nothing to recompute
            sums.append(_chunk_sums(*inputs))
        else:
            sums.append(checkpoint(_chunk_sums, *inputs, use_reentrant=False))
    loss_sum = torch.stack([s[0] for s in sums]).sum()
    means = torch.stack([s[1] for s in sums]).sum(0) / num_tokens.clamp(min=1)
    denominator = num_tokens if num_items_in_batch is None else num_items_in_batch
    denominator = torch.as_tensor(denominator, device=loss_sum.device).clamp(min=1)
    return CEKLOutput(loss_sum / denominator, *means.unbind(), num_tokens)


def _chunk_sums(
    student_hidden_states: torch.Tensor,  # (chunk, student_hidden_size)
    student_lm_head: LMHead,
    teacher_hidden_states: torch.Tensor | None,  # (chunk, teacher_hidden_size)
    teacher_lm_head: LMHead | None,
    labels: torch.Tensor,  # (chunk,), none ignored
    ce_weight: float,
    kl_weight: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over one chunk: the loss, and a detached vector (CE, KL, entropy, top-1)."""
    student_logits = student_lm_head.logits(student_hidden_states)  # (chunk, vocab_size)
    log_probs = F.log_softmax(student_logits, dim=-1)
    ce_sum = F.nll_loss(log_probs, labels, reduction="sum")
    kl_sum = torch.zeros_like(ce_sum)
    if kl_weight:
        teacher_logits = teacher_lm_head.logits(teacher_hidden_states)
        kl_sum = F.kl_div(
            F.log_softmax(student_logits / temperature, dim=-1),
            F.log_softmax(teacher_logits / temperature, dim=-1),
            reduction="sum",
            log_target=True,
        )
    with torch.no_grad():
        entropy_sum = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum()  # 0 * -inf of a masked token is 0
        top1_sum = (student_logits.argmax(-1) == labels).sum().to(ce_sum.dtype)
    loss_sum = ce_weight * ce_sum + kl_weight * temperature**2 * kl_sum
    return loss_sum, torch.stack([ce_sum.detach(), kl_sum.detach(), entropy_sum, top1_sum])


def _check_options(ce_weight: float, kl_weight: float, temperature: float) -> None:
    for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"`{name}` must be a finite number >= 0, got {weight}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be a finite number > 0, got {temperature}.")


def _check_tensors(hidden_states: torch.Tensor, lm_head: LMHead, labels: torch.Tensor, ignore_index: int) -> None:
    vocab_size = lm_head.weight.size(0)
    if hidden_states.dim() != 2 or hidden_states.size(1) != lm_head.weight.size(1):
        raise ValueError(
            f"`student_hidden_states` must have shape (num_tokens, {lm_head.weight.size(1)}), the width of "
            f"`student_lm_head.weight`, got {tuple(hidden_states.shape)}."
        )
    if labels.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"`shift_labels` must have shape ({hidden_states.size(0)},), one label for each row of "
            f"`student_hidden_states`, got {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"`shift_labels` must hold integers (token ids), got {labels.dtype}.")
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"`shift_labels` must be {ignore_index} or in [0, {vocab_size}), the vocabulary of `student_lm_head`, got "
            f"{int(labels[position])} at position {position}."
        )


def _check_teacher(hidden_states: torch.Tensor | None, lm_head: LMHead | None, num_tokens: int, vocab_size: int):
    if hidden_states is None or lm_head is None:
        raise ValueError(
            "`teacher_hidden_states` and `teacher_lm_head` are needed when `kl_weight` is not 0, got None. Pass both, "
            "or set `kl_weight=0`."
        )
    if hidden_states.shape != (num_tokens, lm_head.weight.size(1)):
        raise ValueError(
            f"`teacher_hidden_states` must have shape ({num_tokens}, {lm_head.weight.size(1)}): the student's "
            f"tokens, the width of `teacher_lm_head.weight`. Got {tuple(hidden_states.shape)}."
        )
    if lm_head.weight.size(0) != vocab_size:
        raise ValueError(
            f"`teacher_lm_head` has a vocabulary of {lm_head.weight.size(0)} tokens, `student_lm_head` of "
            f"{vocab_size}. KL compares whole distributions: use a teacher of the same vocabulary, or resize its "
            "embeddings to the student's (`resize_token_embeddings`)."
        )
