# SPDX-License-Identifier: Apache-2.0
"""The memory of a run: its peak within a step, and a warning where that cannot be measured."""

from pathlib import Path

import numpy as np
import pytest
from transformers import TrainingArguments

from trl_selfdistill import run_cost
from trl_selfdistill.run_cost import RunCost


BIG = 200 * 2**20


def cost_of_a_step(folder) -> dict:
    """Of a step that holds 200 MiB for a moment."""
    cost, args = RunCost(), TrainingArguments(folder, use_cpu=True, report_to="none")
    cost.on_train_begin(args, None, None)
    cost.on_step_begin(args, None, None)
    np.ones(BIG, np.uint8)
    cost.on_step_end(args, None, None)
    return cost.summary()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps the peak")
def test_the_peak_within_a_step_is_found_and_is_that_of_the_run(tmp_path):
    np.ones(3 * BIG, np.uint8)  # before the run
    found = cost_of_a_step(tmp_path)
    assert 0.9 * BIG < found["peak_memory_bytes"] - found["begin_memory_bytes"] < 1.5 * BIG
    assert found["memory_measure"] == "peak resident memory of the process"


def test_where_the_peak_cannot_be_measured_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_cost, "_CLEAR_REFS", tmp_path / "nothing/clear_refs")
    with pytest.warns(UserWarning, match="The peak of the memory cannot be measured here"):
        found = cost_of_a_step(tmp_path)
    assert found["memory_measure"] == "resident memory after each step" and found["peak_memory_bytes"] > 2**20
