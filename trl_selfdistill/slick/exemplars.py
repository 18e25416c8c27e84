# SPDX-License-Identifier: Apache-2.0
"""The solved exemplars of the few-shot prompts, and the facts that are set aside for them."""

import random
from collections import Counter

from datasets import Dataset


# An exemplar is lost for training and evaluation: a relation lends no larger share of its facts, if it can.
_MAX_SHARE = 0.1


def reserve_exemplars(
    facts: Dataset, num_prompts: int, num_shots: int, seed: int
) -> tuple[dict[str, list[list[tuple[str, str]]]], list[int]]:
    """
    Sets facts of each relation aside as exemplars and draws the exemplars of each prompt from them.

    A relation lends `num_prompts * num_shots` facts, or a tenth of its facts if that is less, but at least
    `num_shots`. Within a prompt the exemplars have distinct answers as far as the reserve allows it; between prompts
    they repeat as little as it allows. The choice depends on the set of facts, not on the order of the rows.

    Args:
        facts (`Dataset`): Table with the columns `fact_id`, `relation`, `question` and `answer`.
        num_prompts (`int`): Prompts of each relation.
        num_shots (`int`): Exemplars of each prompt.
        seed (`int`): Seed of the choice.

    Returns:
        `tuple`: For each relation its prompts, each a list of `(question, answer)`; and the rows that are left, in
        their order.

    Raises:
        `ValueError`: If a relation has no fact left to ask.
    """
    fact_ids, questions, answers = facts["fact_id"][:], facts["question"][:], facts["answer"][:]
    rows_of_relation: dict[str, list[int]] = {}
    for row, relation in enumerate(facts["relation"]):
        rows_of_relation.setdefault(relation, []).append(row)
    exemplars, reserved = {}, set()
    for relation, rows in rows_of_relation.items():
        size = min(num_prompts * num_shots, max(num_shots, int(_MAX_SHARE * len(rows))))
        if size >= len(rows):
            raise ValueError(
                f"relation {relation!r} has {len(rows)} facts, and `num_shots` = {num_shots} of them serve as "
                "exemplars, which leaves none to ask; add facts, drop the relation or lower `num_shots`"
            )
        rng = random.Random(f"{seed}/{relation}")
        pool = rng.sample(sorted(rows, key=lambda row: fact_ids[row]), size)
        reserved.update(pool)
        used: Counter[int] = Counter()
        exemplars[relation] = []
        for _ in range(num_prompts):
            # Least used first, chance decides between equals.
            order = sorted(pool, key=lambda row: (used[row], rng.random()))
            prompt = _distinct_answers_first(order, answers)[:num_shots]
            used.update(prompt)
            rng.shuffle(prompt)
            exemplars[relation].append([(questions[row], answers[row]) for row in prompt])
    return exemplars, [row for row in range(len(facts)) if row not in reserved]


def _distinct_answers_first(rows: list[int], answers: list[str]) -> list[int]:
    firsts, repeats, seen = [], [], set()
    for row in rows:
        (repeats if answers[row] in seen else firsts).append(row)
        seen.add(answers[row])
    return firsts + repeats
