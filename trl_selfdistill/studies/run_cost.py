# SPDX-License-Identifier: Apache-2.0
"""What a training run costs: seconds of a step, and the most memory held."""

import statistics
import time
import warnings
from pathlib import Path

import psutil
import torch
from transformers import TrainerCallback


_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class RunCost(TrainerCallback):
    """
    Measures each optimizer step, without evaluation and saving, and the memory from the first step to the last.

    On a GPU that is what torch has allocated there. On a CPU it is the resident memory of the whole process, which
    holds what earlier runs in it left: see what it was at the beginning. Linux keeps the peak itself; elsewhere, after
    a warning, it is the largest at the end of a step, which misses what is freed within one.
    """

    def __init__(self):
        self.seconds: list[float] = []
        self.begin_bytes = self.peak_bytes = 0
        self.measure = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
            self.measure, self.begin_bytes = "allocated on the GPU", torch.cuda.memory_allocated(args.device)
            return
        self.measure = "peak resident memory of the process" if _reset_peak() else "resident memory after each step"
        self.begin_bytes = psutil.Process().memory_info().rss

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)
        if args.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(args.device)
        elif self.measure.startswith("peak"):
            self.peak_bytes = _peak_since_reset()
        else:
            self.peak_bytes = max(self.peak_bytes, psutil.Process().memory_info().rss)

    def median_seconds(self) -> float | None:
        """Median seconds of a step, `None` without any."""
        return statistics.median(self.seconds) if self.seconds else None

    def summary(self) -> dict:
        """`seconds_per_step` (median), `peak_memory_bytes`, `begin_memory_bytes` and `memory_measure`."""
        return {
            "seconds_per_step": self.median_seconds(),
            "peak_memory_bytes": self.peak_bytes,
            "begin_memory_bytes": self.begin_bytes,
            "memory_measure": self.measure,
        }


def _reset_peak() -> bool:
    """Sets the peak that Linux keeps of the process to what it holds now (proc(5)); `False`, said, where it cannot."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError as error:
        warnings.warn(
            f"The peak of the memory cannot be measured here ({error}): memory is looked at after each step.",
            stacklevel=2,
        )
        return False
    return True


def _peak_since_reset() -> int:
    [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
