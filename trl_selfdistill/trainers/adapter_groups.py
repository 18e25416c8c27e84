# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters and adapters: which modules get one, so that only the wanted groups are adapted."""

import copy

import torch
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ..parameters.groups import GroupSelection
from ..parameters.structure import named_tensors


if is_peft_available():
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists


def restrict_peft_config(
    config: "PeftConfig", model: PreTrainedModel, selection: GroupSelection | None
) -> "PeftConfig":
    """
    A copy of a PEFT config with adapters on the trainable groups of `model` alone. `target_modules` that are unset or
    `"all-linear"` become the linear modules of these groups, less `exclude_modules`; a `ValueError` if there are none.
    Those of the user's own stay: [`refuse_adapters_elsewhere`] sees what they make. Without a selection all stays.
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
    config = copy.deepcopy(config)
    config.target_modules = trainable
    # What PEFT itself takes of these, which are without `exclude_modules`
    config.target_modules = {name for name in trainable if check_target_module_exists(config, name)}
    if not config.target_modules:
        raise ValueError(
            f"{selection} leaves no linear module to put an adapter on in {type(model).__name__}. Train 'attention' "
            "or 'mlp', or exclude fewer (`exclude_modules`)."
        )
    return config


def refuse_adapters_elsewhere(model: torch.nn.Module, selection: GroupSelection) -> None:
    """Raises `ValueError` if a PEFT model trains something in frozen groups: adapters, biases, copies of modules."""
    trained = [names[0] for parameter, names in named_tensors(model) if parameter.requires_grad]
    if elsewhere := [name.name for name in trained if not selection.trains(name)]:
        raise ValueError(
            f"{selection}, and the PEFT model trains {len(elsewhere)} tensors in frozen groups: {elsewhere[:3]}. Pass "
            "a `peft_config` without `target_modules` and `modules_to_save`, and the model without adapters."
        )
