# SPDX-License-Identifier: Apache-2.0
"""A stage of a study: work that reads files and leaves a folder, done once for the same arguments and inputs.

A stage writes into `<folder>.partial`, which takes the folder's place only when it is complete: a kill, a full disk
or an error leaves what was there before, and the next run goes on in the partial folder (or starts it anew when its
arguments changed).
"""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
_PACKAGES = ("trl-selfdistill", "torch", "transformers", "trl", "accelerate", "datasets")


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
            Whether all the processes of a distributed launch take part (training); otherwise the main one works alone.

    Raises:
        FileNotFoundError: If an input is missing.
        OSError: If the result cannot be written; the message says where and that finished stages are kept.
    """
    folder = Path(folder)
    state = PartialState()
    inputs = {os.fspath(path): fingerprint(path) for path in inputs}
    key = _digest(json.dumps([arguments, list(inputs.values())], sort_keys=True).encode())
    done = _key_of(folder) == key
    state.wait_for_everyone()  # nobody changes the folder before all have looked
    if done:
        logger.info(f"{folder.name}: nothing has changed, kept.")
        return folder
    partial = folder.with_name(folder.name + ".partial")
    run = {"key": key, "arguments": arguments, "inputs": inputs, **_environment()}
    try:
        if state.is_main_process:
            if _key_of(partial) != key:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                _write_json(partial / RUN_FILE, run)
        state.wait_for_everyone()
        started = time.monotonic()
        if every_process or state.is_main_process:
            work(partial)
        state.wait_for_everyone()
        if state.is_main_process:
            _write_json(partial / RUN_FILE, {**run, "seconds": round(time.monotonic() - started, 1)})
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    except (OSError, SafetensorError) as error:
        if not _is_disk_error(error):
            raise
        raise OSError(
            f"The stage {folder.name!r} could not write into {partial}: {error}. Free some space there and run the "
            "same command again: finished stages are kept, and this one goes on from its last checkpoint."
        ) from error
    state.wait_for_everyone()
    return folder


def fingerprint(path: str | os.PathLike) -> str:
    """
    What identifies the content of an input: the key of a stage's folder, the SHA-256 of a file, and for any other
    folder (a model) that of its files' names, sizes and times.
    """
    path = Path(path)
    if path.is_file():
        return _digest(path.read_bytes())
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist. Run the stage that writes it first, or correct the path.")
    if key := _key_of(path):
        return key
    files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _digest(json.dumps(stats).encode())


def _key_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["key"]
    except FileNotFoundError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _environment() -> dict[str, Any]:
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def _is_disk_error(error: Exception) -> bool:
    # safetensors reports a failed write as text only
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(f"os error {code}" in str(error) for code in full)
