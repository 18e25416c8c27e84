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

from .table import facts_table, fold_name, make_fact, strip_accents


_VOWELS = "aeiouy"
_WORD = re.compile(r"[A-Z][a-z]+")
# What a tail may begin with, so that it can be spoken after a vowel.
_SPOKEN_TAIL = re.compile(r"(?:[bcdfghjklmnpqrstvwxz]|[bcdfgkpst][lr]|[cgkpst]h|s[kpt]|n[dgkt]|m[bp])[aeiouy][a-z]*")
_MIN_LENGTH, _MAX_LENGTH = 5, 12
# So many joins in a row that are taken mean that hardly any new one is left.
_MAX_MISSES = 10_000


def invent_facts(facts: Dataset, relation: str, num_facts: int, seed: int, exclude: Iterable[str] = ()) -> Dataset:
    """
    Invents facts of a relation, with exactly [`FACT_COLUMNS`]. Their subjects are joined from parts of single-word
    subjects of the real `facts`; question and answers are real, each answer equally often (give or take one). No
    subject is in `exclude` (see [`folded_names`]). The same arguments give the same facts.

    Raises:
        ValueError: If there is no such relation, a question lacks its subject, or there are too few names to join.
    """
    rows = rows_of_relation(facts, relation)
    generator = random.Random(seed)
    template = question_template(rows)
    subjects = _invent_names([row["subject"] for row in rows], num_facts, generator, folded_names(facts, exclude))
    forms = {row["answer"]: row["aliases"] for row in rows}
    answers = sorted(forms)
    drawn = answers * (num_facts // len(answers)) + generator.sample(answers, num_facts % len(answers))
    generator.shuffle(drawn)
    pairs = zip(subjects, drawn, strict=True)
    return facts_table(make_fact(relation, template, subject, answer, forms[answer]) for subject, answer in pairs)


def rows_of_relation(facts: Dataset, relation: str) -> list[dict]:
    """The facts of one relation, of which there must be some."""
    rows = [row for row in facts.to_list() if row["relation"] == relation]
    if not rows:
        raise ValueError(f"relation: there is no fact of {relation!r}; choose among {sorted(set(facts['relation']))}")
    return rows


def folded_names(facts: Dataset, exclude: Iterable[str] = ()) -> set[str]:
    """
    What no invented entity may be called, without case and accents: the subjects, answers and aliases of `facts`, and
    `exclude`, such as [`~trl_selfdistill.studies.facts.geonames.known_place_names`].
    """
    real_names = (name for row in facts.to_list() for name in (row["subject"], row["answer"], *row["aliases"]))
    return {fold_name(strip_accents(name)) for name in {*real_names, *exclude}}


def question_template(rows: list[dict]) -> str:
    """The most common wording of the questions of `rows`, with `{subject}` where the subject stands."""
    templates: Counter[str] = Counter()
    for row in rows:
        if row["subject"] not in row["question"]:
            asked, subject = row["question"], row["subject"]
            raise ValueError(f"question {asked!r} does not contain its subject {subject!r}; rewrite or drop it")
        templates[row["question"].replace(row["subject"], "{subject}")] += 1
    return templates.most_common(1)[0][0]


def _name_parts(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Beginnings that end with a vowel, and ends that begin with a consonant ("Hiro", "shima")."""
    cuts = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(2, len(word) - 2)
        if word[cut - 1] in _VOWELS and _SPOKEN_TAIL.fullmatch(word, cut)
    ]
    return sorted({head for head, _ in cuts}), sorted({tail for _, tail in cuts})


def _invent_names(names: list[str], num_names: int, generator: random.Random, taken: set[str]) -> list[str]:
    """Joins the beginning of one single-word name with the end of another, both cut between vowel and consonant."""
    words = {word for word in map(strip_accents, names) if _WORD.fullmatch(word)}
    heads, tails = _name_parts(words)
    invented: list[str] = []
    misses = 0
    while heads and len(invented) < num_names and misses < _MAX_MISSES:
        name = generator.choice(heads) + generator.choice(tails)
        misses += 1
        if _MIN_LENGTH <= len(name) <= _MAX_LENGTH and name.casefold() not in taken:
            taken.add(name.casefold())
            invented.append(name)
            misses = 0
    if len(invented) < num_names:
        found = f"from {len(words)} single-word subjects ({len(invented)} names)"
        raise ValueError(f"num_facts={num_names} is more than can be invented {found}; ask for fewer")
    return invented
