# SPDX-License-Identifier: Apache-2.0
"""How far a model moves while it trains, on facts that the training does not show."""

from .probe import DriftProbeCallback


__all__ = ["DriftProbeCallback"]
