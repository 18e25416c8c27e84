# SPDX-License-Identifier: Apache-2.0
"""The one reader of tables: facts, training data and prompts, from files, saved datasets and the Hub.

In JSON and CSV files text stays text: `load_dataset` reads "007" as 7, "1789-07-14" as a date and "NA" as `None`.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


def read_rows(path: str | os.PathLike, split: str = "train") -> Iterator[tuple[str, dict]]:
    """
    Reads the rows of a table, each with the place where it stands.

    Args:
        path (`str` or `os.PathLike`):
            A `.jsonl`, `.json` (a list of objects), `.csv` or `.parquet` file in UTF-8, a folder written by
            `Dataset.save_to_disk`, or what `datasets.load_dataset` accepts. A folder that holds `<split>.jsonl`,
            `.json` or `.csv` is read as that file.
        split (`str`, *optional*, defaults to `"train"`): The split. A file has only `train`.

    Returns:
        Iterator of a row's place, such as `"facts.csv, line 3"`, and the row. The cells of CSV are text.

    Raises:
        FileNotFoundError: If `path` looks like a file and does not exist.
        ValueError: If the source has no such split, or cannot be read as rows. The message names the place.
    """
    file = _text_file(path, split)
    if file is not None:
        return _read_text(file)
    rows = _load(path, split)
    return ((f"{path} (split {split!r}), row {number}", row) for number, row in enumerate(rows, start=1))


def load_table(name_or_path: str | os.PathLike, split: str = "train", config: str | None = None) -> Dataset:
    """
    Loads the rows of [`read_rows`] as a `Dataset`. A JSON or CSV file is held in memory; Parquet is not.

    Args:
        name_or_path (`str` or `os.PathLike`): As for [`read_rows`].
        split (`str`, *optional*, defaults to `"train"`): The split. A file has only `train`.
        config (`str`, *optional*): The configuration of a dataset on the Hub.

    Raises:
        ValueError: Beside those of [`read_rows`], if the values of a column have different types.
    """
    file = _text_file(name_or_path, split)
    return _load(name_or_path, split, config) if file is None else dataset_of_rows(_read_text(file))


def dataset_of_rows(located_rows: Iterable[tuple[str, dict]]) -> Dataset:
    """The rows, each with its place for errors, as a `Dataset` with the columns of all; what a row lacks is `None`."""
    rows: list[dict] = []
    columns: dict[str, None] = {}  # in the order in which they come up
    kinds: dict[str, type] = {}
    for place, row in located_rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a row is an object with named columns, got {type(row).__name__}")
        columns |= dict.fromkeys(row)
        for name, value in row.items():
            kind = float if type(value) is int else type(value)
            if value is not None and kinds.setdefault(name, kind) is not kind:
                raise ValueError(f"{place}: {name} is {value!r}, not of the type of the rows before; give it one type")
        rows.append(row)
    table = {name: [row.get(name) for row in rows] for name in columns}
    return Dataset.from_dict(table, on_mixed_types="use_json")


def _text_file(path: str | os.PathLike, split: str) -> Path | None:
    """The JSON or CSV file that `path` stands for, `None` for what `datasets` reads."""
    path = Path(path)
    suffix, known = path.suffix.lower(), (*_READERS, ".parquet")
    if path.is_dir():
        return next(filter(Path.is_file, (path / f"{split}{ending}" for ending in _READERS)), None)
    if not path.is_file():
        if suffix in known:
            raise FileNotFoundError(f"{path}: there is no such file; the current folder is {Path.cwd()}")
        return None
    if split != "train":
        raise ValueError(f"{path}: a file has only the split 'train', got split={split!r}")
    if suffix not in known:
        raise ValueError(f"{path}: tables are read from {', '.join(_READERS)} and .parquet files; convert it")
    return path if suffix in _READERS else None


def _load(path: str | os.PathLike, split: str, config: str | None = None) -> Dataset:
    folder = Path(path)
    if folder.is_file():
        return load_dataset("parquet", data_files=os.fspath(path), split=split)
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return load_dataset(os.fspath(path), config, split=split)
    data = load_from_disk(folder)
    splits = data if isinstance(data, DatasetDict) else {"train": data}
    if split not in splits:
        raise ValueError(f"{path}: no split {split!r}; there are {[*splits]}")
    return splits[split]


def _read_text(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from _READERS[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error}); save the file in UTF-8") from error


# utf-8-sig: spreadsheets and Windows editors write a byte order mark
def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); write one object per line") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error}); one object per line is .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json file holds a list of objects, got {type(rows).__name__}")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{place}: has another number of cells than the header; quote cells with commas")
                yield place, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from error


csv.field_size_limit(2**31 - 1)  # training data may hold whole documents
_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}


def read_tsv(package: str, name: str) -> list[dict[str, str]]:
    """The rows of a file of tab-separated values that `package` carries. No cell is quoted."""
    with (resources.files(package) / name).open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
