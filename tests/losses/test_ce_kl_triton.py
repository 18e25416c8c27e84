# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel compiles for GPUs that are not here, and keeps what it works with in registers.

What it computes is tested in tests/losses, in Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_selfdistill.losses.objective import ce_kl_triton

dtype, divergence, softcap = sys.argv[2], int(sys.argv[3]), None if sys.argv[4] == "None" else float(sys.argv[4])
types = dict(student_tile=f"*{dtype}", teacher_tile=f"*{dtype}", labels="*i64", losses="*fp32", vocab_size="i32",
             student_stride="i32", teacher_stride="i32", ce_scale="fp32", kl_scale="fp32",
             inverse_temperature="fp32", jsd_beta="fp32")
constants = dict(HAS_TEACHER=True, DIVERGENCE=divergence, SQUARES=True, STUDENT_SCALE=1.0, STUDENT_SOFTCAP=softcap,
                 TEACHER_SCALE=1.0, TEACHER_SOFTCAP=softcap, WITH_GRAD=True, BLOCK=ce_kl_triton.BLOCK_SIZE)
kernel = ce_kl_triton.ce_kl_rows
types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
target = GPUTarget("cuda", int(sys.argv[1]), 32)
compiled = triton.compile(ASTSource(kernel, types, constants), target=target,
                          options=dict(num_warps=ce_kl_triton.NUM_WARPS))
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
    cubin.write(compiled.asm["cubin"])
    cubin.flush()
    usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", cubin.name], capture_output=True, text=True)
    sass = subprocess.run([tools / "nvdisasm", cubin.name], capture_output=True, text=True, check=True).stdout
print(*re.findall(r"(?:REG|STACK|LOCAL):\\d+", usage.stdout), "EX2:%d" % len(re.findall(r"MUFU.EX2", sass)),
      "STL:%d LDL:%d" % (len(re.findall(r"\\bSTL\\b", sass)), len(re.findall(r"\\bLDL\\b", sass))))
"""


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("dtype, divergence, softcap", [("bf16", 0, None), ("fp32", 1, 30.0), ("fp16", 2, None)])
def test_compiles_without_register_spills(capability, dtype, divergence, softcap):
    pytest.importorskip("triton")
    arguments = [capability, dtype, str(divergence), str(softcap)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    usage = dict(item.split(":") for item in run.stdout.split())
    assert 32 < int(usage["REG"]) < 255 and int(usage["EX2"]) > 0  # the right program was looked at
    assert usage["STACK"] == usage["LOCAL"] == usage["STL"] == usage["LDL"] == "0"
