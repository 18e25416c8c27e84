# SPDX-License-Identifier: Apache-2.0
"""The only place where a prompt becomes tokens, for generation, likelihood, drift and a model's own answers alike."""

from collections.abc import Sequence
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .prompts import answer_completion


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor; a tokenizer is its own."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def tokenize_prompts(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, prompts: Sequence[str] | Sequence[list[dict]]
) -> list[list[int]]:
    """
    Returns the token ids of prompts, texts or conversations for the chat template: those that [`~trl.SFTTrainer`]
    begins a row of prompt and completion with. The special tokens that a tokenizer puts before a text are there once,
    also where a chat template has written them; those that it puts behind it are not. A `ValueError` if the tokenizer
    splits a text otherwise where it adds special tokens.
    """
    if not prompts:
        return []
    if not isinstance(prompts[0], str):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return processing_class.apply_chat_template(_chats(processing_class, prompts), **options)["input_ids"]
    tokenizer = text_tokenizer(processing_class)
    wholes, texts = (tokenizer(list(prompts), add_special_tokens=add)["input_ids"] for add in (True, False))
    rows = []
    for prompt, whole, text in zip(prompts, wholes, texts, strict=True):
        starts = range(len(whole) - len(text) + 1)
        start = next((i for i in starts if whole[i : i + len(text)] == text), None)
        if start is None:
            raise ValueError(f"{type(tokenizer).__name__} splits {prompt!r} anew with special tokens; use another")
        before = whole[:start]
        rows.append(text if text[:start] == before else before + text)
    return rows


def tokenize_answers(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompts: Sequence[str] | Sequence[list[dict]],
    answers: Sequence[Sequence[str]],
) -> list[list[tuple[int, ...]]]:
    """
    For each prompt its token ids, as those of [`tokenize_prompts`], and those of it followed by each of its `answers`:
    after a text as [`~trl_selfdistill.slick.prompts.answer_completion`], in a conversation as its template writes one.
    """
    completions = [[answer_completion(answer) for answer in own] for own in answers]
    is_chat = bool(prompts) and not isinstance(prompts[0], str)
    if is_chat:
        prompts, blank = _rendered(processing_class, prompts)
        completions = [[blank + completion.lstrip() for completion in own] for own in completions]
    rows = [[prompt, *(prompt + text for text in own)] for prompt, own in zip(prompts, completions, strict=True)]
    texts = [*chain(*rows)]
    if is_chat:
        token_ids = text_tokenizer(processing_class)(texts, add_special_tokens=False)["input_ids"]
    else:
        token_ids = tokenize_prompts(processing_class, texts)
    left = map(tuple, token_ids)
    return [[*islice(left, len(row))] for row in rows]


def _rendered(processing_class, chats: Sequence[list[dict]]) -> tuple[list[str], str]:
    """Conversations as texts, and the blanks that their template writes before an answer, as after "[/INST]"."""
    solved = _chats(processing_class, [[*chats[0], {"role": "assistant", "content": "?"}]])
    [whole] = processing_class.apply_chat_template(solved, tokenize=False)
    chats = _chats(processing_class, chats)
    texts = processing_class.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    before = whole.removeprefix(texts[0]).partition("?")[0]
    return texts, before if before.isspace() else ""


def _chats(processing_class, chats: Sequence[list[dict]]) -> list[list[dict]]:
    if not isinstance(processing_class, ProcessorMixin):
        return list(chats)

    def parts(content: str | list[dict]) -> list[dict]:  # which templates of processors read
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    return [[{**message, "content": parts(message["content"])} for message in chat] for chat in chats]
