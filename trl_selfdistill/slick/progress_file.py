# SPDX-License-Identifier: Apache-2.0
"""A JSON-lines file of finished pieces of work, so that a run that was stopped goes on where it was.

The first line says what the work is, each further line holds the result of one unit.
"""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .process_sharding import on_main_process


class ProgressFile:
    """
    The results of the units finished so far: those in the file, then those added by [`~ProgressFile.append`].

    A last line that was cut off (the run was killed while it wrote) is dropped from the file. In a distributed launch
    every process makes one; the main process alone reads and writes the file.

    Args:
        path (`str` or `os.PathLike`, *optional*):
            The file, made with its folder if missing. `None` keeps the results in memory only.
        identity (`dict`):
            What the work is, as JSON values: settings, checksums of the inputs.

    Attributes:
        results (`dict[str, Any]`): The result of each finished unit.

    Raises:
        `ValueError`: If the file is of other work (the message names what differs) or not such a file.
    """

    def __init__(self, path: str | os.PathLike | None, identity: dict[str, Any]):
        self.results: dict[str, Any] = {}
        self._path = None
        if path is None:
            return
        self.results = on_main_process(lambda: self._read(Path(path), identity))
        if PartialState().is_main_process:
            self._path = Path(path)

    def append(self, unit: str, result: Any) -> None:
        """Adds the result of a unit; it is on the disk when this returns."""
        self.results[unit] = result
        if self._path is not None:
            _write(self._path, {"unit": unit, "result": result})

    @staticmethod
    def _read(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, newline, cut_off = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        if cut_off:
            os.truncate(path, len(whole + newline))
        if not newline:
            _write(path, {"identity": identity})
            return {}
        try:
            header, *lines = [json.loads(line) for line in whole.split(b"\n")]
            found = header["identity"]
            results = {line["unit"]: line["result"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a progress file ({error!r}); delete it or name another") from error
        identity = json.loads(json.dumps(identity))  # as it comes back from a file: no tuples
        differing = sorted(key for key in {*identity, *found} if identity.get(key) != found.get(key))
        if differing:
            changes = ", ".join(f"{key} (there {found.get(key)!r}, now {identity.get(key)!r})" for key in differing)
            raise ValueError(f"{path} holds other work, with another {changes}; delete it or name another file")
        return results


def _write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
