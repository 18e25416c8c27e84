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
        FrozenGroupsSFTConfig,
        FrozenGroupsSFTTrainer,
        HallucinationEvalCallback,
        SelfDistillSFTConfig,
        SelfDistillSFTTrainer,
    )

_EXPORTS = {
    "CEKLOutput": "losses",
    "FrozenGroupsSFTConfig": "trainers",
    "FrozenGroupsSFTTrainer": "trainers",
    "HallucinationEvalCallback": "trainers",
    "LMHead": "losses",
    "SelfDistillSFTConfig": "trainers",
    "SelfDistillSFTTrainer": "trainers",
    "linear_ce_kl": "losses",
}

__version__ = version("trl-selfdistill")
__all__ = [  # spelled out for type checkers; tests/test_architecture.py compares it with the table above
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
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
