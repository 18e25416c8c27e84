# SPDX-License-Identifier: Apache-2.0
"""scripts/check_distributed.py passes under DeepSpeed ZeRO-3, and not where something is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from toy_study import SCRIPTS

from trl_selfdistill.files import read_json


def check(folder: Path, *launcher: str | Path, flags: tuple = ()) -> subprocess.CompletedProcess:
    command = [*launcher, SCRIPTS / "check_distributed.py", "--output_dir", folder, *flags]
    # DeepSpeed compiles an operation; in a shared folder a run that was killed leaves its lock, and the next ones wait
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
def test_deepspeed_is_the_one_process_run_and_what_differs_is_found(tmp_path):
    """The teacher's hash too: as the model itself, another one, and under an adapter."""
    done = check(tmp_path, sys.executable, flags=("--write_reference",))
    assert done.returncode == 0, done.stderr[-3000:]
    file = tmp_path / "reference/SFT.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 0.01
    save_file(weights, file)

    config = ["--config_file", SCRIPTS / "accelerate_configs/deepspeed_zero3.yaml"]
    config += ["--num_processes", 2, "--main_process_port", 0]  # a free one
    done = check(tmp_path, Path(sys.executable).parent / "accelerate", "launch", *config)
    assert done.returncode == 1 and "2 processes, DEEPSPEED" in done.stdout, done.stderr[-3000:]
    assert re.findall("^FAILED  .*,", done.stdout, re.MULTILINE) == ["FAILED  SFT: weights,"]
    assert "FAILED  SFT: weights, 1.00e-02" in done.stdout and done.stdout.count("passed  ") == 18
    for name in ("frozen groups", "another teacher", "cached teacher", "LoRA", "anchors"):
        runs = (tmp_path / f"{number}-processes/{name}/checkpoint-4/resume.json" for number in (1, 2))
        alone, together = (read_json(path)["teacher"]["sha256"] for path in runs)
        assert alone == together
