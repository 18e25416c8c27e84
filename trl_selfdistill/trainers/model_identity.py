# SPDX-License-Identifier: Apache-2.0
"""The identity of a model: one SHA-256 over all that its outputs depend on."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import is_peft_model
from transformers.utils import is_peft_available

from ..parameters.hashes import digest, hash_tensor
from ..parameters.structure import base_causal_lm


if is_peft_available():
    from peft.tuners.tuners_utils import BaseTunerLayer


# Settings that do not change what a model computes
_WITHOUT_EFFECT = {"_name_or_path", "architectures", "auto_mapping", "base_model_name_or_path", "dtype"}
_WITHOUT_EFFECT |= {"inference_mode", "init_lora_weights", "peft_version", "revision", "task_type", "torch_dtype"}
_WITHOUT_EFFECT |= {"transformers_version", "use_cache"}


def hash_model(model: torch.nn.Module, adapters: bool = True) -> str:
    """
    SHA-256 over a model's config, the settings of its adapters, and its weights and buffers; of quantised weights over
    the packed bytes and the scales. About a second for 1 GB. Under ZeRO-3 a collective.

    Args:
        model (`torch.nn.Module`): The model; not yet sharded by FSDP, as a shard would have another hash.
        adapters (`bool`, *optional*, defaults to `True`): Whether the adapters of a PEFT model are part of it.
    """
    state, configs = model.state_dict(keep_vars=True), {"config": base_causal_lm(model).config}
    if adapters and is_peft_model(model):
        configs |= model.peft_config
    elif is_peft_model(model):
        parts = {"modules_to_save", "token_adapter"}
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                parts |= {*module.adapter_layer_names, *module.other_param_names}
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


@contextmanager
def gathered(*tensors: torch.Tensor | None) -> Iterator[None]:
    """The tensors whole on each process, for reading. A collective under ZeRO-3, nothing without it."""
    parts = [tensor for tensor in tensors if hasattr(tensor, "ds_id") and tensor.numel() != tensor.ds_numel]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield
