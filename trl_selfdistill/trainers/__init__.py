# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for `trl.SFTTrainer`."""

from .frozen_groups_sft_config import FrozenGroupsSFTConfig
from .frozen_groups_sft_trainer import FrozenGroupsSFTTrainer
from .self_distill_sft_config import SelfDistillSFTConfig
from .self_distill_sft_trainer import SelfDistillSFTTrainer


__all__ = ["FrozenGroupsSFTConfig", "FrozenGroupsSFTTrainer", "SelfDistillSFTConfig", "SelfDistillSFTTrainer"]
