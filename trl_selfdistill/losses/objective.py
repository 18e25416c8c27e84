# SPDX-License-Identifier: Apache-2.0
"""What the kernels compute on a tile, `(num_tokens, vocab_size)` products of hidden states and an LM head."""

from typing import NamedTuple


class LogitTransform(NamedTuple):
    """From the product with the LM head's weight to the logits: `softcap(scale * product)`."""

    scale: float = 1.0
    softcap: float | None = None


class TileObjective(NamedTuple):
    """
    `(ce_weight * CE + kl_weight * temperature**2 * D) * grad_scale`, summed over the rows of a tile.

    Args:
        ce_weight (`float`):
            Weight of the cross-entropy at temperature 1.
        kl_weight (`float`):
            Weight of the divergence D. At 0 there is no teacher tile.
        temperature (`float`):
            Temperature τ of both distributions in D.
        jsd_beta (`float`):
            Which divergence D of the teacher p and the student q: 0 is the forward KL(p ‖ q), 1 the reverse
            KL(q ‖ p), and a number β in between the generalized Jensen-Shannon divergence
            β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q (arXiv 2306.13649).
        grad_scale (`float`):
            Multiplies all of it: one over the number of tokens of the batch.
    """

    ce_weight: float
    kl_weight: float
    temperature: float
    jsd_beta: float
    grad_scale: float

    def total(self, sums):
        """The loss from the sums of the tokens' losses (cross-entropy first, then D)."""
        return (self.ce_weight * sums[0] + self.kl_weight * self.temperature**2 * sums[1]) * self.grad_scale
