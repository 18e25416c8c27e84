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
    A copy of a PEFT config with adapters on the trainable groups alone. `target_modules` that are unset or
    `"all-linear"` become the linear modules of these groups, less `exclude_modules`.

    Args:
        config ([`~peft.PeftConfig`]): The config, which is not changed.
        model ([`~transformers.PreTrainedModel`]): The model that is to get the adapters.
        selection ([`~trl_selfdistill.parameters.groups.GroupSelection`], *optional*): The groups to train; without
            them the config is returned as it is.

    Raises:
        ValueError: If the config targets modules in frozen groups, its method has no `target_modules`, or no linear
            module is left to adapt.
    """
    if selection is None:
        return config
    if not hasattr(config, "target_modules"):
        raise ValueError(
            f"{selection} needs a PEFT method with `target_modules`, such as LoRA: {type(config).__name__} does not "
            "adapt modules."
        )
    trainable, frozen = _linear_modules(model, selection)
    config = copy.deepcopy(config)
    if config.target_modules in (None, "all-linear"):
        config.target_modules = set(trainable)
        config.target_modules = {name for name in trainable if check_target_module_exists(config, name)}
        if not config.target_modules:
            raise ValueError(
                f"{selection} leaves no linear module to put an adapter on in {type(model).__name__}. Train a group "
                "that has some, as 'attention' or 'mlp', or exclude fewer (`exclude_modules`)."
            )
        return config
    contradicting = [name for name in frozen if check_target_module_exists(config, name)]
    if contradicting:
        raise ValueError(
            f"{selection} and `target_modules={config.target_modules!r}` of the PEFT config contradict each other: "
            f"{len(contradicting)} of the targeted modules are in frozen groups ({', '.join(contradicting[:3])}). "
            "Leave `target_modules` unset to adapt the trainable groups."
        )
    return config


def _linear_modules(model: PreTrainedModel, selection: GroupSelection) -> tuple[list[str], list[str]]:
    """The linear modules in the groups to train, and the others. The fused loss reads no adapter of the LM head."""
    modules, trainable, frozen = dict(model.named_modules()), [], []
    for _, names in named_tensors(model):
        for name in names:
            path, _, attribute = name.name.rpartition(".")
            is_linear = isinstance(modules[path], torch.nn.Linear) or type(modules[path]).__name__ == "Conv1D"
            if attribute == "weight" and is_linear:
                (trainable if selection.trains(name) and name.group != "lm_head" else frozen).append(path)
    return trainable, frozen


def refuse_adapters_elsewhere(model: torch.nn.Module, selection: GroupSelection) -> None:
    """Raises `ValueError` if a PEFT model trains something in frozen groups: adapters, biases, copies of modules."""
    elsewhere = [
        names[0].name
        for parameter, names in named_tensors(model)
        if parameter.requires_grad and not selection.trains(names[0])
    ]
    if elsewhere:
        raise ValueError(
            f"{selection} was set, and the PEFT model trains {len(elsewhere)} tensors in frozen groups: "
            f"{', '.join(elsewhere[:3])}. Pass the model without adapters, and a `peft_config`."
        )
