# SPDX-License-Identifier: Apache-2.0
"""How far some work is, for a terminal, a notebook or a file."""

import sys

from tqdm.auto import tqdm


_SECONDS_BETWEEN_LINES = 30
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, {remaining} to go{postfix}"


def _redraws(file) -> bool:
    return file.isatty() or "ipykernel" in sys.modules


class Progress(tqdm):
    """tqdm's bar. Where the output is a file or a pipe: a line every 30 seconds, and one at the end."""

    def __init__(self, *args, **kwargs):
        if not _redraws(kwargs.get("file") or sys.stderr):
            kwargs |= {"mininterval": _SECONDS_BETWEEN_LINES, "miniters": 1, "bar_format": _LINE}
        super().__init__(*args, **kwargs)

    @staticmethod
    def status_printer(file, *args):
        if _redraws(file):
            return tqdm.status_printer(file, *args)
        return lambda status: status and print(status, file=file, flush=True)

    def close(self) -> None:
        if not self.disable and not _redraws(self.fp):
            self.refresh()
            self.sp = None  # else tqdm ends a line that has ended
        super().close()
