# SPDX-License-Identifier: Apache-2.0
"""The ways to train on new facts without losing old ones that are compared, each as what it changes in plain SFT.

All of them make as many optimizer steps of as many rows, on the same Known and new facts; a lower learning rate gets
as many more as it is lower.
"""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import compare_versions
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ...losses import IGNORE_INDEX
from ...slick.generation import evaluation_mode
from ...trainers import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer
from ...trainers.sft_internals import train_in_order
from ..arguments import check_different
from ..runs import Variant
from .eaft import EAFTSFTTrainer
from .l2_to_start import L2ToStartSFTTrainer


SELF_DISTILLATION = "Self-distillation"
WITH_OWN_ANSWERS = "Self-distillation with own answers"
# Replay: times that a Known fact is shown for a new one
REPLAY_RATIO = 3
# KnownPatch: share of all rows that are Known facts, and of the steps, at the end, that show them among new ones
KNOWN_PATCH_RATIO = 0.2
KNOWN_PATCH_SHARE = 0.3
# STM: largest perplexity of a trained token, the paper's
STM_MAX_PERPLEXITY = 2.5
# ASFT: weight of the KL, the paper's
ASFT_KL_WEIGHT = 0.05
_OF_NEWER_PEFT = ["mica", "intruders", "osf"] if compare_versions("peft", ">=", "0.21") else []
_NAMES = ["sft", "slow", "lora", *_OF_NEWER_PEFT, "frozen", "l2", "replay", "known_patch", "stm", "eaft", "asft"]
_NAMES += ["selfdistill", "rehearsal"]


@dataclass
class ComparisonArguments:
    """Which variants are compared, and their settings."""

    _argument_group_name = "comparison"

    variants: list[str] = field(
        default_factory=lambda: [*_NAMES],
        metadata={"help": "Variants to train. `sft` gives early stopping and the interpolations (WiSE-FT), too."},
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
        metadata={"help": "L2 to the start: weights beside the one that is matched to the KL at the start."},
    )
    slower: list[float] = field(
        default_factory=lambda: [2.0, 4.0, 8.0],
        metadata={"help": "SFT at a lower rate: by which the rate is divided, and the steps are multiplied."},
    )
    num_rehearsal: int = field(default=400, metadata={"help": "Rehearsal: prompts that the start model answers."})
    lora_rank: int = field(default=16, metadata={"help": "LoRA and MiCA: rank."})
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "LoRA and MiCA: learning rate."})

    def __post_init__(self):
        if set(self.variants) - {*_NAMES} or "sft" not in self.variants:
            raise ValueError(f"`variants` may hold {', '.join(_NAMES)}, and `sft` must be one, got {self.variants}.")
        check_different("seeds", self.seeds, at_least=3)
        for name in ("variants", "kl_weights", "temperatures", "mixing_weights", "slower"):
            check_different(name, getattr(self, name))
        check_different("l2_weights", self.l2_weights, at_least=0)
        if min(self.slower) <= 0:
            raise ValueError(f"`slower` must be above 0, got {self.slower}.")
        if not all(0 <= weight <= 1 for weight in self.mixing_weights):
            raise ValueError(f"`mixing_weights` must be shares in [0, 1], got {self.mixing_weights}.")


def variants_of(args: ComparisonArguments, answers: Dataset | None = None) -> list[Variant]:
    """
    The variants to train, plain SFT first; self-distillation, alone and with own answers, for each λ and τ.

    Args:
        args ([`ComparisonArguments`]): Which, and their settings.
        answers (`Dataset`, *optional*): The start model's own answers, rows of `prompt` and `completion`.
    """
    attention, in_order = {"trainable_groups": ["attention"]}, lambda trainer, folder: train_in_order(trainer)
    lora_rate, linear = {"learning_rate": args.lora_learning_rate}, {"target_modules": "all-linear"}
    linear |= {"task_type": "CAUSAL_LM"}
    lora, mica = (
        {"peft_config": LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, init_lora_weights=init, **linear)}
        for init in (True, "mica")
    )
    asft = {"loss_type": "dft", "kl_weight": ASFT_KL_WEIGHT, "temperature": 1.0}
    known_patch = f"KnownPatch, {100 * KNOWN_PATCH_RATIO:g} % of all rows, in the last {100 * KNOWN_PATCH_SHARE:g} %"
    stm = f"Masked tokens (STM), perplexity above {STM_MAX_PERPLEXITY:g}"
    found: dict[str, list[Variant]] = {
        "sft": [Variant("sft", "SFT")],
        "slow": [
            Variant(f"sft-slower{by:g}", f"SFT, 1/{by:g} of the rate, {by:g} times the steps", slower=by)
            for by in args.slower
        ],
        "lora": [Variant("lora", f"LoRA, rank {args.lora_rank}", changes=lora_rate, trainer_arguments=lora)],
        "mica": [Variant("mica", f"MiCA, rank {args.lora_rank}", changes=lora_rate, trainer_arguments=mica)],
        "intruders": [
            Variant(
                "intruders",
                f"LoRA, rank {args.lora_rank}, without intruder dimensions",
                changes=lora_rate,
                trainer_arguments=lora,
                prepare=_reduce_intruders,
            )
        ],
        "osf": _osf(linear) if "osf" in args.variants else [],
        "frozen": [Variant("frozen", "Frozen groups (attention only)", FrozenGroupsSFTTrainer, attention)],
        "l2": _l2(args),
        "replay": [Variant("replay", f"Replay of Known facts, {REPLAY_RATIO} times", rows=_replay_rows)],
        "known_patch": [Variant("known_patch", known_patch, rows=_known_patch_rows, prepare=in_order)],
        "stm": [Variant("stm", stm, prepare=_mask_unlikely)],
        "eaft": [Variant("eaft", "Entropy-adaptive (EAFT)", EAFTSFTTrainer)],
        "asft": [Variant("asft", f"ASFT: DFT and KL, λ = {ASFT_KL_WEIGHT:g}", SelfDistillSFTTrainer, asft)],
        "selfdistill": _self_distillation(args),
        "rehearsal": _rehearsal(args, answers),
    }
    return [variant for name in sorted(args.variants, key=lambda name: name != "sft") for variant in found[name]]


def _osf(options: dict[str, str]) -> list[Variant]:
    from peft import OSFConfig  # not in older ones

    return [Variant("osf", "Orthogonal subspace (OSF)", trainer_arguments={"peft_config": OSFConfig(**options)})]


def _self_distillation(args: ComparisonArguments) -> list[Variant]:
    return [
        Variant(
            f"selfdistill-lambda{kl_weight:g}-tau{temperature:g}",
            f"Self-distillation, λ = {kl_weight:g}, τ = {temperature:g}",
            SelfDistillSFTTrainer,
            {"kl_weight": kl_weight, "temperature": temperature},
            family=SELF_DISTILLATION,
        )
        for kl_weight in args.kl_weights
        for temperature in args.temperatures
    ]


def _rehearsal(args: ComparisonArguments, answers: Dataset | None) -> list[Variant]:
    """Self-distillation with the start model's own answers to further prompts, and these answers without the KL."""
    own = f"{args.num_rehearsal} own answers"

    def rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
        return concatenate_datasets([known, new, answers])

    variants = [Variant("rehearsal", f"SFT with {own}")]
    variants += [
        variant._replace(
            name=f"rehearsal-{variant.name}", label=f"{variant.label}, with {own}", family=WITH_OWN_ANSWERS
        )
        for variant in _self_distillation(args)
    ]
    about = {"num_rehearsal": args.num_rehearsal}
    return [variant._replace(rows=rows, about=about) for variant in variants]


def _l2(args: ComparisonArguments) -> list[Variant]:
    """The weight that is matched to the KL one step from the start, which is too strong later, and other weights."""
    variants = [Variant("l2", "L2 to the start, matched", L2ToStartSFTTrainer)]
    for weight in args.l2_weights:
        name, label, setting = f"l2-weight{weight:g}", f"L2 to the start, weight {weight:g}", {"l2_weight": weight}
        variants.append(Variant(name, label, L2ToStartSFTTrainer, trainer_arguments=setting, about=setting))
    return variants


def _replay_rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
    """Each new fact once, each Known fact [`REPLAY_RATIO`] times."""
    return concatenate_datasets([known] * REPLAY_RATIO + [new])


def _known_patch_rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
    """
    New facts alone first, then Known ones among them (KnownPatch, arXiv 2511.02626, which mixes 5 to 20 % of known
    examples into the last part). As many rows as in plain SFT, in the order in which they are shown.
    """
    num_known, late = round(KNOWN_PATCH_RATIO * num_rows), round(KNOWN_PATCH_SHARE * num_rows)
    order_new = _cycled(range(len(known), len(known) + len(new)), num_rows - num_known, generator)
    order_known = _cycled(range(len(known)), num_known, generator)
    patch = order_new[num_rows - late :] + order_known
    generator.shuffle(patch)
    return concatenate_datasets([known, new]).select(order_new[: num_rows - late] + patch)


def _cycled(items: range, number: int, generator: random.Random) -> list[int]:
    """`number` of `items`, each as often as the others (give or take one), shuffled anew in each round."""
    drawn: list[int] = []
    while len(drawn) < number:
        drawn += generator.sample(items, len(items))
    return drawn[:number]


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


def mask_unlikely_tokens(dataset: Dataset, model: PreTrainedModel, max_perplexity: float) -> Dataset:
    """
    Takes the labels off the tokens that a model finds unlikely (selective token masking, arXiv 2501.14315).

    Args:
        dataset (`Dataset`): Tokenized, with `input_ids` and `labels`, as [`~trl.SFTTrainer`] prepares it.
        model ([`~transformers.PreTrainedModel`]): The model before training.
        max_perplexity (`float`): The largest perplexity, one over the probability, of a token that keeps its label.

    Raises:
        ValueError: If no label is left.
    """

    def mask(rows: dict) -> dict:
        # Padding comes after the row, where a causal model does not see it
        input_ids = pad_sequence([torch.tensor(ids) for ids in rows["input_ids"]], batch_first=True).to(model.device)
        log_probs = model(input_ids=input_ids).logits[:, :-1].float().log_softmax(-1)
        log_probs = log_probs.gather(-1, input_ids[:, 1:, None])[..., 0].cpu()
        unlikely = torch.nn.functional.pad(-log_probs > math.log(max_perplexity), (1, 0))  # not the first token
        labels = [
            torch.tensor(row).masked_fill(masked[: len(row)], IGNORE_INDEX).tolist()
            for row, masked in zip(rows["labels"], unlikely, strict=True)
        ]
        return {"labels": labels}

    with evaluation_mode(model):
        masked = dataset.map(mask, batched=True, batch_size=32, load_from_cache_file=False)
    if not any(label != IGNORE_INDEX for row in masked["labels"] for label in row):
        raise ValueError(f"`max_perplexity={max_perplexity}` leaves no token to train on. Raise it.")
    return masked
