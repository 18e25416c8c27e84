# SPDX-License-Identifier: Apache-2.0
"""The last layer of a causal language model as a value, and what it receives."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F


class LMHead(NamedTuple):
    """
    The last layer of a causal language model: `softcap(logit_scale * (hidden_states @ weight.T + bias))`.

    Args:
        weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`): Output embedding, or an FSDP2 shard of it.
        bias (`torch.Tensor` of shape `(vocab_size,)`, *optional*): Bias of the projection; `-inf` masks a token.
        logit_scale (`float`, *optional*, defaults to `1.0`): Multiplies the logits (Cohere, Granite, Falcon-H1).
        logit_softcap (`float`, *optional*):
            If set, the scaled logits `z` become `logit_softcap * tanh(z / logit_softcap)` (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns fp32 (fp64 for fp64 inputs) logits of shape `(num_tokens, vocab_size)`, under autocast too."""
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        head = self.map_tensors(lambda tensor: tensor.to(dtype))
        logits = F.linear(hidden_states.to(dtype), head.weight, head.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LMHead":
        """Returns the head with `function` applied to its weight and bias."""
        bias = None if self.bias is None else function(self.bias)
        return self._replace(weight=function(self.weight), bias=bias)


class ModelSide(NamedTuple):
    """One of the two models: what its LM head receives, `(num_tokens, hidden_size)`, and the head."""

    hidden_states: torch.Tensor
    lm_head: LMHead
