# SPDX-License-Identifier: Apache-2.0
"""What a model answers to prompts: the first line of what it writes, up to a newline or a special token."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..hallucination.answer_outcome import fold_answer
from ..hallucination.exact_match import exact_match
from ..parameters.hashes import hash_model
from ..parameters.structure import base_causal_lm
from .process_sharding import ProgressFile, checksum
from .prompt_tokens import text_tokenizer, tokenize_prompts
from .prompts import answer_from_generation


def answer_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    Returns the tokens that end an answer: special ones, the EOS tokens of the generation config, and those with a
    newline in their text; and of these, what adds nothing to an answer under `exact_match`: ".\\n", not "s\\n".
    """
    special = {*tokenizer.all_special_ids}
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    special.discard(tokenizer.unk_token_id)
    special.update(eos_ids(model, tokenizer))  # one may be the unknown token as well, as GPT-2's is
    newline, blank = _newline_ids(tokenizer, len(tokenizer))
    return sorted({*special, *newline}), sorted({*special, *blank})


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's."""
    model_eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(model_eos if isinstance(model_eos, list) else [model_eos])} - {None})


@lru_cache(maxsize=8)
def _newline_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[int], list[int]]:
    """The tokens with a newline, and those of them with nothing but punctuation before it."""
    # `vocab_size` is only part of the cache's key: tokens may be added to a tokenizer
    texts = tokenizer.batch_decode([[i] for i in range(vocab_size)], clean_up_tokenization_spaces=False)
    newline = {i: text.split("\n", 1)[0] for i, text in enumerate(texts) if "\n" in text}
    blank = [i for i, line in newline.items() if not fold_answer(line) and exact_match(f"x{line}", ["x"])]
    return [*newline], blank


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) without gradients. On exit, every submodule is back in the mode it was in."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not `inference_mode`: tensors that a model keeps (rotary frequencies) could not take part in autograd later
        with torch.no_grad():
            yield
    finally:
        for module in training_modules:
            module.training = True


def forked(device: torch.device) -> AbstractContextManager:
    """Leaves torch's random state, that of `device` among it, as it was before the block."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def predict_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_samples: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[str]]:
    """
    Generates the answers to each prompt (first lines, stripped): the greedy one, or `num_samples` sampled ones.

    Of the model's own generation config only the EOS tokens apply, and no other setting of it. The caller's random
    state is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model. Its training mode is restored.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer or processor, whatever the padding side.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): The prompts, texts or conversations, without the answers.
        num_samples (`int`, *optional*): Answers sampled for each prompt; `None` for the greedy answer.
        temperature (`float`, *optional*, defaults to `1.0`): Sampling temperature.
        top_k (`int`, *optional*): Number of most likely tokens to sample from; `None` for all.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest answer in tokens, with the one that ends it.
        batch_size (`int`, *optional*, defaults to `64`): Sequences generated at once. Each sample is a sequence.
        seed (`int`, *optional*, defaults to `0`): Samples also depend on `batch_size` and the other prompts.
    """
    token_ids = tokenize_prompts(tokenizer, prompts)
    tokenizer = text_tokenizer(tokenizer)
    stop_ids, _ = answer_ends(model, tokenizer)
    config = GenerationConfig(eos_token_id=stop_ids, max_new_tokens=max_new_tokens, do_sample=num_samples is not None)
    if config.do_sample:
        config.update(num_return_sequences=num_samples, temperature=float(temperature), top_k=top_k or 0)
    # Similar lengths in a batch: little padding. The longest come first: memory runs out early or never
    order = sorted(range(len(prompts)), key=lambda i: (-len(token_ids[i]), i))
    per_prompt = num_samples or 1
    step = max(1, batch_size // per_prompt)
    answers: list[list[str]] = [[] for _ in prompts]
    with evaluation_mode(model), forked(model.device):
        torch.manual_seed(seed)
        for begin in range(0, len(order), step):
            batch = order[begin : begin + step]
            written = generate_tokens(model, [token_ids[i] for i in batch], config)
            # With the stop token: the text before its newline belongs to the answer
            texts = tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, text in enumerate(texts):
                answers[batch[row // per_prompt]].append(answer_from_generation(text))
    return answers


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress_file: str | os.PathLike | None = None,
    title: str | None = "Answers",
) -> list[str]:
    """
    The greedy answer to each prompt, the same on every process. A collective, in which each answers a share.

    Args:
        model, tokenizer, prompts, max_new_tokens: As in [`predict_answers`].
        batch_size (`int`, *optional*, defaults to `64`): Prompts generated at once; what an interruption loses.
        progress_file (`str` or `os.PathLike`, *optional*): JSON lines of the answers, to continue a stopped run. A
            `ValueError` if it is of other prompts, settings or weights.
        title (`str`, *optional*, defaults to `"Answers"`): What the bar is called; `None` for none.
    """
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    if min(settings.values()) < 1:
        raise ValueError(f"`batch_size` and `max_new_tokens` must be 1 or more, got {settings}.")
    inputs = {}
    if progress_file is not None:
        inputs = {"prompts": checksum(tokenize_prompts(tokenizer, prompts)), "model": hash_model(model)}
    work = ProgressFile(progress_file, settings | inputs)
    units = {str(begin): prompts[begin : begin + batch_size] for begin in range(0, len(prompts), batch_size)}

    def answer(name: str, part: Sequence) -> list[str]:
        return [text for [text] in predict_answers(model, tokenizer, part, **settings)]

    work.do(answer, units, title)
    return [text for name in units for text in work.results[name]]


def generate_tokens(model: PreTrainedModel, prompts: Sequence[list[int]], config: GenerationConfig) -> list[list[int]]:
    """
    Generates the tokens after each prompt (token ids, of any lengths) in one batch, up to the first stop token and
    with it. The model is in evaluation mode, and its own generation config does not apply: `config` has a list as
    `eos_token_id`, and gets a `pad_token_id`. A collective if the weights are sharded: processes go on until all end.
    """
    config.pad_token_id = min(config.eos_token_id, default=0)
    width = max(map(len, prompts))
    input_ids = torch.tensor([[config.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    # `generate` takes from the model's own config what `config` leaves out; a PEFT model may have one, too.
    # A `generate` of the instance alone is the `custom_generate` of its checkpoint: `functools.partial` of a function
    own = {module: {**vars(module)} for module in (model, base_causal_lm(model))}
    for module, attributes in own.items():
        if isinstance(attributes.get("generate"), partial):
            del module.generate
        if "generation_config" in attributes:
            module.generation_config = GenerationConfig()
    is_sharded = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    is_sharded |= any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # ZeRO-3
    try:
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            synced_gpus=is_sharded or None,  # transformers does not know of FSDP2, nor always of ZeRO-3
        )
    finally:
        for module, attributes in own.items():
            vars(module).update(attributes)
    stop_ids = set(config.eos_token_id)
    written = []
    for ids in output[:, width:].tolist():
        end = next((t for t, token in enumerate(ids) if token in stop_ids), len(ids))
        written.append(ids[: end + 1])
    return written
