# SPDX-License-Identifier: Apache-2.0
"""Pseudo-rehearsal: a model's own answers to prompts, to be trained on among new data so that they are not forgotten.

Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal" (1995).
"""

from collections.abc import Sequence
from itertools import chain

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..slick.generation import evaluation_mode, generate_tokens
from ..slick.process_sharding import map_in_parallel
from ..slick.prompt_tokens import text_tokenizer, tokenize_prompts


logger = logging.get_logger(__name__)


def own_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> Dataset:
    """
    What a model answers to prompts, greedily, as rows to concatenate with a prompt-completion dataset.

    The rows are texts, or messages for conversations: [`~trl.SFTTrainer`] tokenizes them like the other rows, and adds
    the end of sequence, or the turn's end of the chat template.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model before training. What ends an answer is in its generation config.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, or its processor.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): Texts or conversations, in the form of the training data.
        max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer, in tokens. Longer ones are left out.
        batch_size (`int`, *optional*, defaults to `8`): Prompts that are answered at once.

    Returns:
        `Dataset` with the columns `prompt` and `completion`, in the order of `prompts`, without answers that are empty
        or have no end.

    Raises:
        ValueError: If no answer is left.
    """
    token_ids = tokenize_prompts(tokenizer, prompts)
    tokenizer = text_tokenizer(tokenizer)
    stop_ids = end_ids(model, tokenizer)
    ends = {"eos_token_id": stop_ids, "pad_token_id": min(stop_ids, default=0)}
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **ends)

    def answer(start: int) -> list[str]:
        written = generate_tokens(model, token_ids[start : start + batch_size], config)
        ended = [ids[:-1] if ids[-1] in stop_ids else [] for ids in written]
        return tokenizer.batch_decode(ended, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    with evaluation_mode(model):
        answers = chain.from_iterable(map_in_parallel(answer, range(0, len(prompts), batch_size)))
    rows = [
        {"prompt": prompt, "completion": text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]}
        for prompt, text in zip(prompts, answers, strict=True)
        if text.strip()
    ]
    left_out = (
        f"{len(prompts) - len(rows)} of the model's {len(prompts)} answers are empty or have no end within "
        f"`max_new_tokens={max_new_tokens}` and are left out."
    )
    if not rows:
        raise ValueError(
            f"{left_out} Raise it, or give prompts in the format in which the model has learnt to answer."
        )
    if len(rows) < len(prompts):
        logger.warning(left_out)
    return Dataset.from_list(rows)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end what a model writes: those of its generation config, and the tokenizer's."""
    model_eos = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(model_eos if isinstance(model_eos, list) else [model_eos])} - {None})
