# SPDX-License-Identifier: Apache-2.0
"""How a table is stored: rows read with the place where each stands, for errors, and written whole or not at all.

What a row must hold is the business of `facts`.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


def read_rows(path: str | os.PathLike, split: str) -> Iterator[tuple[str, dict]]:
    """
    Rows of a file, a saved dataset or a dataset on the Hub.

    Args:
        path (`str` or `os.PathLike`):
            A `.jsonl`, `.json` (a list of objects) or `.csv` file, a folder written by `Dataset.save_to_disk`, or what
            `datasets.load_dataset` accepts.
        split (`str`):
            The split to read where the source has several.

    Returns:
        Iterator of where a row stands (`"facts.csv, line 3"`) and the row.

    Raises:
        `FileNotFoundError`: `path` looks like a file and does not exist.
        `ValueError`: the source cannot be read as rows; the message names the place.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    suffix = Path(path).suffix.lower()
    if Path(path).is_file():
        if suffix not in readers:
            raise ValueError(f"{path}: facts are read from {', '.join(readers)} files; rename or convert it")
        return _decoded(readers[suffix](Path(path)), path)
    if suffix in readers and not Path(path).is_dir():
        raise FileNotFoundError(f"{path}: there is no such file; the current folder is {Path.cwd()}")
    rows = _load_split(os.fspath(path), split)
    return ((f"{path} (split {split!r}), row {number}", row) for number, row in enumerate(rows, start=1))


def write_rows(rows: Iterable[dict], path: str | os.PathLike) -> None:
    """
    Writes rows as JSON lines in UTF-8, whole or not at all: a full disk or an interrupt leaves the file as it was.

    Args:
        rows (`Iterable[dict]`):
            What JSON can hold.
        path (`str` or `os.PathLike`):
            The file. Its folder is created if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _decoded(rows: Iterator[tuple[str, dict]], path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save the file in UTF-8") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig") as file:  # -sig: spreadsheets and Windows editors write a byte order mark
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); write one object per line") from error


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error}); one object per line is .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json file of facts holds a list of objects, got {type(rows).__name__}")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place}: has another number of cells than the header; quote cells with commas")
            yield place, row


def _load_split(path: str, split: str) -> Dataset:
    if Path(path).is_dir() and any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json")):
        data = load_from_disk(path)
        if not isinstance(data, DatasetDict):
            return data
        if split not in data:
            raise ValueError(f"{path}: no split {split!r}; there are {[*data]}")
        return data[split]
    return load_dataset(path, split=split)
