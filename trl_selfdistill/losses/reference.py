# SPDX-License-Identifier: Apache-2.0
"""The loss as a textbook writes it, with all logits in memory: what the other implementations are judged by."""

import torch
from torch.nn import functional as F

from .lm_head import ModelSide
from .objective import TileObjective


def reference_losses(
    student: ModelSide,
    teacher: ModelSide | None,
    labels: torch.Tensor,  # (num_tokens,), none ignored
    objective: TileObjective,
) -> torch.Tensor:
    """Cross-entropy, divergence, entropy and top-1 of each token, `(num_tokens, 4)`; autograd does the rest."""
    logits = student.lm_head.logits(student.hidden_states)
    log_probs = logits.log_softmax(-1)
    ce = F.nll_loss(log_probs, labels, reduction="none")
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    divergence = torch.zeros_like(ce)
    if objective.kl_weight:
        log_q = (logits / objective.temperature).log_softmax(-1)
        log_p = (teacher.lm_head.logits(teacher.hidden_states) / objective.temperature).log_softmax(-1)
        beta = objective.jsd_beta
        if beta in (0, 1):
            divergence = _kl(log_p, log_q) if beta == 0 else _kl(log_q, log_p)
        else:
            log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
            divergence = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    top1 = logits.argmax(-1) == labels
    return torch.stack([ce, divergence, entropy, top1.to(ce.dtype)], dim=-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    # A token that p masks counts nothing, whatever q gives it
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
