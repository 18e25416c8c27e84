# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy plus KL to a teacher, from hidden states and LM heads."""

from .linear_ce_kl import IGNORE_INDEX, CEKLOutput, linear_ce_kl
from .lm_head import LMHead, ModelSide


__all__ = ["IGNORE_INDEX", "CEKLOutput", "LMHead", "ModelSide", "linear_ce_kl"]
