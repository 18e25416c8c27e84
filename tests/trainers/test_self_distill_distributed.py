# SPDX-License-Identifier: Apache-2.0
"""SelfDistillSFTTrainer on two processes (DDP, gloo) is the one-process run with the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file
from sft_runs import TOKENIZER, architecture, logs, train


RUNS = {
    "a given teacher": dict(kl_weight=2.0),
    "a snapshot": dict(teacher_snapshot_steps=1),
    "another loss": dict(kl_weight=2.0, loss_type="dft"),
}


def run_all(folder: Path, batch_size: int) -> None:
    """Each of the runs, its weights and its logs."""
    for name, options in RUNS.items():
        teacher = None if "snapshot" in name else build_model(TOKENIZER, seed=1, initializer_range=0.4)
        options = dict(per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.5, **options)
        options |= dict(gradient_accumulation_steps=2, max_steps=2, max_grad_norm=0.0)
        run = train(folder / name, architecture("llama"), dict(teacher_model=teacher), **options)
        run.save_model()
        if run.is_world_process_zero():
            (folder / name / "logs.json").write_text(json.dumps(logs(run)))


def start_process(folder: Path, rank: int, port: int) -> subprocess.Popen:
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment |= dict(PYTHONPATH=os.pathsep.join(sys.path), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS=1)
    return subprocess.Popen(
        [sys.executable, __file__, folder],
        env=os.environ | {key: str(value) for key, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    alone, together = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_process(together, rank, port) for rank in range(2)]
    run_all(alone, batch_size=2)
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()
    return alone, together


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_with_twice_the_batch(folders, name):
    alone, together = (load_file(folder / name / "run" / "model.safetensors") for folder in folders)
    assert alone.keys() == together.keys()
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], rtol=1e-4, atol=1e-6, msg=key)
    alone, together = (json.loads((folder / name / "logs.json").read_text()) for folder in folders)
    for row, expected in zip(together[:2], alone[:2], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert alone[1]["kl_loss"] >= 0


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), batch_size=1)
