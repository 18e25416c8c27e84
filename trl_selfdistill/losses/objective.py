# SPDX-License-Identifier: Apache-2.0
"""What the kernels read and compute."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Products of hidden states and an LM head. The logits are `softcap * tanh(scale * products / softcap)`."""

    products: torch.Tensor  # (num_tokens, vocab_size), contiguous
    scale: float
    softcap: float | None


class TileObjective(NamedTuple):
    """`grad_scale * (ce_weight * CE + kl_weight * temperature**2 * KL(teacher ‖ student))`, summed over the rows."""

    ce_weight: float
    kl_weight: float  # at 0 there is no teacher
    temperature: float  # of both distributions in the KL; the cross-entropy is at temperature 1
    grad_scale: float  # one over the number of labels in the batch

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Returns the loss, from the tokens' sums `(4,)` of cross-entropy, KL, entropy and top-1."""
        return (self.ce_weight * sums[0] + self.kl_weight * self.temperature**2 * sums[1]) * self.grad_scale
