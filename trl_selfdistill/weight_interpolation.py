# SPDX-License-Identifier: Apache-2.0
"""Weights between two models (WiSE-FT, arXiv 2109.01903): what fine-tuning changed, taken back in part."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model by name, as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def interpolated(model: torch.nn.Module, start: dict[str, torch.Tensor], mixing_weight: float) -> Iterator[None]:
    """
    The model has the weights `(1 - mixing_weight) * start + mixing_weight * own` within the context, its own after.

    Args:
        model (`torch.nn.Module`): The fine-tuned model.
        start (`dict[str, torch.Tensor]`): Its weights before, of [`copy_weights`].
        mixing_weight (`float`): 0 for the start, 1 for the model as it is.

    Raises:
        `ValueError`: If `mixing_weight` is not in [0, 1].
    """
    if not 0 <= mixing_weight <= 1:
        raise ValueError(f"`mixing_weight` must be in [0, 1], got {mixing_weight}.")
    own = copy_weights(model)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.lerp(start[name].to(parameter.device), own[name], mixing_weight))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(own[name])
