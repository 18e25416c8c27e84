# SPDX-License-Identifier: Apache-2.0
"""Which answers are right, wrong, or none, and how often a model hallucinates."""

from .metric import RATES, score_hallucinations


__all__ = ["RATES", "score_hallucinations"]
