# SPDX-License-Identifier: Apache-2.0
"""The ways to train on new facts without losing old ones that are compared, each as what it changes in plain SFT.

All of them make as many optimizer steps of as many rows, on the same Known and new facts, unless their label names
another number; a lower learning rate gets as many more as it is lower.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import compare_versions
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from ...trainers import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer
from ...trainers.sft_internals import train_in_order
from ..arguments import check_different
from ..runs import Variant
from .eaft import EAFTSFTTrainer
from .l2_to_start import L2ToStartSFTTrainer
from .rows import (
    KNOWN_PATCH_RATIO,
    KNOWN_PATCH_SHARE,
    REPLAY_RATIO,
    known_patch_rows,
    mask_unlikely_tokens,
    replay_rows,
)


# STM: largest perplexity of a trained token, the paper's
STM_MAX_PERPLEXITY = 2.5
# ASFT: weight of the KL, the paper's
ASFT_KL_WEIGHT = 0.05
# CorDA: rows of Known facts that show which directions their answers use
CORDA_ROWS = 256
# The kinds of remedies, in the order of the table
SFT, LOWER_RATE, WISE_FT = "SFT", "Lower rate", "WiSE-FT"
ADAPTERS, PARTS = "Adapters", "Parts of the weights"
KNOWN_AGAIN, LOSSES, SELF_DISTILLATION = "Known facts again", "Other losses", "Self-distillation"
OWN_ANSWERS, ANCHORS = "Own answers", "KL on anchors"
_OF_NEWER_PEFT = ["mica", "intruders", "osf"] if compare_versions("peft", ">=", "0.21") else []
_NAMES = ["sft", "slow", "lora", "corda", *_OF_NEWER_PEFT, "frozen", "l2", "replay", "known_patch", "stm", "eaft"]
_NAMES += ["asft", "selfdistill", "own_answers", "kl_anchors", "self_anchors"]
USE_PROMPTS = {"own_answers", "kl_anchors"}


@dataclass
class ComparisonArguments:
    """Which variants are compared, and their settings."""

    _argument_group_name = "comparison"

    variants: list[str] = field(
        default_factory=lambda: [*_NAMES],
        metadata={"help": "Variants to train. `sft` gives early stopping, too."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the training's order, at least 3."}
    )
    settings: list[str] = field(
        default_factory=lambda: ["0.3/1", "1/0.5", "0.7/1/3"],
        metadata={"help": "Self-distillation, alone and with own answers: λ/τ, or λ/τ/times the steps."},
    )
    anchor_settings: list[str] = field(
        default_factory=lambda: ["1/0", "1/0.3"],
        metadata={
            "help": "Anchors with a KL of their own, τ = 1: their weight/λ of the rows, or that/times the steps."
        },
    )
    num_anchors: list[int] = field(
        default_factory=lambda: [400], metadata={"help": "KL on anchors: numbers of prompts."}
    )
    num_own_answers: int = field(default=400, metadata={"help": "Own answers: prompts that the start model answers."})
    anchor_facts: str | None = field(
        default=None,
        metadata={"help": "A facts file whose questions are the prompts. By default the facts that are in no split."},
    )
    anchor_max_new_tokens: int = field(default=32, metadata={"help": "Longest text of the anchors `self`, in tokens."})
    mixed: list[str] = field(
        default_factory=lambda: ["sft"],
        metadata={"help": "Variants, by the names of their folders, whose weights are mixed with the start's."},
    )
    mixing_weights: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.6, 0.8],
        metadata={"help": "WiSE-FT: shares of the fine-tuned weights, the rest being those of the start, in [0, 1]."},
    )
    l2_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "L2 to the start: weights beside the one that is matched to the KL at the start."},
    )
    slower: list[float] = field(
        default_factory=lambda: [2.0, 4.0, 8.0],
        metadata={"help": "SFT at a lower rate: by which the rate is divided, and the steps are multiplied."},
    )
    lora_rank: int = field(default=16, metadata={"help": "LoRA, MiCA and CorDA: rank."})
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "LoRA, MiCA and CorDA: learning rate."})
    equal_time: float | None = field(
        default=None,
        metadata={"help": "A second table, in which each variant trains for so many times the processor time of SFT."},
    )

    def __post_init__(self):
        if set(self.variants) - {*_NAMES} or "sft" not in self.variants:
            raise ValueError(f"`variants` may hold {', '.join(_NAMES)}, and `sft` must be one, got {self.variants}.")
        check_different("seeds", self.seeds, at_least=3)
        for name in ("variants", "settings", "anchor_settings", "num_anchors", "mixing_weights", "slower"):
            check_different(name, getattr(self, name))
        check_different("l2_weights", self.l2_weights, at_least=0)
        for name in ("settings", "anchor_settings"):
            self.parse(name)
        if min(*self.slower, *self.num_anchors, self.num_own_answers, self.equal_time or 1) <= 0:
            raise ValueError(
                "`slower`, `num_anchors`, `num_own_answers` and `equal_time` must be above 0, got "
                f"{self.slower}, {self.num_anchors}, {self.num_own_answers} and {self.equal_time}."
            )
        if not all(0 <= weight <= 1 for weight in self.mixing_weights):
            raise ValueError(f"`mixing_weights` must be shares in [0, 1], got {self.mixing_weights}.")

    def parse(self, name: str) -> list[tuple[float, float, float]]:
        """The settings of that argument as numbers, the last the times of the steps, 1 if it is not given."""
        settings = getattr(self, name)
        try:
            parsed = [[*map(float, setting.split("/"))] for setting in settings]
            return [(first, second, *(rest or [1.0])) for first, second, *rest in parsed]
        except ValueError as error:
            raise ValueError(f"`{name}` are two or three numbers each, as in 0.7/1/3, got {settings}.") from error


def variants_of(
    args: ComparisonArguments, prompts: list[str] | None = None, answers: Dataset | None = None
) -> list[Variant]:
    """
    The variants to train, plain SFT first.

    Args:
        args ([`ComparisonArguments`]): Which, and their settings.
        prompts (`list[str]`, *optional*): Prompts without labels.
        answers (`Dataset`, *optional*): The start model's own answers, rows of `prompt` and `completion`.
    """
    in_order = {"prepare": lambda trainer, folder: train_in_order(trainer)}
    linear = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    options = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank}
    rate = {"learning_rate": args.lora_learning_rate}

    def adapter(name: str, label: str, init: bool | str = True, **hooks) -> Variant:
        config = {"peft_config": LoraConfig(**options, **linear, init_lora_weights=init)}
        label = label.replace("rank", f"rank {args.lora_rank}")
        return Variant(name, label, changes=rate, trainer_arguments=config, group=ADAPTERS, **hooks)

    def corda(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> LoraConfig:
        return _corda(model, tokenizer, rows, options)

    asft = {"loss_type": "dft", "kl_weight": ASFT_KL_WEIGHT, "temperature": 1.0}
    known_patch = f"KnownPatch, {100 * KNOWN_PATCH_RATIO:g} % of all rows, in the last {100 * KNOWN_PATCH_SHARE:g} %"
    stm = f"Masked tokens (STM), perplexity above {STM_MAX_PERPLEXITY:g}"
    found = {
        "sft": lambda: [Variant("sft", "SFT", group=SFT)],
        "slow": lambda: [
            Variant(f"sft-slower{by:g}", f"SFT, 1/{by:g} of the rate", rate=1 / by, steps=by, group=LOWER_RATE)
            for by in args.slower
        ],
        "lora": lambda: [adapter("lora", "LoRA, rank")],
        "corda": lambda: [
            Variant("corda", f"CorDA, rank {args.lora_rank}", changes=rate, adapter=corda, group=ADAPTERS)
        ],
        "mica": lambda: [adapter("mica", "MiCA, rank", "mica")],
        "intruders": lambda: [adapter("intruders", "LoRA, rank, without intruders", prepare=_reduce_intruders)],
        "osf": lambda: [_osf(linear)],
        "frozen": lambda: [
            Variant(
                "frozen", "Attention only", FrozenGroupsSFTTrainer, {"trainable_groups": ["attention"]}, group=PARTS
            )
        ],
        "l2": lambda: _l2(args),
        "replay": lambda: [
            Variant("replay", f"Replay of Known facts, {REPLAY_RATIO} times", rows=replay_rows, group=KNOWN_AGAIN)
        ],
        "known_patch": lambda: [
            Variant("known_patch", known_patch, rows=known_patch_rows, group=KNOWN_AGAIN, **in_order)
        ],
        "stm": lambda: [Variant("stm", stm, prepare=_mask_unlikely, group=LOSSES)],
        "eaft": lambda: [Variant("eaft", "Entropy-adaptive (EAFT)", EAFTSFTTrainer, group=LOSSES)],
        "asft": lambda: [
            Variant("asft", f"ASFT: DFT and KL, λ = {ASFT_KL_WEIGHT:g}", SelfDistillSFTTrainer, asft, group=LOSSES)
        ],
        "selfdistill": lambda: _self_distillation(args),
        "own_answers": lambda: _own_answers(args, answers),
        "kl_anchors": lambda: _kl_anchors(args, prompts),
        "self_anchors": lambda: _anchors(
            args, "self", "Self-samples", anchor_max_new_tokens=args.anchor_max_new_tokens
        ),
    }
    return [variant for name in sorted(args.variants, key=lambda name: name != "sft") for variant in found[name]()]


def _corda(model: PreTrainedModel, tokenizer, rows: Dataset, options: dict[str, int]) -> LoraConfig:
    """CorDA (arXiv 2406.05223) that keeps what the Known facts, which come first among the rows, use."""
    linear = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    linear = {"target_modules": sorted(linear - {"lm_head"}), "task_type": "CAUSAL_LM"}
    config = LoraConfig(**options, **linear, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))

    def run() -> None:
        for row in rows.select(range(min(CORDA_ROWS, len(rows)))):
            model(**tokenizer(row["prompt"] + row["completion"], return_tensors="pt").to(model.device))

    preprocess_corda(model, config, run)
    return config


def _osf(options: dict[str, str]) -> Variant:
    from peft import OSFConfig  # not in older ones

    return Variant(
        "osf", "Orthogonal subspace (OSF)", trainer_arguments={"peft_config": OSFConfig(**options)}, group=ADAPTERS
    )


def _self_distillation(args: ComparisonArguments) -> list[Variant]:
    return [
        Variant(
            f"selfdistill-lambda{kl_weight:g}-tau{temperature:g}",
            f"Self-distillation, λ = {kl_weight:g}, τ = {temperature:g}",
            SelfDistillSFTTrainer,
            {"kl_weight": kl_weight, "temperature": temperature},
            group=SELF_DISTILLATION,
            steps=times,
        )
        for kl_weight, temperature, times in args.parse("settings")
    ]


def _own_answers(args: ComparisonArguments, answers: Dataset | None) -> list[Variant]:
    """Self-distillation with the start model's own answers to further prompts, and these answers without the KL."""
    about = {"num_own_answers": args.num_own_answers}

    def rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
        return concatenate_datasets([known, new, answers])

    variants = [Variant("own_answers", "SFT"), *_self_distillation(args)]
    return [
        variant._replace(
            name=f"own_answers-{variant.name}".replace("-own_answers", ""),
            label=f"{variant.label}, {args.num_own_answers} own answers",
            rows=rows,
            about=about,
            group=OWN_ANSWERS,
        )
        for variant in variants
    ]


def _kl_anchors(args: ComparisonArguments, prompts: list[str] | None) -> list[Variant]:
    return [
        variant._replace(trainer_arguments={"anchor_dataset": Dataset.from_dict({"prompt": prompts[:number]})})
        for number in args.num_anchors
        for variant in _anchors(args, "kl", f"KL on {number} prompts", str(number))
    ]


def _anchors(args: ComparisonArguments, kind: str, label: str, number: str = "", **changes) -> list[Variant]:
    """Self-distillation on anchors of a kind, and on the training rows with a weight λ of their own."""
    return [
        Variant(
            f"{kind}_anchors{number}-weight{weight:g}-lambda{kl_weight:g}",
            label
            + (f", weight {weight:g}" if weight != 1 else "")
            + (f", rows λ = {kl_weight:g}" if kl_weight else ""),
            SelfDistillSFTTrainer,
            {"anchors": kind, "anchor_weight": weight, "kl_weight": kl_weight, "temperature": 1.0, **changes},
            about={"num_anchors": number},
            group=ANCHORS,
            steps=times,
        )
        for weight, kl_weight, times in args.parse("anchor_settings")
    ]


def _l2(args: ComparisonArguments) -> list[Variant]:
    """The weight that is matched to the KL one step from the start, which is too strong later, and other weights."""
    variants = [Variant("l2", "L2 to the start, matched", L2ToStartSFTTrainer, group=PARTS)]
    for weight in args.l2_weights:
        setting = {"trainer_arguments": {"l2_weight": weight}, "about": {"l2_weight": weight}, "group": PARTS}
        label = f"L2 to the start, weight {weight:g}"
        variants.append(Variant(f"l2-weight{weight:g}", label, L2ToStartSFTTrainer, **setting))
    return variants


class _ReduceIntruders(TrainerCallback):
    """Takes intruder dimensions out of a LoRA adapter at the end of training (arXiv 2410.21228), as PEFT does."""

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if control.should_training_stop:
            from peft.tuners.lora.intruders import reduce_intruder_dimension  # not in older ones

            reduce_intruder_dimension(model, logging_sink=None)


def _reduce_intruders(trainer: Trainer, folder: Path) -> None:
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, _ReduceIntruders())  # before the one that asks the facts


def _mask_unlikely(trainer: Trainer, folder: Path) -> None:
    trainer.train_dataset = mask_unlikely_tokens(trainer.train_dataset, trainer.model, STM_MAX_PERPLEXITY)
