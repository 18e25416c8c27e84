# SPDX-License-Identifier: Apache-2.0
"""scripts/check_distributed.py passes on two processes, and does not where something is wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from toy_study import SCRIPTS


NUM_CHECKS = 23


def check(folder: Path, *flags: str, config: str | None = None) -> subprocess.CompletedProcess:
    """In one process, or in two as one of the accelerate configs says."""
    launch = [sys.executable]
    if config is not None:
        config = SCRIPTS / f"accelerate_configs/{config}.yaml"
        launch = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", config, "--num_processes", 2]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launch += ["--main_process_port", free.getsockname()[1]]
    command = [*launch, SCRIPTS / "check_distributed.py", "--output_dir", folder, *flags]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    done = check(folder, "--write_reference")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_pass_and_what_differs_does_not(reference, tmp_path):
    shutil.copytree(reference / "reference", tmp_path / "reference")
    done = check(tmp_path, config="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout and done.stdout.count("passed  ") == NUM_CHECKS and "FAILED" not in done.stdout

    file = tmp_path / "reference/self-distillation.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 0.01
    save_file(weights, file)
    done = check(tmp_path)
    assert done.returncode == 1 and done.stdout.count("FAILED") == 1
    assert "FAILED  self-distillation: weights, 1.00e-02" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_the_one_process_run(reference, tmp_path, stage):
    """The teacher's hash too: as the model itself, another one, and under an adapter."""
    shutil.copytree(reference / "reference", tmp_path / "reference")
    done = check(tmp_path, config=f"deepspeed_zero{stage}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, DEEPSPEED" in done.stdout and done.stdout.count("passed  ") == NUM_CHECKS
    for name in ("self-distillation", "another teacher", "cached teacher", "LoRA"):
        records = [
            json.loads((path / name / "whole/checkpoint-6/teacher.json").read_text())["sha256"]
            for path in (reference / "1-processes", tmp_path / "2-processes")
        ]
        assert records[0] == records[1]


def test_without_a_reference_it_says_how_to_get_one(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 1 and "Run this in one process with --write_reference first" in done.stderr
