# SPDX-License-Identifier: Apache-2.0
"""Losses of one tile of logits, and their gradient written over it: in PyTorch for any device, in Triton for CUDA."""

from .tile import LogitTransform, TileObjective


__all__ = ["LogitTransform", "TileObjective"]
