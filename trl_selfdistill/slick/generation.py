# SPDX-License-Identifier: Apache-2.0
"""What a model answers to a prompt, greedily or by sampling, and which tokens end an answer.

An answer is the first line of what the model writes (`prompts.answer_from_generation`), so generation stops at the
first newline or special token. `answer_scoring` takes the same tokens for the ends of an answer.
"""

import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .prompts import answer_from_generation


class AnswerEnds(NamedTuple):
    """
    Which tokens end an answer.

    Args:
        stop_ids (`tuple[int, ...]`):
            Tokens after which generation stops, as the first line is over: every special token but the unknown one,
            and every token with a newline in its text.
        terminator_ids (`tuple[int, ...]`):
            The stop tokens that add nothing to the answer before them under `exact_match`: before their newline there
            is at most white space and ASCII punctuation (`"\\n"`, `".\\n"`, but not `"s\\n"`).
    """

    stop_ids: tuple[int, ...]
    terminator_ids: tuple[int, ...]


def answer_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AnswerEnds:
    """
    The tokens that end an answer of `model`: those of `tokenizer` (read from its vocabulary once) and the
    end-of-sequence tokens of the model's generation config.

    A full stop alone ends nothing: after "France." the line may go on with "It is ...", and then the answer is wrong.
    """
    ends = _vocabulary_ends(tokenizer, len(tokenizer))
    generation_config = getattr(model, "generation_config", None)
    model_eos = getattr(generation_config, "eos_token_id", None)
    model_eos = () if model_eos is None else (model_eos,) if isinstance(model_eos, int) else tuple(model_eos)
    return AnswerEnds(*(tuple(sorted({*ids, *model_eos})) for ids in ends))


@lru_cache(maxsize=8)
def _vocabulary_ends(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> AnswerEnds:
    # `vocab_size` is part of the cache's key only: tokens may be added to a tokenizer.
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    special.discard(tokenizer.unk_token_id)
    texts = tokenizer.batch_decode([[i] for i in range(vocab_size)], clean_up_tokenization_spaces=False)
    newline = {i: text.split("\n", 1)[0] for i, text in enumerate(texts) if "\n" in text}
    blank = [i for i, line in newline.items() if not line.strip(string.whitespace + string.punctuation)]
    return AnswerEnds((*special, *newline), (*special, *blank))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) without gradients; on leaving, every submodule is back in the mode it was in."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not `inference_mode`: tensors that a model keeps (rotary frequencies) could not take part in autograd later.
        with torch.no_grad():
            yield
    finally:
        for module in training_modules:
            module.training = True


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
    progress: bool = False,
    synced_gpus: bool = False,
) -> list[list[str]]:
    """
    What the model answers to each prompt: its greedy answer, or `num_samples` sampled ones.

    The model's own generation config gives only its end-of-sequence tokens; penalties and top-p that it may set do not
    apply. The caller's random state stays as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, on any device, in training mode or not (it is put back).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Padding is on the left, whatever the tokenizer's own side.
        prompts (`Sequence[str]`):
            The prompts, without their answers.
        num_samples (`int`, *optional*):
            Answers sampled for each prompt; `None` for the one greedy answer.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_k (`int`, *optional*):
            Sampling is from the `top_k` most likely tokens; `None` for all.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest answer, in tokens, with the token that ends it.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences generated at once, the samples of a prompt counted.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The samples also depend on `batch_size` and on the other prompts of the call.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar with the time left.
        synced_gpus (`bool`, *optional*, defaults to `False`):
            Whether processes with other prompts share the model's weights (FSDP, ZeRO-3), so that each goes on until
            all have ended. They must have as many prompts each.

    Returns:
        `list[list[str]]`: For each prompt, in their order, its answers (first lines, stripped).

    Raises:
        `ValueError`: If `num_samples` is below 1.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"`num_samples` is {num_samples}; it must be at least 1, or None for greedy decoding")
    token_ids = tokenizer(list(prompts))["input_ids"] if prompts else []
    stop_ids = answer_ends(model, tokenizer).stop_ids
    config = generation_config(num_samples, temperature, top_k, max_new_tokens, stop_ids)
    # Prompts of like length share a batch (little padding); the longest come first, so that memory runs out at once.
    order = sorted(range(len(prompts)), key=lambda i: (-len(token_ids[i]), i))
    step = max(1, batch_size // (num_samples or 1))
    answers: list[list[str]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not progress)
    with bar, evaluation_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for begin in range(0, len(order), step):
            batch = order[begin : begin + step]
            written = generate_tokens(model, [token_ids[i] for i in batch], config, synced_gpus)
            # With the stop token: the text before its newline belongs to the answer
            texts = tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts = [answer_from_generation(text) for text in texts]
            for row, i in enumerate(batch):
                answers[i] = texts[row * (num_samples or 1) : (row + 1) * (num_samples or 1)]
            bar.update(len(batch))
    return answers


def generation_config(
    num_samples: int | None, temperature: float, top_k: int | None, max_new_tokens: int, stop_ids: Sequence[int]
) -> GenerationConfig:
    """Greedy generation for `num_samples=None`, else sampling, up to a token of `stop_ids`, and nothing else set."""
    sampling = {"do_sample": False}
    if num_samples is not None:
        sampling = {"do_sample": True, "temperature": float(temperature), "num_return_sequences": num_samples}
        sampling |= {"top_k": top_k or 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    # What is left out here, `generate` takes from the model's own config, so that every knob of note is set.
    plain = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
    return GenerationConfig(
        **sampling,
        **plain,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )


def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    synced_gpus: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """
    The tokens that the model writes after each prompt, up to its first stop token and with it, in one batch.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode.
        prompts (`Sequence[list[int]]`): Token ids, of any lengths; they are padded on the left.
        config ([`~transformers.GenerationConfig`]): With a list as `eos_token_id`, and `pad_token_id`.
        synced_gpus (`bool`, *optional*, defaults to `False`): As in [`predict_answers`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): For stop strings in the config.
    """
    width = max(map(len, prompts))
    input_ids = torch.tensor([[config.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
        synced_gpus=synced_gpus or None,  # None: as transformers finds it
        tokenizer=tokenizer,
    )
    stop_ids = set(config.eos_token_id)
    written = []
    for ids in output[:, width:].tolist():
        end = next((t for t, token in enumerate(ids) if token in stop_ids), len(ids))
        written.append(ids[: end + 1])
    return written
