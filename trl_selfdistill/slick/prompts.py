# SPDX-License-Identifier: Apache-2.0
"""The only place where a question becomes text, and where generated text becomes an answer.

Annotation, training and evaluation all go through these functions, so that they cannot drift apart. The format is that
of the SLiCK paper (arXiv 2405.05904): `Q: ...` and `A: ...` on lines of their own.
"""

from collections.abc import Iterable


def question_prompt(question: str) -> str:
    """
    The zero-shot prompt, on which models are trained and evaluated.

    ```python
    >>> question_prompt("Which country is Lyon located in?")
    'Q: Which country is Lyon located in?\\nA:'
    ```
    """
    return f"Q: {question}\nA:"


def answer_completion(answer: str) -> str:
    """
    What follows a prompt when the answer is `answer`. Trainers append the EOS token.

    ```python
    >>> answer_completion("France")
    ' France'
    ```
    """
    return f" {answer}"


def few_shot_prompt(question: str, exemplars: Iterable[tuple[str, str]]) -> str:
    """
    The prompt with solved `(question, answer)` exemplars before the question, one line each.

    ```python
    >>> few_shot_prompt("Where is Oslo?", [("Where is Lyon?", "France")])
    'Q: Where is Lyon?\\nA: France\\nQ: Where is Oslo?\\nA:'
    ```
    """
    shots = "".join(f"{question_prompt(q)}{answer_completion(a)}\n" for q, a in exemplars)
    return shots + question_prompt(question)


def answer_from_generation(text: str) -> str:
    """
    The answer in a generated text: its first line, as the format ends an answer with a newline (or EOS).

    ```python
    >>> answer_from_generation(" France\\nQ: Where is Oslo?")
    'France'
    ```
    """
    return text.lstrip().split("\n", 1)[0].strip()
