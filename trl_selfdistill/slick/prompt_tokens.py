# SPDX-License-Identifier: Apache-2.0
"""The only place where a prompt becomes tokens, for generation, likelihood, drift and a model's own answers alike."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, ProcessorMixin


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor; a tokenizer is its own."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def tokenize_prompts(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, prompts: Sequence[str] | Sequence[list[dict]]
) -> list[list[int]]:
    """
    Returns the token ids of prompts, texts or conversations for the chat template: those that [`~trl.SFTTrainer`]
    begins a row of prompt and completion with.

    The special tokens that a tokenizer puts before a text are there once, also where a chat template has written them
    into the text. Those that it puts behind it are not, as the text goes on.

    Raises:
        ValueError: If the tokenizer splits a text otherwise where it adds special tokens.
    """
    if not prompts:
        return []
    if not isinstance(prompts[0], str):
        chats = list(prompts)
        if isinstance(processing_class, ProcessorMixin):  # its templates read lists of parts
            chats = [[{**message, "content": _parts(message["content"])} for message in chat] for chat in chats]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return processing_class.apply_chat_template(chats, **options)["input_ids"]
    tokenizer = text_tokenizer(processing_class)
    wholes, texts = (tokenizer(list(prompts), add_special_tokens=add)["input_ids"] for add in (True, False))
    rows = []
    for prompt, whole, text in zip(prompts, wholes, texts, strict=True):
        starts = range(len(whole) - len(text) + 1)
        start = next((i for i in starts if whole[i : i + len(text)] == text), None)
        if start is None:
            raise ValueError(
                f"{type(tokenizer).__name__} splits {prompt!r} otherwise where it adds special tokens; take another"
            )
        before = whole[:start]
        rows.append(text if text[:start] == before else before + text)
    return rows


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
