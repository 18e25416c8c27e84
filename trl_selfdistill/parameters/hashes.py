# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of parameters: proof that what is frozen stayed bit for bit what it was."""

import hashlib

import torch
from transformers import PreTrainedModel

from .structure import group_of, named_tensors


def hash_parameters(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """SHA-256 of each frozen parameter, as `{group: {name: hash}}` (see [`hash_tensor`])."""
    hashes: dict[str, dict[str, str]] = {}
    for parameter, names in named_tensors(model):
        if not parameter.requires_grad:
            hashes.setdefault(group_of(names) or "unassigned", {})[names[0].name] = hash_tensor(parameter)
    return hashes


def hash_tensor(parameter: torch.Tensor) -> str:
    """SHA-256 of a parameter's dtype, shape and bytes; of a sharded one (FSDP, ZeRO-3), of this process's part."""
    data = getattr(parameter, "ds_tensor", parameter).detach()  # a partition of ZeRO-3; the parameter itself is empty
    data = data.to_local() if hasattr(data, "to_local") else data
    digest = hashlib.sha256(f"{parameter.dtype} {tuple(data.shape)} ".encode())
    digest.update(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # NumPy has no bfloat16
    return digest.hexdigest()


def digest(hashes: dict[str, str]) -> str:
    """One SHA-256 over named ones, in whatever order they are."""
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(hashes.items())).encode()).hexdigest()


def digest_groups(hashes: dict[str, dict[str, str]]) -> dict[str, str]:
    """One SHA-256 a group, over the names and hashes of [`hash_parameters`]."""
    return {group: digest(members) for group, members in hashes.items()}


def verify_frozen(model: PreTrainedModel, expected: dict[str, dict[str, str]]) -> None:
    """Raises `ValueError` if a parameter is not bit for bit that of `expected`, an earlier [`hash_parameters`]."""
    parameters = dict(model.named_parameters())
    for group, members in expected.items():
        moved = [
            name for name, value in members.items() if name not in parameters or hash_tensor(parameters[name]) != value
        ]
        if moved:
            raise ValueError(
                f"{len(moved)} of {len(members)} frozen parameters in '{group}' changed: {moved[:3]}. Something other "
                "than the optimizer wrote to them: look for callbacks, weight tying and hooks."
            )
