# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters and adapters: which modules get one, so that only the wanted groups are adapted."""

import copy

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_peft_available

from ..parameters.groups import GroupSpec
from ..parameters.structure import named_tensors


if is_peft_available():
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists


def skeleton(name_or_path: str, **kwargs) -> PreTrainedModel:
    """The modules of a model by name, without its weights: nothing but its config is read."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name_or_path, **kwargs))


def linear_modules(model: PreTrainedModel, option: str, specs: list[GroupSpec]) -> tuple[list[str], list[str]]:
    """
    The names of the linear modules (quantised ones too) that are in the groups to train, and of those that are not.
    The LM head is never in the first: the fused loss reads its weight, not what an adapter adds.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model, without adapters.
        option (`str`): `"frozen_groups"` or `"trainable_groups"`, as `parse_group_specs` returns it.
        specs (`list[GroupSpec]`): Its entries.
    """
    modules, trainable, frozen = dict(model.named_modules()), [], []
    for _, names in named_tensors(model):
        for name in names:
            path, _, attribute = name.name.rpartition(".")
            is_linear = isinstance(modules[path], torch.nn.Linear) or type(modules[path]).__name__ == "Conv1D"
            if attribute == "weight" and is_linear:
                is_trainable = any(spec.selects(name) for spec in specs) == (option == "trainable_groups")
                (trainable if is_trainable and name.group != "lm_head" else frozen).append(path)
    return trainable, frozen


def restrict_peft_config(
    config: "PeftConfig", model: PreTrainedModel, option: str, specs: list[GroupSpec]
) -> "PeftConfig":
    """
    A copy of a PEFT config with adapters on the trainable groups alone: without `target_modules` (or with
    `"all-linear"`) they become the linear modules of these groups, less its `exclude_modules`.

    Raises:
        ValueError: If the config targets modules in frozen groups, its method has no `target_modules`, or no linear
            module is left to adapt.
    """
    asked = f"`{option}={[spec.text for spec in specs]}`"
    if not hasattr(config, "target_modules"):
        raise ValueError(
            f"{asked} cannot be combined with {type(config).__name__}, which does not adapt modules. Use LoRA or "
            "another method with `target_modules`, or leave the groups unset."
        )
    trainable, frozen = linear_modules(model, option, specs)
    config = copy.deepcopy(config)
    if config.target_modules in (None, "all-linear"):
        config.target_modules = set(trainable)
        config.target_modules = {name for name in trainable if _is_target(config, name)}
        if not config.target_modules:
            raise ValueError(
                f"{asked} leaves no linear module to put an adapter on in {type(model).__name__}. Train a group that "
                "has some, as 'attention' or 'mlp', exclude fewer (`exclude_modules`), or train without PEFT."
            )
        return config
    contradicting = [name for name in frozen if _is_target(config, name)]
    if contradicting:
        raise ValueError(
            f"{asked} and `target_modules={config.target_modules!r}` of the PEFT config contradict each other: "
            f"{len(contradicting)} of the targeted modules are in frozen groups ({', '.join(contradicting[:3])}). "
            "Leave `target_modules` unset to adapt the trainable groups, or name modules in them."
        )
    return config


def _is_target(config: "PeftConfig", name: str) -> bool:
    return bool(check_target_module_exists(config, name))


def refuse_adapters_elsewhere(model: torch.nn.Module, option: str, specs: list[GroupSpec]) -> None:
    """
    Raises:
        ValueError: If a PEFT model trains something in frozen groups: adapters, biases or copies of modules.
    """
    elsewhere = []
    for parameter, names in named_tensors(model):
        is_selected = any(spec.selects(name) for spec in specs for name in names)
        if parameter.requires_grad and is_selected != (option == "trainable_groups"):
            elsewhere.append(names[0].name)
    if elsewhere:
        raise ValueError(
            f"`{option}={[spec.text for spec in specs]}` was set, and the PEFT model trains {len(elsewhere)} tensors "
            f"in frozen groups: {', '.join(elsewhere[:3])}. Hand over the model without adapters and a `peft_config` "
            "without `target_modules`, which then follow the groups, or groups that fit the adapters."
        )
