# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters and adapters: which modules get one, so that only the wanted groups are adapted."""

import copy

import torch
from transformers import PreTrainedModel

from ..parameters.groups import GroupSelection
from ..parameters.structure import named_tensors


def restrict_peft_config(config, model: PreTrainedModel, selection: GroupSelection | None):
    """
    A copy of a [`~peft.PeftConfig`] with adapters on the trainable groups of `model` alone. `target_modules` that are
    unset or `"all-linear"` become the linear modules of these groups; a `ValueError` if there are none. Those of the
    user's own stay: [`refuse_adapters_elsewhere`] sees what they make. Without a selection all stays.
    """
    if selection is None:
        return config
    if not hasattr(config, "target_modules"):
        raise ValueError(f"{selection} needs a PEFT method with `target_modules`, got {type(config).__name__}.")
    if config.target_modules not in (None, "all-linear"):
        return config
    modules, trainable = dict(model.named_modules()), set()
    for _, names in named_tensors(model):
        for name in names:
            path, _, attribute = name.name.rpartition(".")
            is_linear = isinstance(modules[path], torch.nn.Linear) or type(modules[path]).__name__ == "Conv1D"
            # The fused loss reads no adapter of the LM head
            if attribute == "weight" and is_linear and selection.trains(name) and name.group != "lm_head":
                trainable.add(path)
    if not trainable:
        raise ValueError(
            f"{selection} leaves no linear module to put an adapter on in {type(model).__name__}. Train 'attention' "
            "or 'mlp'."
        )
    config = copy.deepcopy(config)
    config.target_modules = trainable
    return config


def refuse_adapters_elsewhere(model: torch.nn.Module, selection: GroupSelection) -> None:
    """Raises `ValueError` if a PEFT model trains something in frozen groups: adapters, biases, copies of modules."""
    trained = [names[0] for parameter, names in named_tensors(model) if parameter.requires_grad]
    if elsewhere := [name.name for name in trained if not selection.trains(name)]:
        raise ValueError(
            f"{selection}, and the PEFT model trains {len(elsewhere)} tensors in frozen groups: {elsewhere[:3]}. Pass "
            "a `peft_config` without `target_modules` and `modules_to_save`, and the model without adapters."
        )
