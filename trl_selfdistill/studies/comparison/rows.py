# SPDX-License-Identifier: Apache-2.0
"""Rivals that train on other rows, or on fewer of their tokens."""

import math
import random

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ...losses import IGNORE_INDEX
from ...slick.generation import evaluation_mode


# Replay: times that a Known fact is shown for a new one
REPLAY_RATIO = 3
# KnownPatch: share of all rows that are Known facts, and of the steps, at the end, that show them among new ones
KNOWN_PATCH_RATIO = 0.2
KNOWN_PATCH_SHARE = 0.3


def replay_rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
    """Each new fact once, each Known fact [`REPLAY_RATIO`] times."""
    return concatenate_datasets([known] * REPLAY_RATIO + [new])


def known_patch_rows(known: Dataset, new: Dataset, num_rows: int, generator: random.Random) -> Dataset:
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
