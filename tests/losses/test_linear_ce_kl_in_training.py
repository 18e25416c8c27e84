# SPDX-License-Identifier: Apache-2.0
"""linear_ce_kl inside of what trainers do: bounded memory, sharded heads, checkpointing, torch.compile, scaling; for
GPUs that are not here, without register spills, and launched where its tensors are."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from trl_selfdistill import LMHead, linear_ce_kl
from trl_selfdistill.losses import ce_kl_triton
from trl_selfdistill.losses.ce_kl_torch import Tile, TileObjective


MEASURE = """
import re, torch
from pathlib import Path
from trl_selfdistill import LMHead, linear_ce_kl

def peak():  # `ru_maxrss` would begin with the memory of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def peak_after_step(num_tokens):
    hidden, head = torch.randn(num_tokens, 16, requires_grad=True), LMHead(torch.randn(32768, 16, requires_grad=True))
    labels = torch.randint(32768, (num_tokens,))
    linear_ce_kl(hidden, head, -hidden, head, labels, kl_weight=1.0, memory_budget_mib=32).loss.backward()
    return peak()

# Two chunks: what libraries allocate once, and the working memory. Then many chunks, and whole logits
few, many, logits = peak_after_step(256), peak_after_step(1024), torch.ones(6, 1024, 32768)
print(few, many, peak())
"""


def test_memory_does_not_grow_with_the_number_of_tokens():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    few, many, whole = map(float, run.stdout.split())
    assert many - few < 20  # the logits of 1,024 tokens take 128 MiB for each model
    assert whole - few > 200  # the measurement sees what there is to see


class Student(torch.nn.Module):
    """A hidden layer and a head, with the loss in the forward, in many chunks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 40)

    def forward(self, inputs, labels):
        hidden, head = self.layer(inputs).tanh(), LMHead(self.head.weight, self.head.bias)
        return linear_ce_kl(hidden, head, inputs, head, labels, kl_weight=1.0, memory_budget_mib=0.001).loss


def batch():
    torch.manual_seed(1)
    return torch.randn(12, 8, requires_grad=True), torch.randint(40, (12,))


@pytest.mark.parametrize("wrapper", ["compile", "checkpoint", "reentrant checkpoint"])
def test_inside_of_torch_compile_and_activation_checkpointing(wrapper):
    model = Student()
    expected = torch.autograd.grad(model(*batch()), model.parameters())
    if wrapper == "compile":
        loss = torch.compile(model, backend="aot_eager")(*batch())
    else:
        loss = checkpoint(model, *batch(), use_reentrant=wrapper == "reentrant checkpoint")
    loss.backward()
    torch.testing.assert_close(tuple(parameter.grad for parameter in model.parameters()), expected)


def test_backward_twice_without_a_frozen_part_and_without_gradients():
    model = Student()
    loss = model(*batch())
    first = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, model.parameters()), tuple(2 * x for x in first))
    model.head.requires_grad_(False)  # as under LoRA: the head's gradient is not computed
    loss = model(*batch())
    assert len([x for x in loss.grad_fn.next_functions if x[0] is not None]) == 1  # to the hidden states only
    torch.testing.assert_close(torch.autograd.grad(loss, model.layer.parameters()), first[:2])
    with torch.no_grad():
        without = model(*batch())
    assert not without.requires_grad and torch.equal(without, loss)


def test_sharded_heads_are_gathered_and_get_a_sharded_gradient(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, labels = batch()
        whole = torch.randn(2, 40, 8).unbind()
        sharded = [distribute_tensor(x, DeviceMesh("cpu", [0]), [Shard(0)]) for x in whole]
        results = []
        for weight, teacher_weight in (whole, sharded):
            head, teacher_head = LMHead(weight.detach().requires_grad_()), LMHead(teacher_weight)
            loss = linear_ce_kl(hidden, head, hidden, teacher_head, labels, kl_weight=1.0).loss
            results.append((loss.detach(), *torch.autograd.grad(loss, head.weight)))
        loss, grad = results[1]
        assert isinstance(grad, DTensor) and grad.placements == (Shard(0),)
        torch.testing.assert_close((loss, grad.full_tensor()), results[0])
    finally:
        dist.destroy_process_group()


def test_scaled_losses_of_fp16_keep_small_gradients():
    """What a gradient scaler multiplies must not have been rounded to zero before."""
    hidden, labels = batch()
    weight = torch.randn(40, 8).half().requires_grad_()

    def gradient(num_items):
        inputs = (hidden.detach().half(), LMHead(weight), None, None, labels)
        loss = linear_ce_kl(*inputs, kl_weight=0.0, num_items_in_batch=num_items).loss
        return torch.autograd.grad(loss * num_items, weight)[0]

    # Gradients of 1e-8 before the scaling: below the smallest fp16 number
    torch.testing.assert_close(gradient(2**20), gradient(1), rtol=1e-2, atol=1e-3)


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
