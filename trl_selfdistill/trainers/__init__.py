# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for `trl.SFTTrainer`, and a callback that asks a model while it trains."""

from .frozen_groups_sft_config import FrozenGroupsSFTConfig
from .frozen_groups_sft_trainer import FrozenGroupsSFTTrainer
from .hallucination_callback import HallucinationEvalCallback
from .self_distill_sft_config import PAPER_SETTING, SelfDistillSFTConfig
from .self_distill_sft_trainer import SelfDistillSFTTrainer


__all__ = [
    "PAPER_SETTING",
    "FrozenGroupsSFTConfig",
    "FrozenGroupsSFTTrainer",
    "HallucinationEvalCallback",
    "SelfDistillSFTConfig",
    "SelfDistillSFTTrainer",
]
