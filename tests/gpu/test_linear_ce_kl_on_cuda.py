# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel on a real GPU (`make gpu`): what the interpreter cannot show. Skipped where there is none."""

import pytest
import torch

from trl_selfdistill import LMHead, linear_ce_kl


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_inputs(num_tokens, dtype):
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, num_tokens, 256, device="cuda").to(dtype)
    weight, teacher_weight = (torch.randn(2, 50257, 256, device="cuda") / 8).to(dtype)  # a multiple of nothing
    labels = torch.randint(50257, (num_tokens,), device="cuda")
    labels[::3] = -100
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    head, teacher_head = (LMHead(x, logit_scale=0.5, logit_softcap=30.0) for x in (leaves[1], teacher_weight))
    return leaves, (leaves[0], head, teacher_hidden, teacher_head, labels)


def loss_and_gradients(num_tokens, dtype, **options):
    leaves, inputs = make_inputs(num_tokens, dtype)
    loss = linear_ce_kl(*inputs, kl_weight=1.0, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_as_exact_as_the_reference(dtype, tolerance, temperature):
    exact = loss_and_gradients(300, torch.float64, temperature=temperature, impl="reference")
    reference = loss_and_gradients(300, dtype, temperature=temperature, impl="reference")
    options = dict(temperature=temperature, impl="triton", memory_budget_mib=20)  # several chunks
    results = loss_and_gradients(300, dtype, **options)
    for truth, theirs, ours in zip(exact, reference, results, strict=True):
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + tolerance


def test_memory_follows_the_budget_and_not_the_number_of_tokens():
    def peak(num_tokens):
        loss_and_gradients(num_tokens, torch.bfloat16, memory_budget_mib=64)
        torch.cuda.reset_peak_memory_stats()
        loss_and_gradients(num_tokens, torch.bfloat16, memory_budget_mib=64)
        return torch.cuda.max_memory_allocated() / 2**20

    assert peak(16384) < peak(2048) + 64  # hidden states take 32 MiB; all logits of one model would be 1.5 GiB more


def test_under_autocast_it_is_triton_and_agrees_with_torch():
    with torch.autocast("cuda", torch.bfloat16):
        auto, triton, other = (loss_and_gradients(64, torch.float32, impl=x) for x in ("auto", "triton", "torch"))
    torch.testing.assert_close(auto, triton, rtol=0, atol=0)
    torch.testing.assert_close(auto, other, rtol=1e-2, atol=1e-3)
