# SPDX-License-Identifier: Apache-2.0
"""The only place where a question becomes text, and generated text an answer, as in arXiv 2405.05904. No torch."""

from collections.abc import Iterable
from itertools import chain, cycle


def question_prompt(question: str) -> str:
    """Returns the zero-shot prompt, which models are trained and evaluated on."""
    return f"Q: {question}\nA:"


def answer_completion(answer: str) -> str:
    """Returns what follows a prompt if the answer is `answer`: `" France"`. A `ValueError` if it has a newline."""
    if "\n" in answer:
        raise ValueError(f"the answer {answer!r} has a line break, where an answer ends; write it in one line")
    return f" {answer}"


def few_shot_prompt(question: str, exemplars: Iterable[tuple[str, str]]) -> str:
    """Returns the prompt with solved `(question, answer)` exemplars before the question, in the same form."""
    shots = "".join(f"{question_prompt(q)}{answer_completion(a)}\n" for q, a in exemplars)
    return shots + question_prompt(question)


def few_shot_messages(question: str, exemplars: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Returns the same as a conversation, for a chat template: each exemplar is a turn of the user and an answer."""
    texts = chain(*exemplars, [question])
    return [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts, strict=False)]


def answer_from_generation(text: str) -> str:
    """Returns the answer in a generated text: its first line, as a newline (or EOS) ends an answer in the format."""
    return text.lstrip().split("\n", 1)[0].strip()
