# SPDX-License-Identifier: Apache-2.0
"""Calls a function of a test module in two processes that are connected by gloo, as `torchrun` would."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils.other import get_free_port
from packaging.version import Version


FSDP2_ON_CPU = Version(torch.__version__) >= Version("2.7")
needs_fsdp2_on_cpu = pytest.mark.skipif(
    not FSDP2_ON_CPU, reason="FSDP2 of torch 2.6 needs a GPU: 'Stream' object has no attribute 'record_event'"
)


def run_in_two_processes(work: Callable, folder: Path, **environment: object) -> None:
    """Calls `work(folder)` in two processes of one thread each, and waits for both to succeed."""
    program = f"import pathlib, two_processes, {work.__module__} as module\n"
    program += f"module.{work.__name__}(pathlib.Path({str(folder)!r}))\ntwo_processes.leave()"
    environment |= dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=get_free_port())
    environment |= dict(PYTHONPATH=os.pathsep.join(sys.path), ACCELERATE_USE_CPU="true")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {key: str(value) for key, value in {**environment, "RANK": r, "LOCAL_RANK": r}.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


def leave() -> None:
    """Ends the process once both are done, without Python's clean-up: gloo's threads now and then abort it."""
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
