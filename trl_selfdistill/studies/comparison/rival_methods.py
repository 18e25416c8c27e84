# SPDX-License-Identifier: Apache-2.0
"""The ways to train on new facts without losing old ones that are compared, each as what it changes in plain SFT.

All of them make as many optimizer steps of as many rows, on the same Known and new facts.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import Trainer
from trl import SFTTrainer

from ...trainers import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer
from ..checks import check_different, check_seeds
from .report import SELF_DISTILLATION, WITH_OWN_ANSWERS
from .token_masking import mask_unlikely_tokens


@dataclass
class ComparisonArguments:
    """Which methods are compared, and their settings."""

    _argument_group_name = "comparison"

    methods: list[str] = field(
        default_factory=lambda: [
            "sft",
            "lora",
            "frozen",
            "l2",
            "replay",
            "known_patch",
            "stm",
            "selfdistill",
            "rehearsal",
        ],
        metadata={
            "help": "Methods to train. From `sft` come early stopping and the interpolations (WiSE-FT) too, without "
            "further training."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the training's order, at least 3."}
    )
    kl_weights: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0], metadata={"help": "Self-distillation: λ of the sweep."}
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Self-distillation: τ of the sweep."}
    )
    mixing_weights: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.6, 0.8],
        metadata={"help": "WiSE-FT: shares of the fine-tuned weights, the rest being those of the start, in [0, 1]."},
    )
    l2_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "L2 to the start: weights of a sweep, beside the one that is matched to the KL at the start."
        },
    )
    num_rehearsal: int = field(
        default=400,
        metadata={"help": "Rehearsal: prompts of further facts that the start model answers; no labels are used."},
    )
    lora_rank: int = field(default=16, metadata={"help": "LoRA: rank."})
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "LoRA: learning rate."})
    replay_ratio: int = field(
        default=3, metadata={"help": "Replay: times that a Known fact comes for a new one's one."}
    )
    known_patch_ratio: float = field(
        default=0.2, metadata={"help": "KnownPatch: share of all rows that are Known facts, in (0, 1)."}
    )
    known_patch_share: float = field(
        default=0.3,
        metadata={
            "help": "KnownPatch: share of the steps, at the end, that show Known facts among new ones, above the "
            "ratio and at most 1."
        },
    )
    stm_max_perplexity: float = field(default=2.5, metadata={"help": "STM: largest perplexity of a trained token."})

    def __post_init__(self):
        unknown = set(self.methods) - set(_METHODS)
        if unknown or "sft" not in self.methods:
            raise ValueError(f"`methods` may hold {', '.join(_METHODS)}, and `sft` must be one, got {self.methods}.")
        if len(set(self.seeds)) < max(3, len(self.seeds)):
            raise ValueError(f"`seeds` needs at least 3 different ones, none twice, got {self.seeds}.")
        check_different("methods", self.methods)
        for name, (allowed, is_allowed) in _ALLOWED.items():
            values = getattr(self, name)
            if isinstance(values, list):
                check_different(name, values)
            for value in values if isinstance(values, list) else [values]:
                if not is_allowed(value):
                    raise ValueError(f"`{name}` must be {allowed}, got {value}.")
        check_seeds(self.seeds)
        if {"selfdistill", "rehearsal"} & set(self.methods) and not (self.kl_weights and self.temperatures):
            raise ValueError(
                f"Self-distillation needs `kl_weights` and `temperatures`, got {self.kl_weights} and "
                f"{self.temperatures}. Give one of each at least, or leave selfdistill and rehearsal out of `methods`."
            )
        if not 0 < self.known_patch_ratio < self.known_patch_share <= 1:
            raise ValueError(
                "KnownPatch shows new facts among Known ones and needs 0 < `known_patch_ratio` < `known_patch_share` "
                f"<= 1, got {self.known_patch_ratio} and {self.known_patch_share}."
            )


_POSITIVE = ("finite and above 0", lambda value: 0 < value < math.inf)
_COUNT = ("at least 1", lambda value: value >= 1)
_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "kl_weights": ("finite and at least 0", lambda value: 0 <= value < math.inf),
    "temperatures": _POSITIVE,
    "l2_weights": _POSITIVE,
    "mixing_weights": ("shares in [0, 1]", lambda value: 0 <= value <= 1),
    "num_rehearsal": _COUNT,
    "lora_rank": _COUNT,
    "lora_learning_rate": _POSITIVE,
    "replay_ratio": _COUNT,
    "stm_max_perplexity": ("above 1, that of a certain token", lambda value: value > 1),
}


class Method(NamedTuple):
    """
    A way to train.

    Args:
        name (`str`): The beginning of its folders' names.
        label (`str`): Its name for readers.
        trainer_class (`type[Trainer]`): `SFTTrainer` or a subclass.
        config (`dict`): What it changes in the configuration.
        rows (`Callable`): `rows(known, new, num_rows, generator)`: its training rows. Random ones by default.
        trainer_arguments (`dict`): Further arguments of the trainer.
        prepare (`Callable[[Trainer], None]`, *optional*): Changes the trainer before training.
        rehearses (`bool`): Whether it gets prompts of further facts as `rehearsal_dataset`.
        about (`dict`): What of its settings `config` does not hold, as JSON values; with it a run is identified.
        family (`str`): What it is a setting of, where the report speaks of that as a whole.
    """

    name: str
    label: str
    trainer_class: type[Trainer] = SFTTrainer
    config: dict[str, Any] = {}
    rows: Callable[[Dataset, Dataset, int, random.Random], Dataset] = lambda known, new, num_rows, generator: (
        concatenate_datasets([known, new])
    )
    trainer_arguments: dict[str, Any] = {}
    prepare: Callable[[Trainer], None] | None = None
    rehearses: bool = False
    about: dict[str, Any] = {}
    family: str = ""


def methods_of(args: ComparisonArguments) -> list[Method]:
    """The methods to train, plain SFT first; self-distillation, alone and with rehearsal, for each λ and τ."""
    methods = []
    for name in sorted(args.methods, key=lambda name: name != "sft"):
        found = _METHODS[name](args)
        methods.extend(found if isinstance(found, list) else [found])
    return methods


def _self_distillation(args: ComparisonArguments) -> list[Method]:
    return [
        Method(
            f"selfdistill-lambda{kl_weight:g}-tau{temperature:g}",
            f"Self-distillation, λ = {kl_weight:g}, τ = {temperature:g}",
            SelfDistillSFTTrainer,
            {"kl_weight": kl_weight, "temperature": temperature},
            family=SELF_DISTILLATION,
        )
        for kl_weight in args.kl_weights
        for temperature in args.temperatures
    ]


def _rehearsal(args: ComparisonArguments) -> list[Method]:
    """Self-distillation with the model's own answers to further prompts, and these answers without the KL."""
    own = f"{args.num_rehearsal} own answers"
    stop = {"rehearsal_stop_strings": ["\n"]}  # an answer is a line; the start may not have learnt to stop after it
    without = Method("rehearsal", f"SFT with {own}", SelfDistillSFTTrainer, {"kl_weight": 0.0})
    settings = [
        method._replace(name=f"rehearsal-{method.name}", label=f"{method.label}, with {own}", family=WITH_OWN_ANSWERS)
        for method in _self_distillation(args)
    ]
    about = {"num_rehearsal": args.num_rehearsal}
    return [
        method._replace(config=method.config | stop, rehearses=True, about=about) for method in [without, *settings]
    ]


def _l2(args: ComparisonArguments) -> list[Method]:
    """The control with its weight matched to the KL one step from the start, which is too strong later, and others."""
    matched = Method("l2", "L2 to the start, matched", SelfDistillSFTTrainer, {"regularizer": "l2"})
    return [matched] + [
        matched._replace(
            name=f"l2-weight{weight:g}",
            label=f"L2 to the start, weight {weight:g}",
            config=matched.config | {"l2_weight": weight},
        )
        for weight in args.l2_weights
    ]


def _lora(args: ComparisonArguments) -> Method:
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"
    )
    return Method(
        "lora",
        f"LoRA, rank {args.lora_rank}",
        SFTTrainer,
        {"learning_rate": args.lora_learning_rate},
        trainer_arguments={"peft_config": adapter},
        about={"lora_rank": args.lora_rank},
    )


def _replay(args: ComparisonArguments) -> Method:
    def rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
        return concatenate_datasets([known] * args.replay_ratio + [new])

    about = {"replay_ratio": args.replay_ratio}
    return Method("replay", f"Replay of Known facts, {args.replay_ratio} times", rows=rows, about=about)


def _known_patch(args: ComparisonArguments) -> Method:
    """
    New facts alone first, then Known ones among them (KnownPatch, arXiv 2511.02626, which mixes 5 to 20 % of known
    examples into the last part). As many rows as in plain SFT.
    """

    def rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
        num_known, late = round(args.known_patch_ratio * num_rows), round(args.known_patch_share * num_rows)
        order_new = _cycled(range(len(known), len(known) + len(new)), num_rows - num_known, generator)
        order_known = _cycled(range(len(known)), num_known, generator)
        patch = order_new[num_rows - late :] + order_known
        generator.shuffle(patch)
        return concatenate_datasets([known, new]).select(order_new[: num_rows - late] + patch)

    return Method(
        "known_patch",
        f"KnownPatch, {100 * args.known_patch_ratio:g} % of all rows, in the last {100 * args.known_patch_share:g} %",
        config={"train_sampling_strategy": "sequential"},
        rows=rows,
        about={name: getattr(args, name) for name in ("known_patch_ratio", "known_patch_share")},
    )


def _cycled(items: range, number: int, generator: random.Random) -> list[int]:
    """`number` of `items`, each as often as the others (give or take one), shuffled anew in each round."""
    drawn: list[int] = []
    while len(drawn) < number:
        drawn += generator.sample(items, len(items))
    return drawn[:number]


def _stm(args: ComparisonArguments) -> Method:
    def prepare(trainer: Trainer) -> None:
        trainer.train_dataset = mask_unlikely_tokens(trainer.train_dataset, trainer.model, args.stm_max_perplexity)

    limit = args.stm_max_perplexity
    about = {"stm_max_perplexity": limit}
    return Method("stm", f"Masked tokens (STM), perplexity above {limit:g}", prepare=prepare, about=about)


_METHODS: dict[str, Callable[[ComparisonArguments], Method | list[Method]]] = {
    "sft": lambda args: Method("sft", "SFT"),
    "lora": _lora,
    "frozen": lambda args: Method(
        "frozen", "Frozen groups (attention only)", FrozenGroupsSFTTrainer, {"trainable_groups": ["attention"]}
    ),
    "l2": _l2,
    "replay": _replay,
    "known_patch": _known_patch,
    "stm": _stm,
    "selfdistill": _self_distillation,
    "rehearsal": _rehearsal,
}
