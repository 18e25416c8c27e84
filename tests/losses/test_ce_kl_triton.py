# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel for GPUs that are not here: without register spills, and launched where its tensors are. What it
computes is tested next door."""

import os
import subprocess
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trl_selfdistill.losses import ce_kl_triton
from trl_selfdistill.losses.ce_kl_torch import Tile, TileObjective


# In a process of its own, as `TRITON_INTERPRET` is read when Triton is imported
COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_selfdistill.losses import ce_kl_triton

kernel = ce_kl_triton.ce_kl_rows
cases = [(80, "fp32", 30.0, 2.0), (90, "bf16", None, 1.0), (90, "bf16", 30.0, 0.7), (90, "fp32", None, 2.0)]
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3):  # older ones have no assembler for it
    cases.append((100, "bf16", None, 2.0))
for capability, dtype, softcap, inverse in cases:
    types = dict(student_products=f"*{dtype}", teacher_products=f"*{dtype}", grads="*bf16", labels="*i64",
                 losses="*fp32", vocab_size="i32", ce_scale="fp32", kl_scale="fp32")
    constants = dict(HAS_TEACHER=True, STUDENT_SCALE=1.0, STUDENT_SOFTCAP=softcap, TEACHER_SCALE=1.0,
                     TEACHER_SOFTCAP=softcap, WITH_GRAD=True, INVERSE_TEMPERATURE=inverse,
                     LANES=32 * ce_kl_triton.NUM_WARPS, WIDTH=4 if dtype == "fp32" else 8)
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in kernel.arg_names}, constants)
    options = dict(num_warps=ce_kl_triton.NUM_WARPS)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm", cubin.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(*(len(re.findall(name, code)) for name in ("MUFU.EX2", r"\\bSTL\\b", r"\\bLDL\\b")))
"""


def test_compiles_without_register_spills():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0 and len(run.stdout.splitlines()) >= 3, run.stderr
    for line in run.stdout.splitlines():
        exponentials, spills, reloads = map(int, line.split())
        assert exponentials > 0 and spills == reloads == 0, line


def test_it_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """Triton takes the current device, whatever the tensors are on: here 0, with tensors that have no memory on 1."""
    current, launched = [0], []

    def exchange(device: int) -> int:
        """As `torch._C._cuda_exchangeDevice`, which a build for CPUs lacks; -1 leaves the device."""
        before = current[0]
        current[0] = device if device >= 0 else before
        return before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *tensors, **constants: launched.append((grid, *current))

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(ce_kl_triton, "ce_kl_rows", Kernel())
    with FakeTensorMode():
        tile = Tile(torch.empty(3, 7, device="cuda:1"), 1.0, None)
        labels = torch.empty(3, dtype=torch.int64, device="cuda:1")
        losses = ce_kl_triton.ce_kl_tile_(tile, tile, labels, TileObjective(1.0, 1.0, 0.5, 1.0), None)
    assert launched == [((3,), 1)] and current == [0]
    assert losses.shape == (3, 4) and losses.device == tile.products.device
