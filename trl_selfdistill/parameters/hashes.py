# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of parameters, which proves that what is frozen did not move, and of a whole model, which identifies it."""

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from .structure import base_causal_lm, group_of, named_tensors


# Settings that do not change what a model computes (Trainer sets the ids to those of the tokenizer)
_WITHOUT_EFFECT = {"_name_or_path", "architectures", "auto_mapping", "base_model_name_or_path", "dtype", "use_cache"}
_WITHOUT_EFFECT |= {"inference_mode", "init_lora_weights", "peft_version", "revision", "task_type", "torch_dtype"}
_WITHOUT_EFFECT |= {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}


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
    if data.is_meta:
        raise ValueError("A parameter is offloaded, so that it cannot be read: load the model without offloading.")
    digest = hashlib.sha256(f"{parameter.dtype} {tuple(data.shape)} ".encode())
    digest.update(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # NumPy has no bfloat16
    return digest.hexdigest()


def digest(hashes: dict[str, str]) -> str:
    """One SHA-256 over named ones, in whatever order they are."""
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(hashes.items())).encode()).hexdigest()


def verify_frozen(model: PreTrainedModel, expected: dict[str, dict[str, str]]) -> None:
    """Raises `ValueError` if a parameter is not bit for bit that of `expected`, an earlier [`hash_parameters`]."""
    parameters = dict(model.named_parameters())
    for group, members in expected.items():
        now = {name: hash_tensor(parameters[name]) for name in members if name in parameters}
        if moved := [name for name, value in members.items() if now.get(name) != value]:
            numbers = f"{len(moved)} of {len(members)} frozen parameters in '{group}'"
            raise ValueError(f"{numbers} changed: {moved[:3]}. Look for callbacks, weight tying and hooks.")


def hash_model(model: torch.nn.Module, adapters: bool = True) -> str:
    """
    SHA-256 over a model's config, its weights and buffers (quantised ones as packed) and, with `adapters`, a PEFT
    model's. About a second for 1 GB. Under ZeRO-3 a collective; before FSDP shards the model.
    """
    state, configs = model.state_dict(keep_vars=True), {"config": base_causal_lm(model).config}
    if adapters and is_peft_model(model):
        configs |= model.peft_config
    elif is_peft_model(model):
        parts = {"modules_to_save", "token_adapter"}  # not the adapters' names, which may be those of modules
        for layer in model.modules():  # those of PEFT have names of what is theirs
            parts |= {*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ())}
        state = {name: tensor for name, tensor in state.items() if parts.isdisjoint(name.split("."))}
    return digest({name: hash_config(config) for name, config in configs.items()} | hash_tensors(state))


def hash_tensors(state: dict) -> dict[str, str]:
    """SHA-256 of the dtype, shape and bytes of each tensor in a state dict, by its name."""
    hashes = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            with gathered(tensor):
                hashes[name] = hash_tensor(tensor.data)
    return hashes


def hash_config(config) -> str:
    """SHA-256 of a model's or an adapter's config, without what does not change a model's output."""
    kept = {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_EFFECT}
    text = json.dumps(kept, sort_keys=True, default=lambda value: sorted(value) if type(value) is set else str(value))
    return hashlib.sha256(text.encode()).hexdigest()


def gathered(*tensors: torch.Tensor | None) -> AbstractContextManager:
    """The tensors whole on each process, for reading. A collective under ZeRO-3, nothing without it."""
    parts = [tensor for tensor in tensors if hasattr(tensor, "ds_id") and tensor.numel() != tensor.ds_numel]
    if not parts:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts)
