# SPDX-License-Identifier: Apache-2.0
"""The one reader of tables: facts, training data and prompts, from files, saved datasets and the Hub.

In CSV and JSON text stays text: `load_dataset` reads "007" as 7, "1789-07-14" as a date and "NA" as `None`.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, DownloadManager, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError


def read_rows(path: str | os.PathLike, split: str = "train") -> Iterator[tuple[str, dict]]:
    """
    Reads the rows of a table, each with the place where it stands.

    Args:
        path (`str` or `os.PathLike`):
            A `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, text in UTF-8; a folder written by
            `Dataset.save_to_disk`; or what `datasets.load_dataset` accepts, a folder or a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`): The split. A file has only `train`.

    Returns:
        Iterator of a row's place, such as `"facts.csv, line 3"`, and the row. The cells of CSV are text. A
        `FileNotFoundError` if there is no such file, a `ValueError` that names the place if it cannot be read as rows.
    """
    rows = _open(path, split)
    if not isinstance(rows, Dataset):
        return rows
    return ((f"{path} (split {split!r}), row {number}", row) for number, row in enumerate(rows, start=1))


def load_table(name_or_path: str | os.PathLike, split: str = "train", config: str | None = None) -> Dataset:
    """
    Loads the rows of [`read_rows`] as a `Dataset`, CSV and JSON in memory. `config` is the configuration of a dataset
    on the Hub. A `ValueError`, beside those of [`read_rows`], if a column has values of two types, or there is no row.
    """
    rows = _open(name_or_path, split, config)
    table = rows if isinstance(rows, Dataset) else dataset_of_rows(rows)
    if not len(table):
        raise ValueError(f"{name_or_path} (split {split!r}): there are no rows in it")
    return table


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
    try:
        return Dataset.from_dict(table, on_mixed_types="use_json")
    except (OverflowError, UnicodeEncodeError) as error:  # numbers of more than 64 bits, halves of surrogate pairs
        raise ValueError(f"{place} or above: there is a value that no table can hold ({error})") from error


def _open(path: str | os.PathLike, split: str, config: str | None = None) -> Dataset | Iterator[tuple[str, Any]]:
    """What keeps its types by itself as a `Dataset`, of CSV and JSON the rows, each with its place."""
    folder = Path(path)
    if not folder.is_dir() and (folder.is_file() or folder.suffix.lower() in (*_PARSERS, ".parquet")):
        return _choose({"train": _open_file(folder)}, split, path)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        data = load_from_disk(folder)
        return _choose(data if isinstance(data, DatasetDict) else {"train": data}, split, path)
    try:
        builder = load_dataset_builder(os.fspath(path), config)
        if builder.name not in ("csv", "json") or getattr(builder.config, "field", None):
            return load_dataset(os.fspath(path), config, split=split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        message = f"{path} cannot be read here, nor as a dataset of the Hub ({error.__cause__ or error})"
        raise ValueError(message) from error
    files = _choose({str(name): files for name, files in builder.config.data_files.items()}, split, path)
    parse = partial(_parse_csv, delimiter=builder.config.sep) if builder.name == "csv" else _parse_json
    copies = DownloadManager().download_and_extract(files)
    return chain.from_iterable(_read_text(name, Path(copy), parse) for name, copy in zip(files, copies, strict=True))


def _open_file(file: Path) -> Dataset | Iterator[tuple[str, Any]]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        try:
            return Dataset.from_parquet(os.fspath(file))
        except (ValueError, DatasetGenerationError) as error:
            raise ValueError(f"{file}: not Parquet ({error.__cause__ or error})") from error
    if suffix not in _PARSERS:
        raise ValueError(f"{file}: tables are read from {', '.join(_PARSERS)} and .parquet files; convert it")
    return _read_text(os.fspath(file), file, _PARSERS[suffix])


def _choose(splits: dict[str, Any], split: str, path: str | os.PathLike) -> Any:
    if split not in splits:
        raise ValueError(f"{path}: no split {split!r}; there are {[*splits]}")
    return splits[split]


def _read_text(name: str, file: Path, parse: Callable[[str, str], Iterator]) -> Iterator[tuple[str, Any]]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # spreadsheets and Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: it is not UTF-8; save the file in UTF-8") from error
    yield from parse(name, text)


def _parse_json(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """A list of objects, or one object per line: on the Hub, both are called `.json`."""
    is_list = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_list else text.split("\n"), start=1):  # U+2028 may be within a text
        if not part.strip():
            continue
        try:
            found = json.loads(part)
        except (ValueError, RecursionError) as error:
            line = number + getattr(error, "lineno", 1) - 1
            raise ValueError(f"{name}, line {line}: not JSON ({error}); write one object per line") from error
        if is_list:
            yield from ((f"{name}, row {row}", value) for row, value in enumerate(found, start=1))
        else:
            yield f"{name}, line {number}", found


def _parse_csv(name: str, text: str, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = reader.fieldnames or []
        if len({*header}) < len(header):
            raise ValueError(f"{name}, line 1: give the columns different names, got {header}")
        for row in reader:
            place = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place}: not {len(header)} cells as in line 1; quote those with {delimiter!r}")
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.reader.line_num}: not CSV ({error})") from error


csv.field_size_limit(2**31 - 1)  # training data may hold whole documents
_PARSERS = {".jsonl": _parse_json, ".json": _parse_json, ".csv": _parse_csv}
_PARSERS |= {".tsv": partial(_parse_csv, delimiter="\t")}


def read_tsv(package: str, name: str) -> list[dict[str, str]]:
    """The rows of a file of tab-separated values that `package` carries. No cell is quoted."""
    with (resources.files(package) / name).open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
