# SPDX-License-Identifier: Apache-2.0
"""A stage of a study: work that reads files and leaves a folder, done once for the same arguments and inputs."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from ..files import read_json, write_json
from ..hub.environment import describe_environment
from ..hub.publishing import MODEL_FILES


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


def run_stage(
    folder: str | os.PathLike,
    arguments: dict[str, Any],
    inputs: Iterable[str | os.PathLike],
    work: Callable[[Path], None],
    every_process: bool = False,
) -> Path:
    """
    Runs `work(partial_folder)` unless `folder` already holds its result, and returns `folder`. After an error or a
    kill `folder` is what it was before, and the next run goes on in `<folder>.partial`.

    Args:
        folder (`str` or `os.PathLike`): Where the result goes, with `run.json`, which tells how it was made.
        arguments (`dict[str, Any]`): Everything that the result depends on. A changed one runs the stage again.
        inputs (`Iterable[str | os.PathLike]`): Files and folders that it reads. A changed one runs the stage again.
        work (`Callable[[Path], None]`): Writes the result into the folder that it is given. What it finds there is its
            own unfinished work, with the same arguments and inputs.
        every_process (`bool`, *optional*, defaults to `False`): Whether all processes work, or the main one alone.

    Raises:
        FileNotFoundError: If an input is missing.
        ValueError: If `folder` is ".", or holds an input or files of no stage: the result would take their place.
    """
    folder = Path(folder)
    if not folder.name:
        raise ValueError(f"The folder of the result is {os.fspath(folder)!r}, which cannot be replaced: name another.")
    partial = folder.with_name(folder.name + ".partial")
    state = PartialState()
    arguments = json.loads(json.dumps(arguments, default=str))
    inputs = {os.fspath(path): fingerprint(path) for path in inputs}
    # All numbers as floats: a flag gives 20.0 where YAML gives 20
    identity = json.loads(json.dumps([arguments, *inputs.values()]), parse_int=float)
    key = _digest(json.dumps(identity, sort_keys=True).encode())
    done = _run_of(folder).get("key") == key
    if not done:
        _refuse_to_replace(folder, inputs)
    unfinished = _run_of(partial)
    complete = unfinished.get("key") == key and "seconds" in unfinished  # killed before it took the folder's place
    state.wait_for_everyone()  # nobody changes a folder before all have looked
    if done:
        logger.info(f"{folder.name}: nothing has changed, kept.")
        return folder
    run = {"key": key, "arguments": arguments, "inputs": inputs, **describe_environment()}
    if state.is_main_process:
        logger.info(f"{folder.name} ...")
        if unfinished.get("key") != key:
            shutil.rmtree(partial, ignore_errors=True)
            write_json(partial / RUN_FILE, run)
    state.wait_for_everyone()
    started = time.monotonic()
    if not complete and (every_process or state.is_main_process):
        work(partial)
    state.wait_for_everyone()
    if state.is_main_process:
        if not complete:
            write_json(partial / RUN_FILE, {**run, "seconds": round(time.monotonic() - started, 1)})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        logger.info(f"{folder.name}: done in {tqdm.format_interval(time.monotonic() - started)}.")
    state.wait_for_everyone()
    return folder


def _refuse_to_replace(folder: Path, inputs: Iterable[str]) -> None:
    for path in inputs:
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"The result would take the place of {folder}, which holds its input {path}.")
    if folder.exists() and not (folder / RUN_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"The result would take the place of {folder}, which no stage wrote: no {RUN_FILE} in it.")


def fingerprint(path: str | os.PathLike) -> str:
    """
    Identifies the content of an input: a file by its SHA-256; the folder of a stage by its key, its JSONL files and
    its model, which may be edited or replaced by hand; any other (a model) by the names, sizes and times of its files.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist. Run the stage that writes it first, or correct the path.")
    if key := _run_of(path).get("key"):
        content = {file for pattern in ("*.jsonl", *MODEL_FILES) for file in path.glob(pattern)}
        return _digest("".join([key, *(fingerprint(file) for file in sorted(content))]).encode())
    files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _digest(json.dumps(stats).encode())


def run_arguments(folder: str | os.PathLike) -> dict[str, Any]:
    """The arguments of the stage that wrote `folder`, empty if none did."""
    return _run_of(Path(folder)).get("arguments", {})


def _run_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
