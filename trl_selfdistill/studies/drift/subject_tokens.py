# SPDX-License-Identifier: Apache-2.0
"""Where in a prompt the entity is named that it asks about."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ...slick.prompt_tokens import text_tokenizer, tokenize_prompts
from ...slick.prompts import question_prompt


class SubjectPrompt(NamedTuple):
    """The tokens of a prompt, special ones included, and the position of the last one that spells its subject."""

    token_ids: tuple[int, ...]
    last_subject_token: int


def subject_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], subjects: Sequence[str]
) -> list[SubjectPrompt]:
    """
    Tokenizes the prompts of questions and finds their subjects from the tokenizer's offsets.

    The last occurrence of the subject counts, as a whole word if there is one ("Li" does not start "Lima"). A token
    belongs to it if it covers any of its characters. The tokenizer is a fast one, or a processor with one.

    Raises:
        `ValueError`: If a subject is not in its question, spelled as there, or has no token.
    """
    prompts = [question_prompt(question) for question in questions]
    tokenizer = text_tokenizer(tokenizer)
    all_offsets = tokenizer(prompts, return_offsets_mapping=True)["offset_mapping"]
    rows = zip(tokenize_prompts(tokenizer, prompts), all_offsets, prompts, questions, subjects, strict=True)
    found = []
    for token_ids, offsets, prompt, question, subject in rows:
        begin, end = (prompt.rindex(question) + i for i in _subject_span(question, subject))
        # Special tokens cover no characters: their offsets are (0, 0)
        covering = [i for i, (start, stop) in enumerate(offsets) if max(start, begin) < min(stop, end)]
        if not covering:
            raise ValueError(f"The tokenizer drops the subject {subject!r} of {prompt!r}. Leave the fact out.")
        found.append(SubjectPrompt(tuple(token_ids), covering[-1]))
    return found


def _subject_span(question: str, subject: str) -> tuple[int, int]:
    name = re.escape(subject)
    found = [*re.finditer(rf"(?<!\w){name}(?!\w)", question)] or [*re.finditer(name, question)]
    if not subject.strip() or not found:
        raise ValueError(f"The subject {subject!r} is not in the question {question!r}: spell both alike.")
    return found[-1].span()
