# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel compiles for GPUs that are not here, without register spills. Its results are tested next door."""

import os
import subprocess
import sys

import pytest


# In a process of its own, as `TRITON_INTERPRET` is read when Triton is imported
COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_selfdistill.losses import ce_kl_triton

kernel = ce_kl_triton.ce_kl_rows
for capability, dtype, softcap in ((80, "fp32", 30.0), (90, "bf16", None)):
    types = dict(student_products=f"*{dtype}", teacher_products=f"*{dtype}", labels="*i64", losses="*fp32",
                 vocab_size="i32", ce_scale="fp32", kl_scale="fp32", inverse_temperature="fp32")
    constants = dict(HAS_TEACHER=True, STUDENT_SCALE=1.0, STUDENT_SOFTCAP=softcap, TEACHER_SCALE=1.0,
                     TEACHER_SOFTCAP=softcap, WITH_GRAD=True, BLOCK=ce_kl_triton.BLOCK_SIZE)
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
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 2, run.stderr
    for line in run.stdout.splitlines():
        exponentials, spills, reloads = map(int, line.split())
        assert exponentials > 0 and spills == reloads == 0, line
