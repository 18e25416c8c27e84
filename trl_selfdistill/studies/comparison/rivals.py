# SPDX-License-Identifier: Apache-2.0
"""The ways to train on new facts without losing old ones that are compared, each as what it changes in plain SFT.

All of them make as many optimizer steps of as many rows, on the same Known and new facts, unless their label names
another number; a lower learning rate gets as many more as it is lower.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ...losses import IGNORE_INDEX
from ...slick.generation import evaluation_mode
from ...trainers import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer
from ...trainers.sft_internals import train_in_order
from ..runs import Variant
from ..synthetic.facts import shuffled_rounds
from .arguments import GROUPS, ComparisonArguments
from .losses import EAFTSFTTrainer, L2ToStartSFTTrainer


REPLAY_RATIO = 3  # times that a Known fact is shown for a new one
# KnownPatch: share of all rows that are Known facts, and of the steps, at the end, that show them among new ones
KNOWN_PATCH_RATIO = 0.2
KNOWN_PATCH_SHARE = 0.3
STM_MAX_PERPLEXITY = 2.5  # largest of a trained token, the paper's
ASFT_KL_WEIGHT = 0.05  # the paper's
CORDA_ROWS = 256  # of Known facts, which show the directions that their answers use


def variants_of(
    args: ComparisonArguments, prompts: Sequence[str] = (), answers: Dataset | None = None
) -> list[Variant]:
    """
    The variants to train, plain SFT first. KL on anchors takes prompts without labels, and own answers what the start
    model answers to some, rows of `prompt` and `completion`.
    """
    attention, in_order = {"trainable_groups": ["attention"]}, lambda trainer, folder: train_in_order(trainer)
    asft = {"loss_type": "dft", "kl_weight": ASFT_KL_WEIGHT, "temperature": 1.0}
    known_patch = f"KnownPatch, {100 * KNOWN_PATCH_RATIO:g} % of all rows, in the last {100 * KNOWN_PATCH_SHARE:g} %"
    stm = f"Masked tokens (STM), perplexity above {STM_MAX_PERPLEXITY:g}"
    found: dict[str, list[Variant]] = {
        "sft": [Variant("sft", "SFT")],
        "slow": [
            Variant(f"sft-slower{by:g}", f"SFT, 1/{by:g} of the rate", rate=1 / by, steps=by) for by in args.slower
        ],
        **_adapters(args),
        "frozen": [Variant("frozen", "Attention only", FrozenGroupsSFTTrainer, attention)],
        "l2": _l2(args),
        "replay": [Variant("replay", f"Replay of Known facts, {REPLAY_RATIO} times", rows=replay_rows)],
        "known_patch": [Variant("known_patch", known_patch, rows=known_patch_rows, prepare=in_order)],
        "stm": [Variant("stm", stm, prepare=_mask_unlikely)],
        "eaft": [Variant("eaft", "Entropy-adaptive (EAFT)", EAFTSFTTrainer)],
        "asft": [Variant("asft", f"ASFT: DFT and KL, λ = {ASFT_KL_WEIGHT:g}", SelfDistillSFTTrainer, asft)],
        "selfdistill": _self_distillation(args.parsed["settings"]),
        "own_answers": _own_answers(args, answers),
        "kl_anchors": [variant for number in args.num_anchors for variant in _kl_anchors(args, prompts[:number])],
        "self_anchors": _anchors(args, "self", "KL on self-samples", anchor_max_new_tokens=args.self_anchor_tokens),
    }
    names = sorted(args.variants, key=lambda name: name != "sft")
    return [variant._replace(group=GROUPS[name]) for name in names for variant in found[name]]


def _adapters(args: ComparisonArguments) -> dict[str, list[Variant]]:
    rank, linear = f"rank {args.lora_rank}", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    options = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, **linear}
    lora, mica = ({"peft_config": LoraConfig(init_lora_weights=init, **options)} for init in (True, "mica"))
    corda = {"peft_config": partial(_corda, options)}
    plain = Variant("lora", f"LoRA, {rank}", trainer_arguments=lora, about={"lora_rank": args.lora_rank})
    plain = plain._replace(changes={"learning_rate": args.lora_learning_rate})
    without_intruders = {"label": f"{plain.label}, without intruders", "prepare": _reduce_intruders}
    found = {
        "lora": [plain],
        "corda": [plain._replace(name="corda", label=f"CorDA, {rank}", trainer_arguments=corda)],
        "mica": [plain._replace(name="mica", label=f"MiCA, {rank}", trainer_arguments=mica)],
        "intruders": [plain._replace(name="intruders", **without_intruders)],
    }
    if "osf" in args.variants:
        from peft import OSFConfig  # not in older ones

        osf = {"peft_config": OSFConfig(**linear)}
        found["osf"] = [Variant("osf", "Orthogonal subspace (OSF)", trainer_arguments=osf)]
    return found


def _corda(options: dict[str, Any], model: PreTrainedModel, tokenizer, known: Dataset) -> LoraConfig:
    """CorDA (arXiv 2406.05223) in its knowledge-preserving mode: what the Known facts use is kept."""
    linear = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    options = options | {"target_modules": sorted(linear - {"lm_head"}), "init_lora_weights": "corda"}
    config = LoraConfig(**options, corda_config=CordaConfig(corda_method="kpm"))

    def run() -> None:
        for row in known.select(range(min(CORDA_ROWS, len(known)))):
            model(**tokenizer(row["prompt"] + row["completion"], return_tensors="pt").to(model.device))

    preprocess_corda(model, config, run)
    return config


def _self_distillation(settings: list[tuple[float, float, float]]) -> list[Variant]:
    return [
        Variant(
            f"selfdistill-lambda{kl_weight:g}-tau{temperature:g}",
            f"Self-distillation, λ = {kl_weight:g}, τ = {temperature:g}",
            SelfDistillSFTTrainer,
            {"kl_weight": kl_weight, "temperature": temperature},
            steps=times,
        )
        for kl_weight, temperature, times in settings
    ]


def _own_answers(args: ComparisonArguments, answers: Dataset | None) -> list[Variant]:
    """Self-distillation with the start model's own answers to further prompts, and these answers without the KL."""
    own = f"{args.num_own_answers} own answers"

    def rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
        return concatenate_datasets([known, new, answers])

    variants = [Variant("own_answers", f"SFT, {own}")]
    variants += [
        variant._replace(name=f"own_answers-{variant.name}", label=f"{variant.label}, {own}")
        for variant in _self_distillation(args.parsed["own_answers_settings"])
    ]
    about = {"num_own_answers": args.num_own_answers, "sha256": _hash(answers["completion"][:] if answers else [])}
    return [variant._replace(rows=rows, about=about) for variant in variants]


def _hash(texts: Sequence[str]) -> str:
    """Other texts are another run."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _kl_anchors(args: ComparisonArguments, prompts: Sequence[str]) -> list[Variant]:
    given = {"anchor_dataset": Dataset.from_dict({"prompt": [*prompts]})}
    variants = _anchors(args, "kl", f"KL on {len(prompts):,} prompts")
    about = {"num_prompts": len(prompts), "sha256": _hash(prompts)}
    return [
        variant._replace(name=f"{variant.name}-{len(prompts)}", trainer_arguments=given, about=about)
        for variant in variants
    ]


def _anchors(args: ComparisonArguments, kind: str, label: str, **changes) -> list[Variant]:
    """A KL on anchors of a kind, and on the training rows with a weight λ of their own."""

    def named(weight: float, kl_weight: float) -> str:
        return label + f", weight {weight:g}" * (weight != 1) + f", λ = {kl_weight:g} on rows" * (kl_weight != 0)

    return [
        Variant(
            f"{kind}_anchors-weight{weight:g}-lambda{kl_weight:g}",
            named(weight, kl_weight),
            SelfDistillSFTTrainer,
            {"anchors": kind, "anchor_weight": weight, "kl_weight": kl_weight, "temperature": 1.0, **changes},
            steps=times,
        )
        for weight, kl_weight, times in args.parsed["anchor_settings"]
    ]


def _l2(args: ComparisonArguments) -> list[Variant]:
    """The weight that is matched to the KL one step from the start, which is too strong later, and other weights."""
    variants = [Variant("l2", "L2 to the start, matched", L2ToStartSFTTrainer)]
    for weight in args.l2_weights:
        name, label, setting = f"l2-weight{weight:g}", f"L2 to the start, weight {weight:g}", {"l2_weight": weight}
        variants.append(Variant(name, label, L2ToStartSFTTrainer, trainer_arguments=setting, about=setting))
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


def replay_rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
    """Each new fact once, each Known fact [`REPLAY_RATIO`] times."""
    return concatenate_datasets([known] * REPLAY_RATIO + [new])


def known_patch_rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
    """
    New facts alone first, then Known ones among them (KnownPatch, arXiv 2511.02626, which mixes 5 to 20 % of known
    examples into the last part). As many rows as in plain SFT, in the order in which they are shown.
    """
    num_known, late = round(KNOWN_PATCH_RATIO * num_rows), round(KNOWN_PATCH_SHARE * num_rows)
    rows_of_new = range(len(known), len(known) + len(new))
    order_new = [*islice(shuffled_rounds(rows_of_new, generator), num_rows - num_known)]
    order_known = [*islice(shuffled_rounds(range(len(known)), generator), num_known)]
    patch = order_new[num_rows - late :] + order_known
    generator.shuffle(patch)
    return concatenate_datasets([known, new]).select(order_new[: num_rows - late] + patch)


def mask_unlikely_tokens(dataset: Dataset, model: PreTrainedModel, max_perplexity: float) -> Dataset:
    """
    Takes the labels off the tokens that the model before training finds unlikely (selective token masking, arXiv
    2501.14315). [`~trl.SFTTrainer`] has prepared `dataset`; `max_perplexity` is the largest perplexity, one over the
    probability, of a token that keeps its label. A `ValueError` if none does.
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
