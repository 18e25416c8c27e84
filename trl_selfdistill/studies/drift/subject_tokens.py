# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt spell the entity that it asks about, for what is measured at those tokens."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class SubjectPrompt(NamedTuple):
    """
    A tokenised prompt and where its subject stands.

    Args:
        token_ids (`tuple[int, ...]`): The prompt's tokens, with the special tokens that the tokenizer adds.
        subject_positions (`tuple[int, ...]`): Positions of the subject's tokens in `token_ids`, ascending.
    """

    token_ids: tuple[int, ...]
    subject_positions: tuple[int, ...]


def subject_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], questions: Sequence[str], subjects: Sequence[str]
) -> list[SubjectPrompt]:
    """
    Tokenises prompts and finds the tokens of their subjects, by the tokenizer's offsets.

    The subject is looked for in the last occurrence of the question (solved exemplars come before it), and in that the
    last occurrence of the subject as a word of its own counts, or the last one at all where none is ("Li" is not the
    start of "Lima"; Japanese has no spaces). A token belongs to the subject if it covers one of its characters, also
    if it covers others beside them: the space before the subject, the `?` in the `)?` after "Lima (Peru".

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer.
        prompts (`Sequence[str]`): The prompts, without their answers.
        questions (`Sequence[str]`): The question that each prompt ends with.
        subjects (`Sequence[str]`): The entity in each question, spelled as it is there.

    Returns:
        `list[SubjectPrompt]`: One for each prompt, in their order.

    Raises:
        `ValueError`: If the tokenizer is a slow one, which has no offsets, a question is not in its prompt, or a
            subject is not in its question or has no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"`tokenizer` is a {type(tokenizer).__name__}, which does not say which characters a token stands for. "
            "Load the fast tokenizer of the model, with `AutoTokenizer.from_pretrained`."
        )
    encoded = [tokenizer(prompt, return_offsets_mapping=True) for prompt in prompts]
    return [
        SubjectPrompt(tuple(each["input_ids"]), _subject_positions(each["offset_mapping"], *texts))
        for each, *texts in zip(encoded, prompts, questions, subjects, strict=True)
    ]


def _subject_positions(offsets: list[tuple[int, int]], prompt: str, question: str, subject: str) -> tuple[int, ...]:
    begin, end = _subject_span(prompt, question, subject)
    # Special tokens cover no character: their offsets are (0, 0)
    covering = [i for i, (start, stop) in enumerate(offsets) if max(start, begin) < min(stop, end)]
    if not covering:
        raise ValueError(
            f"The subject {subject!r} has no token of its own in the prompt {prompt!r}: the tokenizer drops its "
            "characters. Leave the fact out, or take the tokenizer of the model."
        )
    # With what is between them: tokenizers that trim offsets say of a space by itself that it covers nothing
    return tuple(range(covering[0], covering[-1] + 1))


def _subject_span(prompt: str, question: str, subject: str) -> tuple[int, int]:
    """The characters of `prompt` that spell the subject, as (begin, end)."""
    offset = prompt.rfind(question)
    if offset < 0:
        raise ValueError(
            f"The prompt {prompt!r} does not contain its question {question!r}. Let `prompt_function` keep the "
            "question as it is."
        )
    name = re.escape(subject)
    found = [*re.finditer(rf"(?<!\w){name}(?!\w)", question)] or [*re.finditer(name, question)]
    if not subject.strip() or not found:
        raise ValueError(
            f"The subject {subject!r} is not in the question of the prompt {prompt!r}. Spell it as the question does, "
            "accents and case included, or leave the fact out."
        )
    return offset + found[-1].start(), offset + found[-1].end()
