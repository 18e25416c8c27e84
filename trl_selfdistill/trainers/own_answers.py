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
    stop_strings: Sequence[str] | None = None,
    batch_size: int = 8,
) -> Dataset:
    """
    What a model answers to prompts, greedily, as rows to concatenate with a prompt-completion dataset.

    The rows are texts, or messages for conversations: [`~trl.SFTTrainer`] tokenizes them like the other rows, and adds
    the end of sequence, or the turn's end of the chat template.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model before training.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, or its processor.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): Texts or conversations, in the form of the training data.
        max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer, in tokens. Longer ones are left out.
        stop_strings (`Sequence[str]`, *optional*): What ends an answer beside the end of sequence, such as a newline
            for a model that has not learnt to stop. The answer is what comes before.
        batch_size (`int`, *optional*, defaults to `8`): Prompts that are answered at once.

    Returns:
        `Dataset` with the columns `prompt` and `completion`, in the order of `prompts`, without answers that are empty
        or have no end.

    Raises:
        ValueError: If no answer is left.
    """
    is_conversation = not isinstance(prompts[0], str)
    token_ids = tokenize_prompts(tokenizer, prompts)
    tokenizer = text_tokenizer(tokenizer)
    model_eos = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(model_eos if isinstance(model_eos, list) else [model_eos])} - {None}
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stop_ids))
    config.update(pad_token_id=min(stop_ids, default=0), stop_strings=list(stop_strings) if stop_strings else None)

    def answer(start: int) -> list[str | None]:
        asked = token_ids[start : start + batch_size]
        written = zip(asked, generate_tokens(model, asked, config, tokenizer=tokenizer), strict=True)
        return [_ended_text(tokenizer, prompt[-1:], ids, stop_ids, stop_strings or ()) for prompt, ids in written]

    with evaluation_mode(model):
        batches = map_in_parallel(answer, range(0, len(prompts), batch_size))
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}] if is_conversation else text}
        for prompt, text in zip(prompts, chain.from_iterable(batches), strict=True)
        if text
    ]
    left_out = f"{len(prompts) - len(rows)} of the model's {len(prompts)} answers are empty or have no end within "
    left_out += f"`max_new_tokens={max_new_tokens}` and are left out."
    if not rows:
        raise ValueError(f"{left_out} Raise it, set `stop_strings`, or give prompts in the model's training format.")
    if len(rows) < len(prompts):
        logger.warning(left_out)
    return Dataset.from_list(rows)


def _ended_text(tokenizer, last: list[int], ids: list[int], stop_ids: set[int], stop_strings) -> str | None:
    """What follows the `last` token of a prompt, up to what ends it; `None` if that is blank or has no end."""
    is_over = ids[-1] in stop_ids
    both, options = [last, last + (ids[:-1] if is_over else ids)], {"clean_up_tokenization_spaces": False}
    before, text = tokenizer.batch_decode(both, skip_special_tokens=True, **options)
    text = text[len(before) :]  # alone, some decoders would drop its first blank
    ends = [text.index(string) for string in stop_strings if string in text]
    text = text[: min(ends)] if ends else text
    return text if (is_over or ends) and text.strip() else None
