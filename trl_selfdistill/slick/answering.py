# SPDX-License-Identifier: Apache-2.0
"""Answers to many prompts: all processes share the work, a bar shows how far it is, and a stopped run goes on."""

import os
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generation import predict_answers
from .process_sharding import ProgressFile, checksum, weights_checksum


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress_file: str | os.PathLike | None = None,
    title: str | None = "Answers",
    synced_gpus: bool = False,
) -> list[str]:
    """
    The greedy answer to each prompt, the same on every process. A collective, in which each answers a share.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to ask, in its dtype.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): Texts, or conversations for the chat template.
        batch_size (`int`, *optional*, defaults to `64`): Prompts generated at once; what an interruption loses.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest answer in tokens, with the one that ends it.
        progress_file (`str` or `os.PathLike`, *optional*): JSON lines of the answers, to continue a stopped run. A
            `ValueError` if it is of other prompts, settings or weights.
        title (`str`, *optional*, defaults to `"Answers"`): What the bar is called; `None` for none.
        synced_gpus (`bool`, *optional*, defaults to `False`): Whether the weights are sharded (FSDP2, ZeRO-3).
    """
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    inputs = {"prompts": checksum(prompts), "model": weights_checksum(model)} if progress_file else {}
    work = ProgressFile(progress_file, settings | inputs)
    units = {str(begin): prompts[begin : begin + batch_size] for begin in range(0, len(prompts), batch_size)}

    def answer(name: str, part: Sequence) -> list[str]:
        return [text for [text] in predict_answers(model, tokenizer, part, synced_gpus=synced_gpus, **settings)]

    work.do(answer, units, title)
    return [text for name in units for text in work.results[name]]
