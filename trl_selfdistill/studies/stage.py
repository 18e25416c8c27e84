# SPDX-License-Identifier: Apache-2.0
"""A stage of a study: work that reads files and leaves a folder, done once for the same arguments and inputs.

A stage writes into `<folder>.partial`, which takes the folder's place only when it is complete: a kill, a full disk
or an error leaves what was there before, and the next run goes on in the partial folder (or starts it anew when its
arguments changed).
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from ..hub.environment import describe_environment
from ..trainers.checkpoints import is_disk_error


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
    Runs `work(partial_folder)` unless `folder` already holds its result, and returns `folder`.

    Args:
        folder (`str` or `os.PathLike`):
            Where the result goes. `run.json` in it tells the arguments, inputs, versions and duration.
        arguments (`dict[str, Any]`):
            Everything that the result depends on, as JSON values. A changed one runs the stage again.
        inputs (`Iterable[str | os.PathLike]`):
            Files and folders that the stage reads. A changed one runs the stage again.
        work (`Callable[[Path], None]`):
            Writes the result into the folder it is given. What it finds there is its own unfinished work, by the same
            arguments and inputs.
        every_process (`bool`, *optional*, defaults to `False`):
            Whether all the processes of a distributed launch take part (asking a model, training); otherwise the main
            one works alone.

    Raises:
        FileNotFoundError: If an input is missing.
        ValueError: If `folder` holds what no stage wrote, or an input: the result would take its place.
        OSError: If the result cannot be written; the message says where and that finished stages are kept.
    """
    folder = Path(folder)
    state = PartialState()
    inputs = {os.fspath(path): fingerprint(path) for path in inputs}
    key = _digest(json.dumps(_canonical([arguments, list(inputs.values())]), sort_keys=True).encode())
    done = _run_of(folder).get("key") == key
    if not done:
        _refuse_to_replace(folder, inputs)
    state.wait_for_everyone()  # nobody changes the folder before all have looked
    if done:
        logger.info(f"{folder.name}: nothing has changed, kept.")
        return folder
    partial = folder.with_name(folder.name + ".partial")
    run = {"key": key, "arguments": arguments, "inputs": inputs, **describe_environment()}
    earlier = _run_of(partial)
    complete = earlier.get("key") == key and "seconds" in earlier  # killed right before it took the folder's place
    state.wait_for_everyone()
    with explain_full_disk(folder.name, partial):
        if state.is_main_process and earlier.get("key") != key:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_json(partial / RUN_FILE, run)
        state.wait_for_everyone()
        started = time.monotonic()
        if not complete and (every_process or state.is_main_process):
            work(partial)
        state.wait_for_everyone()
        if state.is_main_process:
            if not complete:
                _write_json(partial / RUN_FILE, {**run, "seconds": round(time.monotonic() - started, 1)})
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    state.wait_for_everyone()
    return folder


@contextmanager
def explain_full_disk(stage: str, folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk into one that says where it happened and that the same command goes on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_disk_error(error):
            raise
        raise OSError(
            f"The stage {stage!r} could not write into {folder}: {error}. Free some space there and run the same "
            "command again: finished stages are kept, and this one goes on from its last checkpoint."
        ) from error


def _refuse_to_replace(folder: Path, inputs: Iterable[str]) -> None:
    for path in inputs:
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"The result would take the place of {folder}, which holds its input {path}. Choose another folder, "
                "such as one beside it."
            )
    if not (folder / RUN_FILE).is_file() and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(
            f"The result would take the place of {folder}, which no stage wrote (it has no {RUN_FILE}). Choose "
            "another folder, or move what is there."
        )


def fingerprint(path: str | os.PathLike) -> str:
    """
    What identifies the content of an input: the SHA-256 of a file; of a stage's folder, that of its key and of the
    JSONL files in it, which may be edited by hand; of any other folder (a model), that of its files' names, sizes and
    times.
    """
    path = Path(path)
    if path.is_file():
        return _digest(path.read_bytes())
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist. Run the stage that writes it first, or correct the path.")
    if key := _run_of(path).get("key"):
        tables = sorted(path.glob("*.jsonl"))
        return _digest("".join([key, *(_digest(table.read_bytes()) for table in tables)]).encode())
    files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _digest(json.dumps(stats).encode())


def model_identity(model: str) -> tuple[dict[str, str], list[str]]:
    """
    The arguments and the inputs by which a stage depends on a model: a Hub id is an argument, a folder an input, as it
    counts by its content, so that a study may be moved.
    """
    return ({}, [model]) if Path(model).is_dir() else ({"model": model}, [])


def run_arguments(folder: str | os.PathLike) -> dict[str, Any]:
    """The arguments of the stage that wrote `folder`, empty if none did."""
    return _run_of(Path(folder)).get("arguments", {})


def _run_of(folder: Path) -> dict[str, Any]:
    """The content of a folder's `run.json`, empty without one."""
    path = folder / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _canonical(value):
    """The same JSON value with whole numbers as integers: a flag gives 20.0 where YAML gives 20."""
    if isinstance(value, dict):
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
