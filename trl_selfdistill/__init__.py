# SPDX-License-Identifier: Apache-2.0
"""Fine-tune language models on new facts without breaking the facts that they know (arXiv 2604.15574).

Names are loaded on first use (PEP 562), so that importing the package, or its metric, does not import torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .losses import CEKLOutput, LMHead, linear_ce_kl
    from .trainers import (
        PAPER_SETTING,
        FrozenGroupsSFTConfig,
        FrozenGroupsSFTTrainer,
        HallucinationEvalCallback,
        SelfDistillSFTConfig,
        SelfDistillSFTTrainer,
    )

__version__ = version("trl-selfdistill")
__all__ = [
    "PAPER_SETTING",
    "CEKLOutput",
    "FrozenGroupsSFTConfig",
    "FrozenGroupsSFTTrainer",
    "HallucinationEvalCallback",
    "LMHead",
    "SelfDistillSFTConfig",
    "SelfDistillSFTTrainer",
    "__version__",
    "linear_ce_kl",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = "losses" if name in ("CEKLOutput", "LMHead", "linear_ce_kl") else "trainers"
    return getattr(import_module(f".{package}", __name__), name)


def __dir__() -> list[str]:
    return __all__
