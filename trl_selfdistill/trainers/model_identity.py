# SPDX-License-Identifier: Apache-2.0
"""Who a model is, as one SHA-256 over all that its outputs depend on."""

import hashlib
import json

import torch
from accelerate.utils import is_peft_model
from transformers.utils import is_peft_available

from ..parameters.hashes import digest, hash_tensor
from ..parameters.structure import base_causal_lm
from .zero3 import gathered


if is_peft_available():
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer


# Settings that do not change what a model computes
_NO_MATTER = {
    "_name_or_path",
    "architectures",
    "auto_mapping",
    "base_model_name_or_path",
    "dtype",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "task_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def hash_model(model: torch.nn.Module) -> str:
    """
    SHA-256 over a model's config, the settings of its adapters, and the names, dtypes, shapes and bytes of its weights
    and buffers; of quantised weights over the packed bytes and the scales. About a second for 1 GB. Under ZeRO-3 a
    collective that gathers them one by one, so that it is that of the whole model.
    """
    adapters = {name: hash_settings(config.to_dict()) for name, config in _adapters_of(model).items()}
    return digest({"config": _hash_config(model), **adapters, **hash_tensors(_tensors_of(model))})


def hash_base(model: torch.nn.Module) -> str:
    """The same of the base under the adapters of a PEFT model."""
    attributes = {"modules_to_save", "token_adapter"}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            attributes |= {*module.adapter_layer_names, *module.other_param_names}
    tensors = {name: t for name, t in _tensors_of(model).items() if attributes.isdisjoint(name.split("."))}
    return digest({"config": _hash_config(model), **hash_tensors(tensors)})


def hash_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes, by its name."""
    hashes = {}
    for name, tensor in tensors.items():
        with gathered(tensor):
            hashes[name] = hash_tensor(tensor.data)
    return hashes


def hash_settings(settings: dict) -> str:
    """SHA-256 of a config, without what does not change a model's output."""
    kept = {name: value for name, value in settings.items() if name not in _NO_MATTER}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=_plain).encode()).hexdigest()


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _adapters_of(model: torch.nn.Module) -> "dict[str, PeftConfig]":
    return model.peft_config if is_peft_model(model) else {}


def _hash_config(model: torch.nn.Module) -> str:
    return hash_settings(base_causal_lm(model).config.to_dict())


def _plain(value):
    return sorted(map(str, value)) if isinstance(value, set) else str(value)
