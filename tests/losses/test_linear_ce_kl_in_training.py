# SPDX-License-Identifier: Apache-2.0
"""linear_ce_kl inside of what trainers do: bounded memory, sharded heads, checkpointing, torch.compile, scaling."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from trl_selfdistill import LMHead, linear_ce_kl


MEASURE = """
import resource, sys, torch
from trl_selfdistill import LMHead, linear_ce_kl

def step(num_tokens, impl):
    hidden = torch.randn(num_tokens, 16, requires_grad=True)
    heads = [LMHead(torch.randn(32768, 16, requires_grad=True)) for _ in range(2)]
    labels = torch.randint(32768, (num_tokens,))
    inputs = (hidden, heads[0], hidden.detach(), heads[1], labels)
    linear_ce_kl(*inputs, kl_weight=1.0, temperature=0.5, impl=impl, memory_budget_mib=32).loss.backward()

step(256, "torch")  # two chunks: what libraries allocate once, and the working memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(int(sys.argv[1]), sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def growth_mib(num_tokens: int, impl: str) -> float:
    """How far the peak of the resident set rises above that of a step of 256 tokens."""
    run = subprocess.run([sys.executable, "-c", MEASURE, str(num_tokens), impl], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def test_memory_does_not_grow_with_the_number_of_tokens():
    logits_mib = 2048 * 32768 * 4 / 2**20  # 256 of one model
    assert growth_mib(2048, "torch") < 0.15 * logits_mib
    assert growth_mib(2048, "reference") > 2 * logits_mib  # the measurement sees what there is to see


class Student(torch.nn.Module):
    """A hidden layer and a head, with the loss in the forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 40)
        self.register_buffer("teacher_weight", torch.randn(40, 8))

    def forward(self, inputs, labels):
        hidden = self.layer(inputs).tanh()
        head = LMHead(self.head.weight, self.head.bias)
        teacher = (inputs, LMHead(self.teacher_weight))
        return linear_ce_kl(hidden, head, *teacher, labels, kl_weight=1.0, memory_budget_mib=0.001).loss


def batch():
    torch.manual_seed(1)
    return torch.randn(12, 8), torch.randint(40, (12,))


def gradients(function, model):
    model.zero_grad()
    function(*batch()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_inside_of_torch_compile():
    model = Student()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, model), gradients(model, model))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    model = Student()

    def checkpointed(inputs, labels):
        return checkpoint(model, inputs.requires_grad_(), labels, use_reentrant=use_reentrant)

    torch.testing.assert_close(gradients(checkpointed, model), gradients(model, model))


def test_backward_twice_and_without_a_frozen_part():
    model = Student()
    loss = model(*batch())
    first = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, model.parameters()), tuple(2 * x for x in first))
    model.head.requires_grad_(False)  # as under LoRA: the head's gradient is not computed
    loss = model(*batch())
    saved = [x for x in loss.grad_fn.next_functions if x[0] is not None]
    assert len(saved) == 1  # to the hidden states only
    partial = torch.autograd.grad(loss, model.layer.parameters())
    torch.testing.assert_close(partial, first[: len(partial)])


def test_without_gradients_nothing_is_kept():
    model = Student()
    with torch.no_grad():
        loss = model(*batch())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, model(*batch()).detach())


def test_sharded_heads_are_gathered_and_get_a_sharded_gradient(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        hidden, labels = batch()
        weight, teacher_weight = torch.randn(2, 40, 8)
        options = dict(kl_weight=1.0, temperature=0.5)

        def loss_and_gradient(weight, teacher_weight):
            weight.requires_grad_()
            loss = linear_ce_kl(hidden, LMHead(weight), hidden, LMHead(teacher_weight), labels, **options).loss
            return loss.detach(), torch.autograd.grad(loss, weight)[0]

        expected = loss_and_gradient(weight.clone(), teacher_weight)
        loss, grad = loss_and_gradient(*(distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, teacher_weight)))
        assert isinstance(grad, DTensor) and grad.placements == (Shard(0),)
        torch.testing.assert_close((loss, grad.full_tensor()), expected)
    finally:
        dist.destroy_process_group()


def test_scaled_losses_of_fp16_keep_small_gradients():
    """What a gradient scaler multiplies must not have been rounded to zero before."""
    hidden, labels = (x[:4] for x in batch())
    head = LMHead(torch.randn(40, 8).half().requires_grad_())
    options = dict(kl_weight=0.0, num_items_in_batch=2**20)  # gradients of 1e-8: below the smallest fp16 number
    loss = linear_ce_kl(hidden.half(), head, None, None, labels, **options).loss
    (grad,) = torch.autograd.grad(loss * 2.0**20, head.weight)
    exact = LMHead(head.weight.detach().double().requires_grad_())
    (expected,) = torch.autograd.grad(
        linear_ce_kl(hidden.half().double(), exact, None, None, labels, kl_weight=0.0, num_items_in_batch=1).loss,
        exact.weight,
    )
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-3)


def test_triton_is_refused_where_it_does_not_run():
    code = (
        "import torch; from trl_selfdistill import LMHead, linear_ce_kl; x = torch.zeros(2, 3); "
        "linear_ce_kl(x, LMHead(x), None, None, torch.tensor([0, 1]), kl_weight=0, impl='triton')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ValueError: `impl='triton'` needs Triton" in run.stderr and "Take `impl='auto'`" in run.stderr


def test_a_head_that_zero_3_holds_elsewhere_is_refused():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 0  # as DeepSpeed marks the parameters that it has partitioned
    hidden, labels = batch()
    with pytest.raises(ValueError, match="`student_lm_head.weight` is partitioned .*GatheredParameters"):
        linear_ce_kl(hidden, LMHead(weight), None, None, labels, kl_weight=0.0)
