# SPDX-License-Identifier: Apache-2.0
"""What a training run costs: seconds of a step, and the most memory held."""

import statistics
import time

import psutil
import torch
from transformers import TrainerCallback


class RunCost(TrainerCallback):
    """Measures each optimizer step, without evaluation and saving."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)
        if args.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(args.device)
        else:
            self.peak_bytes = max(self.peak_bytes, psutil.Process().memory_info().rss)

    def median_seconds(self) -> float | None:
        """Median seconds of a step, `None` without any."""
        return statistics.median(self.seconds) if self.seconds else None

    def summary(self) -> dict:
        """
        `seconds_per_step` (median) and `peak_memory_bytes`: of the GPU as torch allocates it, on a CPU the resident
        memory of the process at the ends of the steps.
        """
        return {
            "seconds_per_step": self.median_seconds(),
            "peak_memory_bytes": self.peak_bytes,
        }
