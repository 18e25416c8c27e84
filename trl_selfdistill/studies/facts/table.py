# SPDX-License-Identifier: Apache-2.0
"""A table of facts: one row a question, with its answer and the other forms of the answer that count as right.

`load_facts` checks a user's rows. What the package makes goes through `facts_table` and `read_facts`, without checks.
Stages add columns, which are kept.
"""

import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, List, Value

from ...files import read_jsonl
from ...hallucination.exact_match import exact_match, normalize_answer
from ..tables import dataset_of_rows, read_rows, read_tsv


logger = logging.getLogger(__name__)

FACT_COLUMNS = ("fact_id", "relation", "subject", "question", "answer", "aliases")
# Of EntityQuestions: https://github.com/princeton-nlp/EntityQuestions, relation_query_templates.json
ENTITY_QUESTIONS = {row["relation"]: row["template"] for row in read_tsv(__package__, "entity_questions.tsv")}
_QUESTION_PATTERNS = {
    relation: re.compile(re.escape(template).replace(re.escape("{subject}"), "(.+)"), re.DOTALL)
    for relation, template in ENTITY_QUESTIONS.items()
}
# Letters that Unicode does not decompose into a base letter and an accent.
_UNDECOMPOSED = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ı": "i", "ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe"}
)


def strip_accents(text: str) -> str:
    """The text as it is typed on an English keyboard: "Łódź" is "Lodz"."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_UNDECOMPOSED))
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def fold_name(name: str) -> str:
    """The form under which names are compared: NFKC, without case, single spaces. Accents stay."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def other_forms(answer: str, forms: Iterable[str]) -> list[str]:
    """
    The `forms` that [`exact_match`] does not already accept for `answer` or for an earlier form, in their order.

    ```python
    >>> other_forms("Netherlands", ["The Netherlands", "Holland", "holland"])
    ['Holland']
    ```
    """
    kept: list[str] = []
    for form in forms:
        if normalize_answer(form) and not exact_match(form, [answer, *kept]):
            kept.append(form)
    return kept


def load_facts(path: str | os.PathLike, split: str = "train") -> Dataset:
    """
    Reads a user's facts, checks them, and makes one row of each question.

    Rows have `relation`, `subject`, `answer`, and `question` or `template` (a question with `{subject}`), or are those
    of EntityQuestions ([`facts_of_entity_questions`]). Optional are `aliases` (list of strings, JSON list, or forms
    separated by `|`) and `fact_id` (by default `"{relation}/{subject}"`). Other columns are kept.

    Rows that repeat a question (without case, after NFKC) are merged into the first, with the aliases of all, if their
    answers share an accepted form. Otherwise they are dropped, and their number is logged.

    Args:
        path (`str` or `os.PathLike`):
            A file, a folder or a dataset on the Hub, as [`~trl_selfdistill.studies.tables.read_rows`] takes it.
        split (`str`, *optional*, defaults to `"train"`): The split to read.

    Returns:
        `Dataset` with [`FACT_COLUMNS`], then the other columns.

    Raises:
        ValueError: If a row breaks a rule, or there is none. The message names the row and what to change.
    """
    return checked_table(read_rows(path, split), os.fspath(path))


def make_fact(relation: str, template: str, subject: str, answer: str, aliases: Iterable[str]) -> dict:
    """A row with [`FACT_COLUMNS`], whose question is the template with the subject in place of `{subject}`."""
    values = f"{relation}/{subject}", relation, subject, template.replace("{subject}", subject), answer, [*aliases]
    return dict(zip(FACT_COLUMNS, values, strict=True))


def facts_table(rows: Iterable[dict]) -> Dataset:
    """A table of facts that this package made, with [`FACT_COLUMNS`] and any others."""
    return _table(("", row) for row in rows)


def read_facts(path: str | os.PathLike) -> Dataset:
    """Reads the JSON lines of a table of facts that this package wrote, without checking its rows again."""
    return facts_table(read_jsonl(path))


def facts_of_entity_questions(located_rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """
    Turns rows of EntityQuestions (Sciavolino et al. 2021, arXiv 2109.08535), which have `question` and the list
    `answers`, into facts that name their subject, and hands other rows on; each with its place for errors. Without a
    column `relation`, it is that of the first template that the question fits: P131 for "Where is ... located?", which
    P276 shares. Questions with several answers are left out, as in arXiv 2405.05904, and their number is logged.

    Raises:
        ValueError: If a question fits no template, or not that of its relation.
    """
    num_several = 0
    for place, row in located_rows:
        if not isinstance(row, dict) or "answers" not in row or "answer" in row:
            yield place, row
            continue
        row = dict(row)
        answers = row.pop("answers")
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"{place}: answers must be a list with an answer in it, got {answers!r}")
        if any(answer != answers[0] for answer in answers):
            num_several += 1
            continue
        if row.get("subject") is None or row.get("relation") is None:
            row |= _relation_and_subject(place, row.get("question"), row.get("relation"))
        yield place, {**row, "answer": answers[0]}
    if num_several:
        logger.warning("left out %d questions that have several answers", num_several)


def _relation_and_subject(place: str, question: Any, relation: Any) -> dict[str, str]:
    for name, pattern in _QUESTION_PATTERNS.items():
        if relation in (None, name) and (match := pattern.fullmatch(str(question).strip())):
            return {"relation": name, "subject": match[1]}
    expected = "any template of EntityQuestions" if relation is None else f"relation {relation!r} of EntityQuestions"
    raise ValueError(f"{place}: question {question!r} does not fit {expected}; add columns `subject` and `relation`")


def _table(located_rows: Iterable[tuple[str, dict]]) -> Dataset:
    facts = dataset_of_rows(located_rows)
    facts = facts.select_columns([*FACT_COLUMNS, *(name for name in facts.column_names if name not in FACT_COLUMNS)])
    if facts.features["aliases"] == List(Value("string")):
        return facts
    return facts.cast_column("aliases", List(Value("string")))  # lists of nothing: there is no alias in the table


def checked_table(located_rows: Iterable[tuple[str, Any]], source: str) -> Dataset:
    """Facts from pairs of where a row stands, for errors, and the row."""
    questions: dict[str, list[tuple[str, dict]]] = {}
    owners: dict[str, tuple[str, str]] = {}  # of each fact_id, its first place and question
    for place, row in facts_of_entity_questions(located_rows):
        fact = _checked_fact(place, row)
        question = fold_name(fact["question"])
        other_place, other_question = owners.setdefault(fact["fact_id"], (place, question))
        if other_question != question:
            taken = f"fact_id {fact['fact_id']!r} stands for another question ({other_place})"
            raise ValueError(f"{place}: {taken}; give each of the two a `fact_id` of its own, or different relations")
        questions.setdefault(question, []).append((place, fact))
    merged = [(rows[0][0], fact) for rows in questions.values() if (fact := _merged([row for _, row in rows]))]
    if not merged:
        raise ValueError(f"{source}: there is no question with one answer in it; add at least one")
    if len(merged) < len(questions):
        logger.warning("dropped %d questions that have several answers", len(questions) - len(merged))
    return _table(merged)


def _merged(repeats: list[dict]) -> dict | None:
    """One fact of those that ask the same question, `None` if they contradict each other."""
    accepted: list[str] = []
    for fact in repeats:
        forms = [fact["answer"], *fact["aliases"]]
        if accepted and not any(exact_match(form, accepted) for form in forms):
            return None
        accepted += forms
    return {**repeats[0], "aliases": other_forms(repeats[0]["answer"], accepted)}


def _checked_fact(place: str, row: Any) -> dict:
    """The row with all of FACT_COLUMNS, and the other columns after them."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a fact is an object with named columns, got {type(row).__name__}")
    question_column = "template" if not row.get("question") and "template" in row else "question"
    required = ("relation", "subject", question_column, "answer")
    missing = [name for name in required if name not in row]
    if missing:
        raise ValueError(f"{place}: missing columns {missing}; found {[*row]}; add or rename the columns")
    fact = {name: _checked_text(place, name, row[name]) for name in required}
    if question_column == "template":
        template = fact.pop("template")
        if "{subject}" not in template:
            raise ValueError(f"{place}: template {template!r} lacks {{subject}}; write it where the name belongs")
        fact["question"] = template.replace("{subject}", fact["subject"])
    if not normalize_answer(fact["answer"]):
        raise ValueError(f"{place}: answer {fact['answer']!r} is nothing to exact match; change or remove the row")
    fact["fact_id"] = _checked_text(place, "fact_id", row.get("fact_id") or f"{fact['relation']}/{fact['subject']}")
    fact["aliases"] = _checked_aliases(place, row.get("aliases"))
    for form in (fact["answer"], *fact["aliases"]):
        if "\n" in form:
            raise ValueError(f"{place}: answer {form!r} has a line break, where an answer ends; mend or remove it")
    extra = {name: value for name, value in row.items() if name not in (*FACT_COLUMNS, "template")}
    return {**fact, **extra}


def _checked_text(place: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {column} must be a text that is not empty, got {value!r}; mend or remove the row")
    return value.strip()


def _checked_aliases(place: str, value: Any) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: aliases {value!r} is not a JSON list ({error}); or separate with |") from error
    forms = value.split("|") if isinstance(value, str) else [] if value is None else value
    if not isinstance(forms, list) or not all(isinstance(form, str) for form in forms):
        raise ValueError(f"{place}: aliases must be a list of strings, got {value!r}")
    return [form.strip() for form in forms]
