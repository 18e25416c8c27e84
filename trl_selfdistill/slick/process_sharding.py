# SPDX-License-Identifier: Apache-2.0
"""Work that the processes of a distributed launch share, and a file from which a stopped run continues it."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from ..files import written_whole


def map_in_parallel(function: Callable, items: Sequence) -> list:
    """
    Returns `[function(item) for item in items]` on every process, of which each computes a share. A collective: call
    it on every process with the same `items`. `function`, called as often on each, may be one. Results are pickled.
    """
    # Not accelerate's `split_between_processes`, which before 1.14 gives the last item to processes without one too
    size = -(-len(items) // PartialState().num_processes)
    share = [*items[size * PartialState().process_index :][:size]]
    results = [function(item) for item in share + [*items[:1]] * (size - len(share))]
    return gather_object(results[: len(share)])


def on_main_process(function: Callable[[], Any]) -> Any:
    """Returns on every process what `function` returns on the main one. A collective."""
    return broadcast_object_list([function() if PartialState().is_main_process else None])[0]


def checksum(value: Any) -> str:
    """SHA-256 of the `repr` of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


class ProgressFile:
    """
    The `results` of the finished units of some work, by name, kept in a JSON-lines file (or with `path=None` in memory
    only). Its first line is the work's `identity`: settings and checksums of the inputs. A last line without its end,
    left by a run that was killed, is dropped, and a file of other work is refused. The main process reads and writes.
    """

    def __init__(self, path: str | os.PathLike | None, identity: dict[str, Any]):
        self._path = None if path is None else Path(path)
        header = json.dumps({"identity": identity}).encode() + b"\n"
        self.results: dict[str, Any] = {} if path is None else on_main_process(lambda: self._read(header))

    def do(self, function: Callable[[str, Sequence], Any], units: dict[str, Sequence], title: str | None) -> None:
        """
        Adds `function(name, items)` of each unit that has no result yet, with a bar of the items if it has a title. A
        collective: the processes do a unit each, then all are in the file.
        """
        left, n = [unit for unit in units.items() if unit[0] not in self.results], PartialState().num_processes
        shown = {"desc": title, "unit": "question", "disable": title is None or not PartialState().is_main_process}
        with tqdm(total=sum(len(items) for _, items in left), **shown) as bar:
            for begin in range(0, len(left), n):
                together = left[begin : begin + n]
                results = map_in_parallel(lambda unit: function(*unit), together)
                for (name, items), result in zip(together, results, strict=True):
                    self.results[name] = result
                    if self._path is not None and PartialState().is_main_process:
                        with self._path.open("ab") as file:
                            file.write(json.dumps({"unit": name, "result": result}).encode() + b"\n")
                    bar.update(len(items))

    def _read(self, header: bytes) -> dict[str, Any]:
        content = self._path.read_bytes() if self._path.exists() else b""
        if not content.startswith(header[: len(content)]):
            found, now = (text.split(b"\n")[0].decode(errors="replace") for text in (content, header))
            raise ValueError(f"{self._path} is of other work, {found}, and not {now}; delete it or name another file")
        whole_lines = content[: content.rfind(b"\n") + 1] or header
        with written_whole(self._path) as partial:
            partial.write_bytes(whole_lines)
        units = [json.loads(line) for line in whole_lines.removeprefix(header).splitlines()]
        return {unit["unit"]: unit["result"] for unit in units}
