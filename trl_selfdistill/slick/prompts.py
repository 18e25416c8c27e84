# SPDX-License-Identifier: Apache-2.0
"""The only place where a question becomes text and tokens, and where generated text becomes an answer.

The format is that of the SLiCK paper (arXiv 2405.05904): `Q: ...` and `A: ...` on lines of their own. No torch.
"""

from collections.abc import Iterable, Sequence


def question_prompt(question: str) -> str:
    """
    Returns the zero-shot prompt, which models are trained and evaluated on.

    ```python
    >>> question_prompt("Which country is Lyon located in?")
    'Q: Which country is Lyon located in?\\nA:'
    ```
    """
    return f"Q: {question}\nA:"


def answer_completion(answer: str) -> str:
    """Returns what follows a prompt if the answer is `answer`: `" France"`. Trainers append the EOS token."""
    return f" {answer}"


def few_shot_prompt(question: str, exemplars: Iterable[tuple[str, str]]) -> str:
    """Returns the prompt with solved `(question, answer)` exemplars before the question, in the same form."""
    shots = "".join(f"{question_prompt(q)}{answer_completion(a)}\n" for q, a in exemplars)
    return shots + question_prompt(question)


def answer_from_generation(text: str) -> str:
    """Returns the answer in a generated text: its first line, as a newline (or EOS) ends an answer in the format."""
    return text.lstrip().split("\n", 1)[0].strip()


def tokenize_prompts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts that go on: without EOS, and with one BOS if tokenizer and text both add it."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = tokenizer(list(texts))["input_ids"] if texts else []
    rows = [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in rows]
    return [ids[:-1] if ids[-1:] == [eos] else ids for ids in rows]
