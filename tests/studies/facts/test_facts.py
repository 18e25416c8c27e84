# SPDX-License-Identifier: Apache-2.0
import csv
import json
import logging
import os
import re

import pytest
from datasets import Dataset, DatasetDict

from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.studies.facts.table import (
    FACT_COLUMNS,
    drop_ambiguous,
    facts_from_rows,
    fold_name,
    load_facts,
    save_facts,
)


def row(subject="Lyon", answer="France", **others):
    question = f"Which country is {subject} located in?"
    return {"relation": "P17", "subject": subject, "question": question, "answer": answer, **others}


def write(path, rows):
    """The rows as the file's suffix says."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD = [row(), row("Oslo", "Norway"), row("São Paulo", "Brazil")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_every_file_format_gives_the_same_table(tmp_path, suffix):
    facts = load_facts(write(tmp_path / f"facts{suffix}", GOOD))
    assert facts.column_names == list(FACT_COLUMNS)
    assert facts.to_list() == facts_from_rows(GOOD).to_list()
    assert facts["fact_id"][:] == ["P17/Lyon", "P17/Oslo", "P17/São Paulo"]
    assert facts["aliases"][:] == [[], [], []]


def test_a_table_without_aliases_has_the_type_of_one_with(tmp_path):
    with_alias = facts_from_rows([row(aliases=["French Republic"])])
    assert facts_from_rows([row()]).features == with_alias.features


def test_saved_datasets_and_their_splits(tmp_path):
    Dataset.from_list(GOOD).save_to_disk(tmp_path / "one")
    DatasetDict({"dev": Dataset.from_list(GOOD[:1])}).save_to_disk(tmp_path / "split")
    assert len(load_facts(tmp_path / "one")) == 3
    assert load_facts(tmp_path / "split", split="dev")["subject"][:] == ["Lyon"]
    with pytest.raises(ValueError, match=r"no split 'train'; there are \['dev'\]"):
        load_facts(tmp_path / "split")


def test_what_load_dataset_reads_and_its_bad_rows(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    assert load_facts(tmp_path).to_list() == facts_from_rows(GOOD).to_list()
    write(tmp_path / "test.jsonl", [row(), row("Oslo", " ")])
    with pytest.raises(ValueError, match=r"split 'test'\), row 2: answer is empty"):
        load_facts(tmp_path, split="test")


def test_saving_and_loading_is_the_identity_and_keeps_other_columns(tmp_path):
    facts = facts_from_rows(
        [
            row(aliases=["République \u2028 française"], p_correct_greedy=0.5, slick_category="MaybeKnown"),
            row("Oslo", "Norway", p_correct_greedy=None, slick_category="Unknown", fact_id="mine/1"),
        ]
    )
    save_facts(facts, tmp_path / "new folder" / "facts.jsonl")
    again = load_facts(tmp_path / "new folder" / "facts.jsonl")
    assert again.to_list() == facts.to_list()
    assert again.column_names == [*FACT_COLUMNS, "p_correct_greedy", "slick_category"]
    assert "République" in (tmp_path / "new folder" / "facts.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    path = tmp_path / "facts.jsonl"
    save_facts(facts_from_rows(GOOD), path)
    before = path.read_bytes()

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        save_facts(facts_from_rows(GOOD[:1]), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["facts.jsonl"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("", "Norway"), "subject is empty"),
        (row("Oslo", "  "), "answer is empty"),
        (row("Oslo", "Norway", question=""), "question is empty"),
        (row("Oslo", "Norway", relation=""), "relation is empty"),
        (row("Oslo", "The ..."), "is only articles and punctuation"),
        (row("Oslo", "Norway", aliases='["a"'), "is not a JSON list"),
        (row("Oslo", "Norway", aliases="[1]"), "aliases must be a list of strings"),
        (row("Oslo", "Norway", question="", template="Where is {}?"), "lacks {subject}"),
        (row("lyon", "Spain", fact_id="P17/Lyon", question="Where?"), "give each of the two a `fact_id` of its own"),
    ],
)
def test_a_bad_row_is_named_in_every_format(tmp_path, suffix, bad, message):
    path = write(tmp_path / f"facts{suffix}", [row(), bad])
    place = {".jsonl": "line 2", ".json": "row 2", ".csv": "line 3"}[suffix]
    with pytest.raises(ValueError, match=re.escape(f"{path}, {place}: ") + ".*" + re.escape(message)):
        load_facts(path)


@pytest.mark.parametrize("column", ["relation", "subject", "question", "answer"])
@pytest.mark.parametrize("value", [None, 3, ["Oslo"]])
def test_values_that_are_not_text_are_named(tmp_path, column, value):
    path = write(tmp_path / "facts.jsonl", [row(), {**row("Oslo", "Norway"), column: value}])
    with pytest.raises(ValueError, match=f"line 2: {column} must be a string, got {re.escape(repr(value))}"):
        load_facts(path)


@pytest.mark.parametrize("column", ["relation", "subject", "question", "answer"])
def test_missing_columns_are_listed_beside_those_found(tmp_path, column):
    rows = [{name: value for name, value in row().items() if name != column}]
    found = re.escape(str([*rows[0]]))
    for suffix in (".jsonl", ".csv"):
        with pytest.raises(ValueError, match=rf"missing columns \['{column}'\].*found {found}"):
            load_facts(write(tmp_path / f"facts{suffix}", rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"relation": "P17"}\n\n{"relation\n', "a.jsonl, line 1: missing columns"),
        ("b.jsonl", '\n{"relation\n', "b.jsonl, line 2: not JSON"),
        ("c.jsonl", "[1]\n", "c.jsonl, line 1: a fact is an object"),
        ("d.json", '[\n{"relation"\n]', "d.json, line 3: not JSON"),
        ("e.json", '{"relation": "P17"}', "e.json: a .json file of facts holds a list"),
        ("f.csv", "relation,subject\nP17,Lyon,x\n", "f.csv, line 2: has another number of cells"),
        ("g.csv", "relation,subject\nP17\n", "g.csv, line 2: has another number of cells"),
        ("h.jsonl", "\n", "h.jsonl: there is no fact in it"),
        ("i.json", "[]", "i.json: there is no fact in it"),
        ("j.csv", "relation,subject\n", "j.csv: there is no fact in it"),
        ("k.tsv", "relation\tsubject\n", "k.tsv: facts are read from .jsonl, .json, .csv"),
        ("l.csv", b"relation,subject\nP17,K\xf6ln\n", "l.csv: not UTF-8"),
    ],
)
def test_unreadable_files_are_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_facts(tmp_path / name)


def test_a_file_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="no/such.jsonl: there is no such file"):
        load_facts("no/such.jsonl")


def test_a_column_of_mixed_types_is_an_error_not_a_crash():
    with pytest.raises(ValueError, match="atlas: a column mixes types"):
        facts_from_rows([row(p_correct_greedy=0.5), row("Oslo", "Norway", p_correct_greedy="much")], source="atlas")


def test_templates_are_filled_and_not_kept():
    rows = [{"relation": "P36", "subject": "{Peru}", "template": "Capital of {subject}?", "answer": "Lima"}]
    facts = facts_from_rows(rows)
    assert facts["question"][:] == ["Capital of {Peru}?"] and facts.column_names == list(FACT_COLUMNS)


@pytest.mark.parametrize("aliases", ["Holland|The Netherlands", '["Holland", "the netherlands"]', ["Holland", ""]])
def test_forms_of_aliases_and_none_repeats_the_answer(aliases):
    assert facts_from_rows([row("Delft", "Netherlands", aliases=aliases)])["aliases"][:] == [["Holland"]]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    path = write(tmp_path / "facts.csv", GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_facts(path)) == 3


def test_repeated_questions_are_merged_and_contradictions_dropped(caplog):
    rows = [
        row("Izmir", "Turkey", aliases=["Türkiye"], note="first"),
        row("Paris", "France"),
        row("IZMIR", "Türkiye", aliases=["Turkiye"], note="second"),
        row("ＰＡＲＩＳ", "United States"),
        row(),
    ]
    with caplog.at_level(logging.INFO, logger="trl_selfdistill.studies.facts.table"):
        facts = facts_from_rows(rows)
    assert facts["subject"][:] == ["Izmir", "Lyon"]
    assert facts[0]["aliases"] == ["Türkiye", "Turkiye"] and facts[0]["note"] == "first"
    assert "dropped 1 questions" in caplog.text


def test_only_contradictions_is_an_error():
    with pytest.raises(ValueError, match="every question has several answers"):
        facts_from_rows([row("Paris", "France"), row("Paris", "United States")])


def test_drop_ambiguous_is_idempotent_and_leaves_one_row_a_question():
    pairs = ["a1", "a1", "b2", "b3", "c4", "d5"]
    rows = [{"fact_id": str(i), **row(*pair), "aliases": []} for i, pair in enumerate(pairs)]
    table = Dataset.from_list(rows, features=facts_from_rows([row()]).features)
    once = drop_ambiguous(table)
    assert once["subject"][:] == ["a", "c", "d"] and drop_ambiguous(once).to_list() == once.to_list()
    nothing = drop_ambiguous(table.select([2, 3]))
    assert len(nothing) == 0 and nothing.features == table.features


def test_every_answer_accepts_its_forms_and_no_alias_is_redundant():
    (fact,) = facts_from_rows([row("Delft", "Netherlands", aliases=["Holland", "the Netherlands", "HOLLAND", "."])])
    assert fact["aliases"] == ["Holland"]
    assert not exact_match(fact["answer"], fact["aliases"])


def test_names_fold_case_width_and_spaces_but_not_accents():
    assert fold_name(" ＳÃO  paulo") == fold_name("São Paulo") != fold_name("Sao Paulo")
