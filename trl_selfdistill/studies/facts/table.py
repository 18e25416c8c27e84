# SPDX-License-Identifier: Apache-2.0
"""A table of facts: one row per question, with its answer and the other forms of the answer that count as right.

`load_facts` reads and checks it, `save_facts` writes it; the stages in between only add columns (SLiCK's, for
example), which survive both.
"""

import json
import logging
import os
import unicodedata
from collections.abc import Iterable

import pyarrow as pa
from datasets import Dataset

from ...hallucination.exact_match import exact_match, normalize_answer
from .entity_questions import facts_of_entity_questions
from .files import read_rows, write_rows


logger = logging.getLogger(__name__)

FACT_COLUMNS = ("fact_id", "relation", "subject", "question", "answer", "aliases")
# Letters that Unicode does not decompose into a base letter and an accent.
_UNDECOMPOSED = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ı": "i", "ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe"}
)


def strip_accents(text: str) -> str:
    """
    The text without accents, as it is typed on an English keyboard.

    ```python
    >>> strip_accents("Łódź, São Paulo")
    'Lodz, Sao Paulo'
    ```
    """
    decomposed = unicodedata.normalize("NFKD", text.translate(_UNDECOMPOSED))
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def fold_name(name: str) -> str:
    """
    The form under which names are compared: NFKC, without case, single spaces.

    ```python
    >>> fold_name("  SÃO  Paulo ")
    'são paulo'
    ```
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def other_forms(answer: str, forms: Iterable[str]) -> list[str]:
    """
    The `forms` that [`exact_match`] does not already accept for `answer` or for an earlier form, in their order.

    ```python
    >>> other_forms("Netherlands", ["The Netherlands", "Holland", "holland"])
    ['Holland']
    ```
    """
    seen = {"", normalize_answer(answer)}  # a form that normalises to nothing never matches
    kept = []
    for form in forms:
        normalized = normalize_answer(form)
        if normalized not in seen:
            seen.add(normalized)
            kept.append(form)
    return kept


def facts_from_rows(rows: Iterable[dict], source: str = "facts") -> Dataset:
    """
    Checks rows and turns them into a table of facts, through [`drop_ambiguous`].

    Args:
        rows (`Iterable[dict]`):
            Rows with `relation`, `subject`, `answer`, and `question` or `template` (a question with `{subject}`).
            Optional: `aliases` (list of strings, JSON list, or forms separated by `|`) and `fact_id` (default
            `"{relation}/{subject}"`). Other columns are kept after [`FACT_COLUMNS`]. Or rows of EntityQuestions:
            `question` and `answers` ([`~trl_selfdistill.studies.facts.entity_questions.facts_of_entity_questions`]).
        source (`str`, *optional*, defaults to `"facts"`):
            What errors call the source.

    Returns:
        `Dataset` with [`FACT_COLUMNS`], then the other columns.

    Raises:
        `ValueError`: a row breaks a rule; the message names the source, the row (from 1) and what to change.
    """
    located_rows = ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
    return _facts_from_located_rows(located_rows, source)


def load_facts(path: str | os.PathLike, split: str = "train") -> Dataset:
    """
    Reads a table of facts and checks every row, with the rules of [`facts_from_rows`].

    Args:
        path (`str` or `os.PathLike`):
            A `.jsonl`, `.json` (a list of objects) or `.csv` file, a folder written by `Dataset.save_to_disk`, or what
            `datasets.load_dataset` accepts (the id of a dataset on the Hub, a folder of data files).
        split (`str`, *optional*, defaults to `"train"`):
            The split to read where the source has several. Files have none.

    Returns:
        `Dataset` with [`FACT_COLUMNS`], then the source's other columns. One row per question: see
        [`drop_ambiguous`].

    Raises:
        `FileNotFoundError`: `path` looks like a file and does not exist.
        `ValueError`: a row breaks a rule, or there is none; the message names the file, the line and what to change.
    """
    return _facts_from_located_rows(read_rows(path, split), os.fspath(path))


def save_facts(facts: Dataset, path: str | os.PathLike) -> None:
    """
    Writes facts as JSON lines in UTF-8, whole or not at all: a full disk or an interrupt leaves the old file.

    Args:
        facts (`Dataset`):
            Any dataset; all its columns are written.
        path (`str` or `os.PathLike`):
            The file. Its folder is created if missing.
    """
    write_rows(facts, path)


def drop_ambiguous(facts: Dataset) -> Dataset:
    """
    Leaves one row per question: rows that repeat a question with the same answer are merged into the first of them
    (their aliases united), rows that contradict each other are all dropped. How many is logged.

    Questions compare without case after NFKC. Two answers are the same when they share an accepted form.

    Args:
        facts (`Dataset`):
            A table with at least [`FACT_COLUMNS`].

    Returns:
        `Dataset` with the same columns, in the same order of rows.
    """
    rows = _merge_questions(facts.to_list())
    if not rows:
        return facts.select([])
    return Dataset.from_list(rows, features=facts.features) if len(rows) < len(facts) else facts


def _merge_questions(rows: list[dict]) -> list[dict]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(fold_name(row["question"]), []).append(row)
    merged, num_ambiguous = [], 0
    for group in groups.values():
        first, *repeats = group
        accepted = [first["answer"], *first["aliases"]]
        for row in repeats:
            forms = [row["answer"], *row["aliases"]]
            if not any(exact_match(form, accepted) for form in forms):
                num_ambiguous += 1
                break
            accepted += forms
        else:
            merged.append({**first, "aliases": other_forms(first["answer"], accepted)} if repeats else first)
    if num_ambiguous:
        logger.warning("dropped %d questions that have several answers", num_ambiguous)
    num_repeats = len(rows) - len(groups)
    if num_repeats:
        logger.info("%d rows repeat a question of another row", num_repeats)
    return merged


def _facts_from_located_rows(located_rows: Iterable[tuple[str, dict]], source: str) -> Dataset:
    """Facts from pairs of where a row stands, for errors, and the row."""
    rows, places = [], {}
    for place, raw in facts_of_entity_questions(located_rows):
        row = _checked_row(place, raw)
        rows.append(row)
        key = fold_name(row["question"])
        other_place, other_key = places.setdefault(row["fact_id"], (place, key))
        if other_key != key:
            raise ValueError(
                f"{place}: fact_id {row['fact_id']!r} already stands for another question ({other_place}); "
                "give each of the two a `fact_id` of its own, or different relations"
            )
    if not rows:
        raise ValueError(f"{source}: there is no fact in it; add at least one row")
    rows = _merge_questions(rows)
    if not rows:
        raise ValueError(f"{source}: every question has several answers; keep one row per question")
    names = dict.fromkeys([*FACT_COLUMNS, *(name for row in rows for name in row)])
    columns = {name: [row.get(name) for row in rows] for name in names}
    # Without any alias in the table, the type of `aliases` could not be inferred.
    columns["aliases"] = pa.array(columns["aliases"], pa.list_(pa.string()))
    try:
        return Dataset.from_dict(columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{source}: a column mixes types ({error}); give its values one type") from error


def _checked_row(place: str, raw: dict) -> dict:
    """A row with FACT_COLUMNS first and the other columns after them."""
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: a fact is an object with named columns, got {type(raw).__name__}")
    question_column = "template" if not raw.get("question") and "template" in raw else "question"
    required = ("relation", "subject", question_column, "answer")
    missing = [name for name in required if name not in raw]
    if missing:
        hint = " (`template` with {subject} may stand for `question`)" if "question" in missing else ""
        raise ValueError(f"{place}: missing columns {missing}{hint}; found {[*raw]}; add or rename the columns")
    values = {name: _checked_text(place, name, raw[name]) for name in required}
    if question_column == "template":
        template = values.pop("template")
        if "{subject}" not in template:
            raise ValueError(f"{place}: template {template!r} lacks {{subject}}; write it where the name belongs")
        values["question"] = template.replace("{subject}", values["subject"])
    if not normalize_answer(values["answer"]):
        raise ValueError(
            f"{place}: answer {values['answer']!r} is only articles and punctuation, which exact match ignores, so no "
            "prediction would be right; change or remove the row"
        )
    fact_id = f"{values['relation']}/{values['subject']}"
    if raw.get("fact_id") not in (None, ""):
        fact_id = _checked_text(place, "fact_id", raw["fact_id"])
    aliases = other_forms(values["answer"], _checked_aliases(place, raw.get("aliases")))
    extra = {name: value for name, value in raw.items() if name not in (*FACT_COLUMNS, "template")}
    known = {"fact_id": fact_id, **values, "aliases": aliases}
    return {**{name: known[name] for name in FACT_COLUMNS}, **extra}


def _checked_text(place: str, column: str, value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {column} must be a string, got {value!r}; write it as text")
    if not value.strip():
        raise ValueError(f"{place}: {column} is empty; fill it in or remove the row")
    return value.strip()


def _checked_aliases(place: str, value) -> list[str]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return [form.strip() for form in value.split("|")]
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: aliases {value!r} is not a JSON list ({error}); or separate with |") from error
    if not isinstance(value, list) or not all(isinstance(form, str) for form in value):
        raise ValueError(f"{place}: aliases must be a list of strings, got {value!r}")
    return [form.strip() for form in value]
