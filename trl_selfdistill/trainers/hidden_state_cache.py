# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a dataset's label tokens on disk: written a chunk of rows at a time, read by row, memory-mapped.

A chunk is one safetensors file that appears under its name when it is whole, and carries the SHA-256 of its content. A
cache that was cut off is one with chunks missing, and two jobs that write the same cache do not disturb each other.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .checkpoints import is_disk_error


DESCRIPTION_FILE = "cache.json"
_ROWS_FILE = "rows.safetensors"
# Small enough to be lost to a kill, and many enough for the processes to share them out evenly
_MAX_CHUNK_BYTES = 64 * 2**20
_MIN_CHUNKS = 16
_DEAD_AFTER_SECONDS = 3600  # no chunk takes that long to write


class HiddenStateCache:
    """
    The hidden states of one dataset's label tokens.

    Args:
        folder (`Path`): Where the files are, one folder a cache.
        num_tokens (`torch.Tensor` of shape `(num_rows,)`, int64): Label tokens of each row.
        hidden_size (`int`): Size of a hidden state.
        dtype (`torch.dtype`): What they are stored in.

    Attributes:
        chunks (`list[range]`): The rows of each chunk.
    """

    def __init__(self, folder: Path, num_tokens: torch.Tensor, hidden_size: int, dtype: torch.dtype):
        self.folder, self.num_tokens, self.hidden_size, self.dtype = folder, num_tokens, hidden_size, dtype
        self._ends = num_tokens.cumsum(0)
        total = int(self._ends[-1]) if len(num_tokens) else 0
        self.num_bytes = total * (hidden_size * dtype.itemsize + 4)  # a label id is kept beside each
        limit = max(1, min(_MAX_CHUNK_BYTES, -(-self.num_bytes // _MIN_CHUNKS))) // (hidden_size * dtype.itemsize + 4)
        self.chunks = _split(self._ends, max(limit, 1))
        self._chunk_ends = torch.tensor([chunk.stop for chunk in self.chunks])
        self._tensors: dict[int, dict[str, torch.Tensor]] = {}

    def file(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:05d}.safetensors"

    def missing(self) -> list[int]:
        """The chunks that are not there yet."""
        return [chunk for chunk in range(len(self.chunks)) if not self.file(chunk).is_file()]

    def write(self, chunk: int, hidden_states: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Writes a chunk, whole or not at all.

        Args:
            chunk (`int`): Index into `chunks`.
            hidden_states (`torch.Tensor` of shape `(num_label_tokens, hidden_size)`): Of its rows, one after another.
            labels (`torch.Tensor` of shape `(num_label_tokens,)`): The token that each of them predicts.
        """
        tensors = {"hidden_states": hidden_states.to("cpu", self.dtype), "labels": labels.to("cpu", torch.int32)}
        _write(self.file(chunk), tensors)

    def find_damage(self, chunk: int) -> str | None:
        """What is wrong with a chunk that is there, in words; `None` if it reads as it was written."""
        file = self.file(chunk)
        try:
            with safe_open(file, "pt") as opened:
                expected = (opened.metadata() or {}).get("sha256")
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            return f"{file} is cut off or damaged ({error})"
        if _digest(tensors) != expected:
            return f"{file} is damaged: its SHA-256 is not the one that it was written with"
        rows = self.chunks[chunk]
        shape = (int(self.num_tokens[rows.start : rows.stop].sum()), self.hidden_size)
        if tuple(tensors["hidden_states"].shape) != shape:
            return f"{file} holds hidden states of shape {tuple(tensors['hidden_states'].shape)}, not {shape}"
        return None

    def read(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the cache holds for some rows, in their order: hidden states `(num_label_tokens, hidden_size)` and labels
        `(num_label_tokens,)`.
        """
        found = [self._read_row(row) for row in rows]
        return torch.cat([row["hidden_states"] for row in found]), torch.cat([row["labels"] for row in found])

    def _read_row(self, row: int) -> dict[str, torch.Tensor]:
        chunk = int(torch.searchsorted(self._chunk_ends, row, right=True))
        if chunk not in self._tensors:
            self._tensors[chunk] = load_file(self.file(chunk))  # mapped: pages are read when a row is
        first = self.chunks[chunk].start
        before = int(self._ends[first - 1]) if first else 0
        end = int(self._ends[row]) - before
        start = end - int(self.num_tokens[row])
        return {name: tensor[start:end] for name, tensor in self._tensors[chunk].items()}

    def check_space(self) -> None:
        """
        Raises:
            OSError: If the disk has no room for the chunks that are missing.
        """
        needed = sum(self._bytes_of(self.chunks[chunk]) for chunk in self.missing())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The teacher's cache needs {format_bytes(needed)} more in {self.folder}, and the disk has "
                f"{format_bytes(free)} free. Free some, set `teacher_cache_dir` to a folder on another disk"
                + (', set `teacher_cache_dtype="bfloat16"`,' if self.dtype == torch.float32 else "")
                + " or leave `precompute_teacher` unset."
            )

    def _bytes_of(self, rows: range) -> int:
        return int(self.num_tokens[rows.start : rows.stop].sum()) * (self.hidden_size * self.dtype.itemsize + 4)

    def remove_leftovers(self) -> None:
        """Removes what jobs that were killed have left half-written, not what one may be writing now."""
        for file in self.folder.glob("*.partial"):
            if time.time() - file.stat().st_mtime > _DEAD_AFTER_SECONDS:
                file.unlink(missing_ok=True)


def _split(ends: torch.Tensor, max_tokens: int) -> list[range]:
    """Consecutive rows in chunks of at most `max_tokens` tokens, or of one row that has more by itself."""
    chunks, start = [], 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = int(torch.searchsorted(ends, before + max_tokens, right=True))
        chunks.append(range(start, max(stop, start + 1)))
        start = chunks[-1].stop
    return chunks


def read_num_tokens(folder: Path) -> torch.Tensor | None:
    """The label tokens of each row that a cache was laid out for; `None` if there is none in `folder` yet."""
    file = folder / _ROWS_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            expected = (opened.metadata() or {}).get("sha256")
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is cut off or damaged ({error}). Delete it: it is written anew.") from error
    if _digest(tensors) != expected:
        raise ValueError(f"{file} is damaged: its SHA-256 is not its content's. Delete it: it is written anew.")
    return tensors["num_tokens"]


def write_layout(folder: Path, num_tokens: torch.Tensor, description: dict) -> None:
    """Begins a cache in `folder`: the label tokens of each row, and in `cache.json` what it is of."""
    _write(folder / _ROWS_FILE, {"num_tokens": num_tokens})
    with _whole(folder / DESCRIPTION_FILE) as partial:
        partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _whole(file) as partial:
        save_file(tensors, partial, metadata={"sha256": _digest(tensors)})


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` at the end. No other process writes to the same one."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        raise OSError(
            getattr(error, "errno", None),
            f"{file} could not be written: {error}. Free some space there, or set `teacher_cache_dir` to a folder on "
            "another disk. The same command goes on with the chunks that are there.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # NumPy has no bfloat16
    return digest.hexdigest()


def format_bytes(num_bytes: float) -> str:
    """
    A size in decimal units.

    ```python
    >>> format_bytes(1_500_000)
    '1.5 MB'
    ```
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
