# SPDX-License-Identifier: Apache-2.0
"""Every source gives the same rows, text stays text, and what cannot be read is named with its place."""

import gzip
import json
import re

import pytest
from datasets import Dataset, DatasetDict

from trl_selfdistill.studies.tables import load_table, read_rows


# What readers of CSV and JSON like to take for something else, and a whole document
TEXTS = ["NA", "null", "None", "nan", "007", "1789", "1e5", "TRUE", "", " a\u2028b\x85 ", 'a, "b"\n\tc', "São Paulo"]
TEXTS.append("x" * 200_000)
ROWS = [{"prompt": f"Q{i}", "completion": text, "date": "1789-07-14"} for i, text in enumerate(TEXTS)]


def write(path, rows, encoding="utf-8"):
    """The rows as the file's suffix says."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        Dataset.from_list(rows).to_csv(path, sep="," if path.suffix == ".csv" else "\t", encoding=encoding)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding=encoding)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding=encoding, newline="\n")
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("folder", [".", "data"])  # a folder as on the Hub, which `datasets` finds the files of
def test_text_stays_text_in_every_format(tmp_path, name, folder):
    path = write(tmp_path / folder / name, ROWS, "utf-8" if folder == "." else "utf-8-sig")
    path = path if folder == "." else path.parent
    table = load_table(path)
    assert table.to_list() == ROWS == [row for _, row in read_rows(path)]
    assert {str(feature.dtype) for feature in table.features.values()} == {"string"}


def test_saved_datasets_and_folders_of_files_have_splits(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"dev": Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "split")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "test.csv", ROWS)
    write(tmp_path / "files" / "train.csv", ROWS[:2])
    few = ROWS[:2]
    sources = [("one", "train", ROWS), ("split", "dev", few), ("files", "test", ROWS), ("files", "train", few)]
    for name, split, rows in sources:
        assert load_table(tmp_path / name, split).to_list() == rows
        assert [row for _, row in read_rows(tmp_path / name, split)] == rows
    with pytest.raises(ValueError, match=r"no split 'train'; there are \['dev'\]"):
        load_table(tmp_path / "split")
    with pytest.raises(ValueError, match=r"test.csv: no split 'dev'; there are \['train'\]"):
        load_table(tmp_path / "files" / "test.csv", "dev")


def test_a_folder_of_compressed_files_of_one_split(tmp_path):
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        path = write(tmp_path / "data" / f"part-{number}.json", rows)
        path.write_bytes(gzip.compress(path.read_bytes()))
        path.rename(f"{path}.gz")
    assert load_table(tmp_path / "data").to_list() == ROWS
    with pytest.raises(ValueError, match=r"data: no split 'dev'; there are \['train'\]"):
        load_table(tmp_path / "data", "dev")


def test_rows_may_lack_columns_and_nest_values_of_different_shapes(tmp_path):
    tools = [{"role": "tool", "arguments": {"a": 1}}, {"role": "tool", "arguments": {"a": "b"}}]
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": tools, "n": 1}, {"n": 2.5}]
    table = load_table(write(tmp_path / "a.jsonl", rows))
    assert table["n"][:] == [None, 1, 2.5] and table["messages"][2] is None
    assert [message["arguments"] for message in table["messages"][1]] == [{"a": 1}, {"a": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '\n{"relation\n', "a.jsonl, line 2: not JSON"),
        ("b.jsonl", '{"a": 1}\n[1]\n', "b.jsonl, line 2: a row is an object with named columns, got list"),
        ("c.jsonl", '{"a": 1}\n{"a": null}\n{"a": "1"}\n', "c.jsonl, line 3: a is '1', not of the type"),
        ("d.json", '[\n{"relation"\n]', "d.json, line 3: not JSON"),
        ("e.json", '{\n"relation": "P17"}', "e.json, line 1: not JSON"),
        ("f.csv", "relation,subject\nP17,Lyon\n\nP17,Lyon,x\n", "f.csv, line 4: not 2 cells as in line 1"),
        ("g.tsv", "relation\tsubject\nP17\n", "g.tsv, line 2: not 2 cells as in line 1; quote those with '\\t'"),
        ("h.csv", 'a,b\n1,"2\n', "h.csv, line 2: not CSV"),
        ("i.xlsx", "PK", "i.xlsx: tables are read from .jsonl, .json, .csv, .tsv and .parquet"),
        ("j.csv", b"relation,subject\nP17,Lyon\nP17,K\xf6ln\n", "j.csv, line 3: it is not UTF-8"),
        ("k.csv", "relation,subject\n".encode("utf-16"), "k.csv, line 1: it is not UTF-8"),
        ("l.parquet", b"PAR1", "l.parquet: not Parquet (Parquet file size is 4 bytes"),
        ("m.csv", "a,b,a\n1,2,3\n", "m.csv, line 1: give the columns different names"),
        ("o.csv", "", "o.csv (split 'train'): there are no rows in it"),
        ("q.jsonl", '{"a": 1}\n{"b": {"c": 18446744073709551615}}\n', "q.jsonl, line 2 or above: there is a value"),
        ("r.json", '[{"a": "x"}, {"a": "\\ud83d"}]', "r.json, row 2 or above: there is a value"),
        ("s.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}", "s.jsonl, line 2: not JSON (Exceeds the limit"),
        ("t.jsonl", '{"a": ' + "[" * 100_000, "t.jsonl, line 1: not JSON (maximum recursion depth"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_table(tmp_path / name)

    for missing in ("no/such.jsonl", "no/such.parquet"):
        with pytest.raises(FileNotFoundError, match=missing):
            load_table(missing)
