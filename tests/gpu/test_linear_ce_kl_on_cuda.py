# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel on a real GPU (`make gpu`): what the interpreter cannot show. Skipped where there is none."""

import pytest
import torch

from trl_selfdistill import LMHead, linear_ce_kl


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HEADS = {
    "plain": {},
    "scale and softcap": dict(logit_scale=0.5, logit_softcap=30.0),
    "bias": dict(bias=True, logit_scale=2.0),
}


def make_inputs(num_tokens, dtype, vocab=50257, bias=False, strided=False, device="cuda", grid=None, **head_options):
    """
    The tensors that need a gradient, and the five positional arguments; 50257 is a multiple of nothing. With a `grid`,
    values that this dtype holds.
    """
    torch.manual_seed(0)
    columns = slice(None, None, 2 if strided else 1)

    def side():
        hidden = torch.randn(num_tokens, 512 if strided else 256, device=device)[:, columns]
        tensors = [hidden, torch.randn(vocab, 256, device=device) / 8]
        if bias:  # with tokens that cannot come
            masked = torch.arange(vocab, device=device) % 50 == 7
            tensors.append(torch.randn(vocab, device=device).masked_fill(masked, float("-inf")))
        return [x.to(grid or dtype).to(dtype) for x in tensors]

    student, teacher = [x.detach().requires_grad_() for x in side()], side()
    labels = torch.randint(vocab, (num_tokens,), device=device) // 50 * 50
    labels[::3] = -100
    sides = (student[0], LMHead(*student[1:], **head_options), teacher[0], LMHead(*teacher[1:], **head_options))
    return student, (*sides, labels)


def loss_and_gradients(num_tokens, dtype, sizes=None, **options):
    leaves, inputs = make_inputs(num_tokens, dtype, **(sizes or {}))
    loss = linear_ce_kl(*inputs, **{"kl_weight": 1.0, **options}).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("head", HEADS)
def test_as_exact_as_the_kernel_in_pytorch(dtype, temperature, head):
    exact = loss_and_gradients(301, torch.float64, HEADS[head], temperature=temperature, impl="torch")
    reference = loss_and_gradients(301, dtype, HEADS[head], temperature=temperature, impl="torch")
    options = dict(temperature=temperature, impl="triton", memory_budget_mib=20)  # several chunks
    results = loss_and_gradients(301, dtype, HEADS[head], **options)
    for truth, theirs, ours in zip(exact, reference, results, strict=True):
        largest = truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + TOLERANCES[dtype] * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_in_fp32_leave_less_than_half_of_the_error(bias, dtype):
    """In the hidden states' gradient, of large logits; small ones are rounded less than the gradient itself."""
    sizes = dict(bias=bias, logit_scale=2.0, grid=dtype)
    exact = loss_and_gradients(301, torch.float64, sizes, impl="torch")
    half, single = (
        loss_and_gradients(301, dtype, sizes, impl="triton", logits_dtype=logits_dtype, memory_budget_mib=20)
        for logits_dtype in (None, torch.float32)
    )
    assert all(x.dtype == dtype for x in single[1:])
    errors = [[(x - truth).norm() for x, truth in zip(found, exact, strict=True)] for found in (half, single)]
    assert errors[1][1] < errors[0][1] / 2
    assert all(ours <= 1.1 * theirs for theirs, ours in zip(*errors, strict=True))


@pytest.mark.parametrize("sizes", [{"vocab": 3}, {"vocab": 129}, {"vocab": 50304}, {"strided": True}], ids=str)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_odd_shapes_and_strides(sizes, kl_weight):
    truth = loss_and_gradients(33, torch.float64, sizes, kl_weight=kl_weight, impl="torch")
    for expected, ours in zip(truth, loss_and_gradients(33, torch.float32, sizes, kl_weight=kl_weight), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_tile_of_more_than_2_to_the_31_elements():
    """Row offsets in 32 bits would read and write somewhere else: against many small chunks. Takes 20 GiB."""
    num_tokens, sizes = 24_600, dict(vocab=131_073)  # a third of the tokens are ignored
    whole = loss_and_gradients(num_tokens, torch.float32, sizes, memory_budget_mib=2**15)
    chunks = loss_and_gradients(num_tokens, torch.float32, sizes, memory_budget_mib=2**9)
    for one, many in zip(whole, chunks, strict=True):
        assert (one - many).abs().max() <= 1e-4 * many.abs().max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    first, second = (loss_and_gradients(33, torch.bfloat16, dict(device=f"cuda:{i}")) for i in (0, 1))
    for ours, theirs in zip(second, first, strict=True):
        torch.testing.assert_close(ours.to("cuda:0"), theirs)


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
