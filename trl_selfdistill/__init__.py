# SPDX-License-Identifier: Apache-2.0
"""Fine-tune language models on new facts without breaking the facts that they know (arXiv 2604.15574).

Names are loaded on first use (PEP 562), so that importing the package, or its metric, does not import torch.
"""

from importlib import import_module
from importlib.metadata import version


_EXPORTS = {
    "CEKLOutput": "losses",
    "DriftProbeCallback": "drift.probe",
    "FrozenGroupsSFTConfig": "trainers",
    "FrozenGroupsSFTTrainer": "trainers",
    "HallucinationEvalCallback": "knowledge.hallucination_callback",
    "LMHead": "losses",
    "SelfDistillSFTConfig": "trainers",
    "SelfDistillSFTTrainer": "trainers",
    "linear_ce_kl": "losses",
}

__version__ = version("trl-selfdistill")
__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
