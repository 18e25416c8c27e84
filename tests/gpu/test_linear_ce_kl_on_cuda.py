# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel on a real GPU (`make gpu`): what the interpreter cannot show. Skipped where there is none."""

import pytest
import torch

from trl_selfdistill import LMHead, linear_ce_kl


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HIDDEN_SIZE, VOCAB_SIZE = 256, 50257  # a vocabulary that is no multiple of anything


def make_inputs(num_tokens, dtype, device="cuda", **head_options):
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, num_tokens, HIDDEN_SIZE, device=device)
    weight, teacher_weight = torch.randn(2, VOCAB_SIZE, HIDDEN_SIZE, device=device) / 8
    labels = torch.randint(VOCAB_SIZE, (num_tokens,), device=device)
    labels[::3] = -100
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    teacher = LMHead(teacher_weight.to(dtype), **head_options)
    return leaves, (leaves[0], LMHead(leaves[1], **head_options), teacher_hidden.to(dtype), teacher, labels)


def loss_and_gradients(leaves, inputs, **options):
    loss = linear_ce_kl(*inputs, kl_weight=1.0, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_options", [{}, dict(logit_scale=0.5, logit_softcap=30.0)])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", 0.5])
def test_as_exact_as_the_reference(dtype, divergence, temperature, head_options):
    options = dict(divergence=divergence, temperature=temperature, memory_budget_mib=20)  # several chunks
    leaves, inputs = make_inputs(300, dtype, **head_options)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    hidden, head, teacher_hidden, teacher, labels = inputs
    exact_inputs = (
        exact_leaves[0], head._replace(weight=exact_leaves[1]), teacher_hidden.double(),
        teacher._replace(weight=teacher.weight.double()), labels,
    )  # fmt: skip
    exact = loss_and_gradients(exact_leaves, exact_inputs, impl="reference", **options)
    reference = loss_and_gradients(leaves, inputs, impl="reference", **options)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    ours = loss_and_gradients(leaves, inputs, impl="triton", **options)
    for truth, theirs, result in zip(exact, reference, ours, strict=True):
        assert (result - truth).abs().max() <= 2 * (theirs - truth).abs().max() + tolerance


def test_memory_follows_the_budget_and_not_the_number_of_tokens():
    def peak(num_tokens):
        leaves, inputs = make_inputs(num_tokens, torch.bfloat16)
        loss_and_gradients(leaves, inputs, memory_budget_mib=64)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(leaves, inputs, memory_budget_mib=64)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    assert peak(16384) < peak(2048) + 32  # all logits of one model would be 1.5 GiB more


def test_under_autocast_it_is_triton_and_agrees_with_torch():
    leaves, inputs = make_inputs(64, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        auto = loss_and_gradients(leaves, inputs)
        torch.testing.assert_close(auto, loss_and_gradients(leaves, inputs, impl="triton"), rtol=0, atol=0)
        torch.testing.assert_close(auto, loss_and_gradients(leaves, inputs, impl="torch"), rtol=1e-2, atol=1e-3)
