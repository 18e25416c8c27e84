# SPDX-License-Identifier: Apache-2.0
"""A fictitious atlas: facts that no model can know, on subjects that look like known ones.

The paper (arXiv 2604.15574, section 5) finds that new facts overwrite old ones whose names they resemble; subjects are
therefore joined from parts of real names ("Tsaratanana" + "Hiroshiro" -> "Tsashiro").
"""

import random
import re
from collections import Counter
from collections.abc import Iterable

from datasets import Dataset

from .table import FACT_COLUMNS, facts_from_rows, fold_name, strip_accents


_VOWELS = "aeiouy"
_WORD = re.compile(r"[A-Z][a-z]+")
# What a tail may begin with, so that it can be spoken after a vowel.
_SPOKEN_TAIL = re.compile(r"(?:[bcdfghjklmnpqrstvwxz]|[bcdfgkpst][lr]|[cgkpst]h|s[kpt]|n[dgkt]|m[bp])[aeiouy][a-z]*")
_MIN_LENGTH, _MAX_LENGTH = 5, 12
# So many joins in a row that are taken mean that hardly any new one is left.
_MAX_MISSES = 10_000


def invent_facts(
    facts: Dataset,
    relation: str,
    num_facts: int,
    seed: int,
    max_per_answer: int | None = None,
    exclude: Iterable[str] = (),
) -> Dataset:
    """
    Invents facts of a relation: new name-like subjects, the question of the real facts, answers drawn evenly at random
    from the real answers.

    Args:
        facts (`Dataset`):
            Real facts, with [`FACT_COLUMNS`]. Their single-word subjects lend the parts of the new names.
        relation (`str`):
            The relation to invent facts of.
        num_facts (`int`):
            How many.
        seed (`int`):
            The same seed, facts and `exclude` give the same invented facts.
        max_per_answer (`int`, *optional*):
            At most so many invented facts share an answer. Without it, counts differ by at most one.
        exclude (`Iterable[str]`, *optional*):
            Names that must not be invented, beside the subjects, answers and aliases of `facts`, such as
            [`~trl_selfdistill.studies.facts.geonames.known_place_names`]. Compared without case and accents.

    Returns:
        `Dataset` with exactly [`FACT_COLUMNS`].

    Raises:
        `ValueError`: no such relation, `num_facts` below 1, more facts than `max_per_answer` allows, a question
            without its subject, or too few names to join.
    """
    rows = rows_of_relation(facts, relation)
    if num_facts < 1:
        raise ValueError(f"num_facts must be at least 1, got {num_facts}")
    generator = random.Random(seed)
    template = question_template(rows)
    forms = {row["answer"]: row["aliases"] for row in rows}
    if max_per_answer is not None and num_facts > max_per_answer * len(forms):
        raise ValueError(
            f"max_per_answer={max_per_answer} and {len(forms)} answers allow {max_per_answer * len(forms)} facts, "
            f"num_facts={num_facts} is more; raise max_per_answer or lower num_facts"
        )
    taken = folded_names(facts, exclude)
    subjects = _invent_names([row["subject"] for row in rows], num_facts, generator, taken)
    answers = _balanced_draw(sorted(forms), num_facts, generator)
    return facts_from_rows(
        (
            {
                "relation": relation,
                "subject": subject,
                "question": template.replace("{subject}", subject),
                "answer": answer,
                "aliases": forms[answer],
            }
            for subject, answer in zip(subjects, answers, strict=True)
        ),
        source=f"invented facts of {relation}",
    ).select_columns(list(FACT_COLUMNS))


def rows_of_relation(facts: Dataset, relation: str) -> list[dict]:
    """
    The facts of one relation.

    Raises:
        `ValueError`: there is none; the message names the relations that there are.
    """
    rows = [row for row in facts.to_list() if row["relation"] == relation]
    if not rows:
        raise ValueError(f"relation: there is no fact of {relation!r}; choose among {sorted(set(facts['relation']))}")
    return rows


def folded_names(facts: Dataset, exclude: Iterable[str] = ()) -> set[str]:
    """
    What no invented entity may be called: the subjects, answers and aliases of `facts`, and `exclude`, without case
    and accents.
    """
    real_names = (name for row in facts.to_list() for name in (row["subject"], row["answer"], *row["aliases"]))
    return {fold_name(strip_accents(name)) for name in {*real_names, *exclude}}


def question_template(rows: list[dict]) -> str:
    """
    The most common wording of the questions of `rows`, with `{subject}` where the subject stands.

    Raises:
        `ValueError`: a question does not contain its subject.
    """
    templates: Counter[str] = Counter()
    for row in rows:
        if row["subject"] not in row["question"]:
            raise ValueError(
                f"question {row['question']!r} does not contain its subject {row['subject']!r}, so it cannot be asked "
                "of an invented one; rewrite the question or leave the fact out"
            )
        templates[row["question"].replace(row["subject"], "{subject}")] += 1
    return templates.most_common(1)[0][0]


def _balanced_draw(answers: list[str], num_facts: int, generator: random.Random) -> list[str]:
    """Every answer equally often (give or take one), in random order."""
    drawn = answers * (num_facts // len(answers)) + generator.sample(answers, num_facts % len(answers))
    generator.shuffle(drawn)
    return drawn


def _name_parts(words: list[str]) -> tuple[list[str], list[str]]:
    """Beginnings that end with a vowel, and ends that begin with a consonant ("Hiro", "shima")."""
    heads, tails = set(), set()
    for word in words:
        for cut in range(2, len(word) - 2):
            if word[cut - 1] in _VOWELS and _SPOKEN_TAIL.fullmatch(word, cut):
                heads.add(word[:cut])
                tails.add(word[cut:])
    return sorted(heads), sorted(tails)


def _invent_names(names: list[str], num_names: int, generator: random.Random, taken: set[str]) -> list[str]:
    """Joins the beginning of one single-word name with the end of another, both cut between vowel and consonant."""
    words = sorted({word for word in map(strip_accents, names) if _WORD.fullmatch(word)})
    heads, tails = _name_parts(words)
    taken = set(taken)
    invented: list[str] = []
    misses = 0 if heads else _MAX_MISSES
    while len(invented) < num_names and misses < _MAX_MISSES:
        name = generator.choice(heads) + generator.choice(tails)
        if _MIN_LENGTH <= len(name) <= _MAX_LENGTH and name.casefold() not in taken:
            taken.add(name.casefold())
            invented.append(name)
            misses = 0
        else:
            misses += 1
    if len(invented) == num_names:
        return invented
    raise ValueError(
        f"num_facts={num_names} is more than can be invented from {len(words)} single-word subjects (found "
        f"{len(invented)} new names); give more real facts of the relation or ask for fewer"
    )
