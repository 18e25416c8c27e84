# SPDX-License-Identifier: Apache-2.0
"""What both studies refuse before anything is done."""

import math
from dataclasses import fields

from ..trainers import SelfDistillSFTConfig


# The methods set these, or the number of steps follows from others
_NOT_SHARED = ("max_steps", "regularizer", "l2_weight", "rehearsal_dataset_name", "teacher_model_name_or_path")
_NOT_SHARED += ("frozen_groups", "trainable_groups")


def check_different(name: str, values: list) -> None:
    """
    Refuses a list that holds a value twice.

    Args:
        name (`str`): The argument.
        values (`list`): Its values; numbers are compared to the six digits that folders and labels show.

    Raises:
        ValueError: If two are the same.
    """
    shown = [f"{value:g}" if isinstance(value, float | int) else value for value in values]
    if len(set(shown)) < len(shown):
        raise ValueError(f"`{name}` must hold different values, to six digits, got {values}. Leave one out.")


def check_seeds(seeds: list[int]) -> None:
    """
    Refuses seeds that numpy does not take.

    Raises:
        ValueError: If one is below 0 or above 2³² - 1.
    """
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"`seeds` must be from 0 to 2**32 - 1, got {seeds}.")


def check_shared_config(config: SelfDistillSFTConfig) -> None:
    """
    Refuses settings that a study's methods set themselves, and would overwrite without a word or run under a wrong
    name.

    Raises:
        ValueError: If one of them is set, or `num_train_epochs` is not above 0.
    """
    defaults = {f.name: f.default for f in fields(SelfDistillSFTConfig)}
    for name in _NOT_SHARED:
        if getattr(config, name) != defaults[name]:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}`: the methods that are compared set it themselves. Leave it out; "
                "the number of steps follows from `num_train_epochs`."
            )
    if not 0 < config.num_train_epochs < math.inf:
        raise ValueError(f"`num_train_epochs` must be finite and above 0, got {config.num_train_epochs}.")
