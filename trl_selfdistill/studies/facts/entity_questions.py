# SPDX-License-Identifier: Apache-2.0
"""EntityQuestions (Sciavolino et al. 2021, arXiv 2109.08535), the paper's facts: rows of a question and its answers.

Its rows name no subject. Each question was made from one of 24 templates, which tell where the subject stands.
"""

import logging
import re
from collections.abc import Iterable, Iterator


logger = logging.getLogger(__name__)

# https://github.com/princeton-nlp/EntityQuestions, relation_query_templates.json
TEMPLATES = {
    "P17": "Which country is {subject} located in?",
    "P19": "Where was {subject} born?",
    "P20": "Where did {subject} die?",
    "P26": "Who is {subject} married to?",
    "P36": "What is the capital of {subject}?",
    "P40": "Who is {subject}'s child?",
    "P50": "Who is the author of {subject}?",
    "P69": "Where was {subject} educated?",
    "P106": "What kind of work does {subject} do?",
    "P112": "Who founded {subject}?",
    "P127": "Who owns {subject}?",
    "P131": "Where is {subject} located?",
    "P136": "What type of music does {subject} play?",
    "P159": "Where is the headquarter of {subject}?",
    "P170": "Who was {subject} created by?",
    "P175": "Who performed {subject}?",
    "P176": "Which company is {subject} produced by?",
    "P264": "What music label is {subject} represented by?",
    "P276": "Where is {subject} located?",
    "P407": "Which language was {subject} written in?",
    "P413": "What position does {subject} play?",
    "P495": "Which country was {subject} created in?",
    "P740": "Where was {subject} founded?",
    "P800": "What is {subject} famous for?",
}
_PATTERNS = {
    relation: re.compile(re.escape(template).replace(re.escape("{subject}"), "(.+)"), re.DOTALL)
    for relation, template in TEMPLATES.items()
}


def facts_of_entity_questions(located_rows: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    """
    Turns rows of EntityQuestions into facts, and hands other rows on as they are.

    A row of EntityQuestions has `question` and the list `answers`, and no `answer`; some copies add `relation`.
    Without it, the relation is that of the first template that the question fits: P131 for "Where is ... located?",
    which P276 shares. Questions with several answers are left out, as in arXiv 2405.05904; how many is logged.

    Args:
        located_rows (`Iterable[tuple[str, dict]]`):
            Where each row stands, for errors, and the row.

    Returns:
        `Iterator[tuple[str, dict]]`: the same with `relation`, `subject`, `question` and `answer`.

    Raises:
        ValueError: If a question fits no template, or not that of its relation.

    ```python
    >>> row = {"question": "Where was Ada Lovelace born?", "answers": ["London"]}
    >>> next(facts_of_entity_questions([("row 1", row)]))[1]
    {'relation': 'P19', 'subject': 'Ada Lovelace', 'question': 'Where was Ada Lovelace born?', 'answer': 'London'}
    ```
    """
    num_several = 0
    for place, row in located_rows:
        if not (isinstance(row, dict) and "answers" in row and "answer" not in row):
            yield place, row
            continue
        row = dict(row)
        answers = row.pop("answers")
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"{place}: answers must be a list with an answer in it, got {answers!r}")
        if len(set(answers)) > 1:
            num_several += 1
            continue
        relation, subject = _relation_and_subject(place, row)
        yield place, {"relation": relation, "subject": subject, **row, "answer": answers[0]}
    if num_several:
        logger.warning("left out %d questions that have several answers", num_several)


def _relation_and_subject(place: str, row: dict) -> tuple[str, str]:
    question, relation = row.get("question"), row.get("relation")
    if not isinstance(question, str):
        raise ValueError(f"{place}: question must be a string, got {question!r}")
    if "subject" in row and relation is not None:
        return relation, row["subject"]
    if relation is not None and relation not in TEMPLATES:
        raise ValueError(
            f"{place}: relation {relation!r} is none of EntityQuestions' ({', '.join(TEMPLATES)}), so that the "
            "subject of its question cannot be told; add a column `subject`"
        )
    for name in TEMPLATES if relation is None else (relation,):
        if match := _PATTERNS[name].fullmatch(question.strip()):
            return name, match[1]
    expected = "any template of EntityQuestions" if relation is None else f"{TEMPLATES[relation]!r}"
    raise ValueError(
        f"{place}: question {question!r} does not fit {expected}, so that its subject cannot be told; add the columns "
        "`subject` and `relation`"
    )
