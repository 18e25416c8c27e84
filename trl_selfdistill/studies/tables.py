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
            `Dataset.save_to_disk`; or what `datasets.load_dataset` accepts, a folder or a dataset on the Hub. A folder
            that holds `<split>.jsonl`, `.json`, `.csv` or `.tsv` is read as that file.
        split (`str`, *optional*, defaults to `"train"`): The split. A file has only `train`.

    Returns:
        Iterator of a row's place, such as `"facts.csv, line 3"`, and the row. The cells of CSV are text.

    Raises:
        FileNotFoundError: If `path` looks like a file and does not exist.
        ValueError: If the source has no such split, or cannot be read as rows. The message names the place.
    """
    rows = _open(path, split)
    if not isinstance(rows, Dataset):
        return rows
    return ((f"{path} (split {split!r}), row {number}", row) for number, row in enumerate(rows, start=1))


def load_table(name_or_path: str | os.PathLike, split: str = "train", config: str | None = None) -> Dataset:
    """
    Loads the rows of [`read_rows`] as a `Dataset`. CSV and JSON are held in memory; Parquet is not.

    Args:
        name_or_path (`str` or `os.PathLike`): As for [`read_rows`].
        split (`str`, *optional*, defaults to `"train"`): The split. A file has only `train`.
        config (`str`, *optional*): The configuration of a dataset on the Hub.

    Raises:
        ValueError: Beside those of [`read_rows`], if a column has values of different types, or there is no row.
    """
    rows = _open(name_or_path, split, config)
    table = rows if isinstance(rows, Dataset) else dataset_of_rows(rows)
    if not len(table):
        raise ValueError(f"{name_or_path} (split {split!r}): there are no rows in it")
    return table


def dataset_of_rows(located_rows: Iterable[tuple[str, dict]]) -> Dataset:
    """The rows, each with its place for errors, as a `Dataset` with the columns of all; what a row lacks is `None`."""
    rows: list[dict] = []
    places: list[str] = []
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
        places.append(place)
    table = {name: [row.get(name) for row in rows] for name in columns}
    try:
        return Dataset.from_dict(table, on_mixed_types="use_json")
    except (OverflowError, UnicodeEncodeError):  # numbers of more than 64 bits, halves of surrogate pairs
        for place, row in zip(places, rows, strict=True):
            for name, value in row.items():
                try:
                    Dataset.from_dict({name: [value]}, on_mixed_types="use_json")
                except (OverflowError, UnicodeEncodeError) as error:
                    raise ValueError(f"{place}: {name} is {value!r}, which no table can hold ({error})") from error
        raise


def _open(path: str | os.PathLike, split: str, config: str | None = None) -> Dataset | Iterator[tuple[str, Any]]:
    """What keeps its types by itself as a `Dataset`, of CSV and JSON the rows, each with its place."""
    folder = Path(path)
    if not folder.is_dir() and (folder.is_file() or folder.suffix.lower() in (*_PARSERS, ".parquet")):
        return _open_file(folder, split)
    for file in (folder / f"{split}{suffix}" for suffix in _PARSERS):
        if file.is_file():
            return _open_file(file, "train")
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        data = load_from_disk(folder)
        return _choose(data if isinstance(data, DatasetDict) else {"train": data}, split, path)
    try:
        builder = load_dataset_builder(os.fspath(path), config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read here, nor as a dataset of the Hub ({error})") from error
    if builder.name not in ("csv", "json") or getattr(builder.config, "field", None):
        return load_dataset(os.fspath(path), config, split=split)
    files = _choose({str(name): files for name, files in builder.config.data_files.items()}, split, path)
    parse = partial(_parse_csv, delimiter=builder.config.sep) if builder.name == "csv" else _parse_json
    copies = DownloadManager().download_and_extract(files)
    return chain.from_iterable(_read_text(name, Path(copy), parse) for name, copy in zip(files, copies, strict=True))


def _open_file(file: Path, split: str) -> Dataset | Iterator[tuple[str, Any]]:
    suffix = file.suffix.lower()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; the current folder is {Path.cwd()}")
    if split != "train":
        raise ValueError(f"{file}: a file has only the split 'train', got split={split!r}")
    if suffix == ".parquet":
        try:
            return Dataset.from_parquet(os.fspath(file))
        except (ValueError, OSError, DatasetGenerationError) as error:
            raise ValueError(f"{file}: not Parquet ({error.__cause__ or error}); write the file anew") from error
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
        position = text.find("\0")  # never in CSV or JSON, in UTF-16 every other byte
    except UnicodeDecodeError as error:
        position = error.start
    if position >= 0:
        encoding = "it looks like UTF-16" if b"\0" in content else "it is not UTF-8"
        line = content.count(b"\n", 0, position) + 1
        raise ValueError(f"{name}, line {line}: {encoding}; save the file in UTF-8")
    yield from parse(name, text)


def _parse_jsonl(name: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # JSON leaves U+2028 and its like within a text
        if not line.strip():
            continue
        try:
            yield f"{name}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error}); write one object per line") from error


def _parse_json(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """A list of objects, or one object per line: on the Hub, both are called `.json`."""
    if not text.lstrip().startswith("["):
        yield from _parse_jsonl(name, text)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}, line {getattr(error, 'lineno', 1)}: not JSON ({error})") from error
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _parse_csv(name: str, text: str, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len({*header}) < len(header) or (len(header) == 1 and {*header[0]} & {*",;\t"}):
            raise ValueError(f"{name}, line 1: give columns different names, separated by {delimiter!r}; got {header}")
        for cells in filter(None, reader):
            place = f"{name}, line {reader.line_num}"
            if len(cells) != len(header):
                found = f"{len(cells)} cells for {len(header)} columns"
                raise ValueError(f"{place}: {found}; quote those with {delimiter!r}")
            yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: not CSV ({error})") from error


csv.field_size_limit(2**31 - 1)  # training data may hold whole documents
_PARSERS = {".jsonl": _parse_jsonl, ".json": _parse_json, ".csv": _parse_csv}
_PARSERS |= {".tsv": partial(_parse_csv, delimiter="\t")}


def read_tsv(package: str, name: str) -> list[dict[str, str]]:
    """The rows of a file of tab-separated values that `package` carries. No cell is quoted."""
    with (resources.files(package) / name).open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
