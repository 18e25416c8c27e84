# SPDX-License-Identifier: Apache-2.0
"""Selective token masking (STM, arXiv 2501.14315): tokens that the start model finds unlikely are not trained on."""

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ...losses import IGNORE_INDEX
from ...slick.generation import evaluation_mode


def mask_unlikely_tokens(
    dataset: Dataset, model: PreTrainedModel, max_perplexity: float, batch_size: int = 32
) -> Dataset:
    """
    Takes the labels off the tokens whose perplexity under `model`, one over their probability, is above a limit.

    Args:
        dataset (`Dataset`): Tokenised, with `input_ids` and `labels`, as [`~trl.SFTTrainer`] prepares it.
        model ([`~transformers.PreTrainedModel`]): The model before training.
        max_perplexity (`float`): The limit, at least 1; infinity masks nothing. The paper's is 2.5.
        batch_size (`int`, *optional*, defaults to `32`): Rows in one forward pass.

    Raises:
        `ValueError`: If `max_perplexity` is below 1, or no label is left.
    """
    if not max_perplexity >= 1:
        raise ValueError(f"`max_perplexity` must be at least 1 (what is certain), got {max_perplexity}.")

    def mask(rows: dict) -> dict:
        width = max(map(len, rows["input_ids"]))
        pad = lambda values, fill: torch.tensor([[*row, *[fill] * (width - len(row))] for row in values])  # noqa: E731
        # Pads come after the row, where a causal model does not see them
        input_ids, labels = pad(rows["input_ids"], 0).to(model.device), pad(rows["labels"], IGNORE_INDEX)
        log_probs = model(input_ids=input_ids).logits[:, :-1].float().log_softmax(-1)
        log_probs = log_probs.gather(-1, input_ids[:, 1:, None])[..., 0].cpu()
        unlikely = torch.zeros_like(labels, dtype=torch.bool)
        unlikely[:, 1:] = -log_probs > torch.tensor(max_perplexity).log()
        labels[unlikely] = IGNORE_INDEX
        return {"labels": [row[: len(ids)].tolist() for row, ids in zip(labels, rows["input_ids"], strict=True)]}

    with evaluation_mode(model):
        masked = dataset.map(mask, batched=True, batch_size=batch_size, load_from_cache_file=False)
    if not any(label != IGNORE_INDEX for row in masked["labels"] for label in row):
        raise ValueError(f"`max_perplexity={max_perplexity}` leaves no token to train on. Raise it.")
    return masked
