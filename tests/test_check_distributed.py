# SPDX-License-Identifier: Apache-2.0
"""scripts/check_distributed.py passes on two processes, and does not where something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from toy_study import SCRIPTS


CONFIG = SCRIPTS / "accelerate_configs/cpu.yaml"


def check(folder: Path, *flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    launch = [sys.executable]
    if processes > 1:
        launch = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", CONFIG]
    command = [*map(str, launch), str(SCRIPTS / "check_distributed.py"), "--output_dir", str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    done = check(folder, "--write_reference")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_pass_and_what_differs_does_not(reference):
    done = check(reference, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout and done.stdout.count("passed  ") == 14 and "FAILED" not in done.stdout

    file = reference / "reference/self-distillation.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 0.01
    save_file(weights, file)
    done = check(reference)
    assert done.returncode == 1 and done.stdout.count("FAILED") == 1
    assert "FAILED  self-distillation: weights, 1.00e-02" in done.stdout


def test_without_a_reference_it_says_how_to_get_one(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 1 and "Run this in one process with --write_reference first" in done.stderr
