# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`FrozenGroupsSFTTrainer`]: TRL's `SFTConfig` and the groups of parameters to train."""

import math
import os
import re
from dataclasses import dataclass, fields
from inspect import getdoc
from numbers import Integral, Real
from typing import get_args

import numpy as np
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig

from ..parameters.groups import GroupSelection
from .sft_internals import get_config_model_id


# What an option of a type may be given as, NumPy's numbers and paths among it, and its name in messages
_KINDS = {
    float: (Real, "a finite number"),
    int: (Integral, "a whole number"),
    bool: (bool | np.bool_, "True or False"),
    str: (str | os.PathLike, "a text"),
}


def help_from_docstring(config_class: type) -> type:
    """A class decorator that makes the entries of a docstring the help of the options on the command line."""
    entries = dict(re.findall(r"^ {4}(\w+) \(.*:\n((?: {8}.*\n?)+)", getdoc(config_class) or "", re.MULTILINE))
    for option in fields(config_class):
        if option.name in entries:
            option.metadata = {"help": " ".join(entries[option.name].split())}
    return config_class


@help_from_docstring
@dataclass
class FrozenGroupsSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`FrozenGroupsSFTTrainer`].

    This class includes only the parameters that are specific to training a part of the model. For the others, please
    refer to [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        frozen_groups (`list[str]`, *optional*):
            What not to train. Each entry is a group among `embeddings`, `attention`, `mlp`, `norm` and `lm_head`; a
            group in some layers, counted from 0, as `mlp:5` or `mlp:0-11` (both included); or a regular expression
            that is searched in the parameter names, as `re:q_proj`. Tied `embeddings` and `lm_head` go together. By
            default nothing is frozen, and the run is `SFTTrainer`'s step for step.
        trainable_groups (`list[str]`, *optional*):
            What to train instead, in the same form. The paper's setting is `["attention"]`.
        verify_frozen (`bool`, *optional*, defaults to `True`):
            Whether to prove by SHA-256 that the frozen parameters did not move, at each save and at the end (about a
            second for 1 GB). It is stored in `parameter_groups.json`.
    """

    frozen_groups: list[str] | None = None
    trainable_groups: list[str] | None = None
    verify_frozen: bool = True

    def __post_init__(self):
        if getattr(self, "warmup_ratio", None) == 0.0 and 0 < self.warmup_steps < 1:
            # A share of the steps has another name in transformers 4
            self.warmup_ratio, self.warmup_steps = self.warmup_steps, 0
        if getattr(self, "activation_checkpointing", True) is None:  # transformers 5.23 warns of the old name
            self.activation_checkpointing = self.gradient_checkpointing
        check_options(self, FrozenGroupsSFTConfig)
        selection = self.group_selection  # an entry that cannot be read is an error before a model is loaded
        if selection is not None:
            setattr(self, selection.option, selection.entries)  # YAML may hold a lone string
        super().__post_init__()  # last: what it says of the machine would come before a mistake in an option

    @property
    def group_selection(self) -> GroupSelection | None:
        """What `frozen_groups` or `trainable_groups` say now, parsed; `None` if nothing is to be frozen."""
        return GroupSelection.parse(self.frozen_groups, self.trainable_groups)


def check_options(config: TrainingArguments, config_class: type) -> None:
    """Makes the options that `config_class` adds plain numbers and texts. A `ValueError` if one is not of its type."""
    for name, annotation in config_class.__annotations__.items():
        kind, *others = get_args(annotation) or (annotation,)
        value = getattr(config, name)
        if kind not in _KINDS or (value is None and others):
            continue
        accepted, description = _KINDS[kind]
        is_other = not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)
        if is_other or (kind is float and not math.isfinite(value)):
            raise ValueError(f"`{name}` must be {description}, got {value!r}.")
        setattr(config, name, os.path.expanduser(value) if kind is str else kind(value))


def config_from(
    args: TrainingArguments | None, config_class: type, model: str | PreTrainedModel, suffix: str
) -> TrainingArguments:
    """`args` as a `config_class`. Without any, `output_dir` is made of the model's name and `suffix`."""
    if isinstance(args, config_class):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{name.split('/')[-1]}-{suffix}")
    config = copy_config(args, config_class)
    for name in vars(args).keys() - vars(config).keys():  # of a config class of the user's own
        setattr(config, name, getattr(args, name))
    return config


def copy_config(args: TrainingArguments, config_class: type, **changes) -> TrainingArguments:
    """A `config_class` with the values of `args`, as far as it has them, and `changes`."""
    # Not those of `to_dict`, which masks every name that ends in `_token`, be it `hub_token` or `eos_token`
    names = [field.name for field in fields(config_class) if field.init and hasattr(args, field.name)]
    values = {name: getattr(args, name) for name in names}
    return config_class(**values | changes)
