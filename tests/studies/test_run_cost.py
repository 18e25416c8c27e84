# SPDX-License-Identifier: Apache-2.0
"""The memory of a run: its peak within a step, and a warning where that cannot be measured."""

import mmap
from pathlib import Path

import pytest
from transformers import TrainingArguments

from trl_selfdistill.studies import run_cost
from trl_selfdistill.studies.run_cost import RunCost


BIG = 200 * 2**20


def hold(num_bytes: int) -> None:
    """Takes memory for a moment, from the system and not from what the allocator has kept."""
    with mmap.mmap(-1, num_bytes) as pages:
        for page in range(0, num_bytes, mmap.PAGESIZE):
            pages[page] = 1


def cost_of_a_step(folder) -> dict:
    """Of a step that holds 200 MiB for a moment."""
    cost, args = RunCost(), TrainingArguments(folder, use_cpu=True, report_to="none")
    cost.on_train_begin(args, None, None)
    cost.on_step_begin(args, None, None)
    hold(BIG)
    cost.on_step_end(args, None, None)
    return cost.summary()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps the peak")
def test_the_peak_within_a_step_is_found_and_is_that_of_the_run(tmp_path):
    hold(3 * BIG)  # before the run
    found = cost_of_a_step(tmp_path)
    assert 0.9 * BIG < found["peak_memory_bytes"] - found["begin_memory_bytes"] < 1.5 * BIG
    assert found["memory_measure"] == "peak resident memory of the process"


def test_where_the_peak_cannot_be_measured_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_cost, "_CLEAR_REFS", tmp_path / "nothing/clear_refs")
    with pytest.warns(UserWarning, match="The peak of the memory cannot be measured here"):
        found = cost_of_a_step(tmp_path)
    assert found["memory_measure"] == "resident memory after each step" and found["peak_memory_bytes"] > 2**20
