# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, JSON, and where programs and metric are. Standard library only."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def shipped(path: str) -> Path:
    """A file or folder of scripts/ or evaluate_metrics/: below an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    return next(root / path for root in (package, package.parent) if (root / path).exists())


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields `<path>.partial`, to write a file or a folder to, which takes the place of `path` when the block ends. After
    an error or a kill `path` is what it was before, but for a kill in the instant in which a folder is replaced. An
    `OSError` if one of the two is a folder and the other a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # in the same folder: only there is renaming atomic
    _remove(partial)  # of a run that was killed
    try:
        yield partial
        if path.is_dir() and partial.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextmanager
def warn_without(path: str | os.PathLike) -> Iterator[None]:
    """Turns an error in the block into a warning that names `path`: for cards and figures, which may not end a run."""
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).warning(f"Going on without {path}: {type(error).__name__}: {error}")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON value, indented and in UTF-8, whole or not at all. What JSON does not know is written as text."""
    with written_whole(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        partial.write_text(text + "\n", encoding="utf-8", newline="\n")


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value in a UTF-8 file. A `ValueError` names the file if it holds something else."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Writes JSON lines in UTF-8, one value each, whole or not at all."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """The values of a file of JSON lines. Lines end at "\\n" alone: JSON leaves U+2028 and its like within a text."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
