# SPDX-License-Identifier: Apache-2.0
"""linear_ce_kl is the formula of its docstring, in every precision, and keeps the laws of the KL divergence."""

import math

import pytest
import torch

from trl_selfdistill import LMHead, linear_ce_kl
from trl_selfdistill.losses import ce_kl_torch, ce_kl_triton


on_each_implementation = pytest.mark.parametrize("impl", ["torch", "triton"])
NUM_TOKENS, VOCAB = 10, 64


def make_inputs(dtype, vocab=VOCAB, teacher_size=8, bias=False, tied=False, num_ignored=4, **head_options):
    """The tensors that need a gradient, and the five positional arguments."""
    torch.manual_seed(0)

    def side(hidden_size):
        shapes = [(NUM_TOKENS, hidden_size), (vocab, hidden_size)] + [(vocab,)] * bias
        # On the grid of bf16, so that what is compared is the arithmetic and not the rounding of the inputs
        return [torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in shapes]

    student, teacher = side(8), side(teacher_size)
    labels = torch.randint(vocab, (NUM_TOKENS,))
    labels[torch.randperm(NUM_TOKENS)[:num_ignored]] = -100
    head = LMHead(*student[1:], **head_options)
    if tied:  # one tensor is the student's embedding (its hidden states here), its head and the teacher's head
        return student[1:], (student[1][:NUM_TOKENS] * 1.0, head, teacher[0], head, labels)
    return student, (student[0], head, teacher[0], LMHead(*teacher[1:], **head_options), labels)


def ours(*inputs, temperature=0.5, kl_weight=1.0, **options):
    return linear_ce_kl(*inputs, temperature=temperature, kl_weight=kl_weight, **options).loss


def naive(student, student_head, teacher, teacher_head, labels, ce_weight=1.0, kl_weight=1.0, temperature=0.5):
    """The loss as a textbook writes it: full logits in the dtype of its inputs, token by token in fp32."""

    def logits(hidden, head):
        z = torch.nn.functional.linear(hidden, head.weight, head.bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.logit_scale
        return z if head.logit_softcap is None else head.logit_softcap * (z / head.logit_softcap).tanh()

    z, t = logits(student, student_head), logits(teacher, teacher_head).detach()
    loss, counted = z.sum() * 0, (labels != -100).nonzero().flatten()
    for i in counted:
        ce = z[i].logsumexp(-1) - z[i, labels[i]]
        p, q = (t[i] / temperature).softmax(-1), (z[i] / temperature).softmax(-1)
        loss = loss + ce_weight * ce + kl_weight * temperature**2 * (p * (p.log() - q.log())).sum()
    return loss / len(counted)


def loss_and_gradients(function, dtype, sizes=None, **options):
    leaves, inputs = make_inputs(dtype, **(sizes or {}))
    loss = function(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(results, exact):
    return [float((ours.detach() - truth).abs().max()) for ours, truth in zip(results, exact, strict=True)]


@on_each_implementation
@pytest.mark.parametrize(
    "sizes, options",
    [
        ({}, dict(temperature=1.0)),
        ({}, dict(temperature=2.0, ce_weight=0.3, kl_weight=3.0)),
        ({}, dict(ce_weight=0.0)),
        ({}, dict(kl_weight=0.0)),
        (dict(num_ignored=0), {}),
        (dict(logit_scale=3.0, logit_softcap=5.0, bias=True), {}),  # the order of the three matters
        (dict(teacher_size=5), {}),
        (dict(tied=True), {}),
        (dict(logit_scale=0.05), dict(temperature=0.02)),  # powers of flat probabilities are below what fp32 holds
        (dict(vocab=507), {}),  # a size that divides into nothing
    ],
    ids=str,
)
def test_every_option_is_the_naive_formula(sizes, options, impl):
    dtype, tolerance = (torch.float32, 1e-5) if impl == "triton" else (torch.float64, 1e-12)
    results = loss_and_gradients(ours, dtype, sizes, impl=impl, **options)
    assert max(errors(results, loss_and_gradients(naive, torch.float64, sizes, **options))) < tolerance


@on_each_implementation
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_every_dtype_is_as_exact_as_the_formula_in_it(dtype, tolerance, autocast, impl):
    """Error against fp64 at most twice that of the formula in the dtype of the product, plus a tolerance."""
    sizes = dict(bias=True, logit_softcap=10.0)
    exact = loss_and_gradients(naive, torch.float64, sizes)
    allowed = errors(loss_and_gradients(naive, dtype, sizes), exact)
    inputs_dtype = torch.float32 if autocast else dtype
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        results = loss_and_gradients(ours, inputs_dtype, sizes, impl=impl, memory_budget_mib=0.001)
    assert all(x.dtype == inputs_dtype for x in results[1:])
    assert (errors(results, exact)[0] > 1e-6) == (dtype != torch.float32)  # the product did run in it
    assert all(error <= 2 * most + tolerance for error, most in zip(errors(results, exact), allowed, strict=True))


@on_each_implementation
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_in_fp32_are_those_of_fp32_inputs(autocast, impl):
    """Only the results are rounded: the same inputs, which bf16 holds, give the gradients of an fp32 run."""
    sizes, options = dict(bias=True, logit_softcap=10.0), dict(impl=impl, memory_budget_mib=0.001)
    dtype = torch.float32 if autocast else torch.bfloat16

    def in_fp32(*inputs, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(*inputs, logits_dtype=torch.float32, **options)

    expected = loss_and_gradients(ours, torch.float32, sizes, **options)
    for result, truth in zip(loss_and_gradients(in_fp32, dtype, sizes, **options), expected, strict=True):
        torch.testing.assert_close(result, truth.to(result.dtype))


@pytest.mark.parametrize("kernel", [ce_kl_torch, ce_kl_triton], ids=lambda x: x.__name__.split(".")[-1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_gradient_of_another_dtype_is_the_one_in_place_rounded(softcap, kernel):
    """fp32 logits on a GPU, whose products take half precision."""
    torch.manual_seed(0)
    products, labels = torch.randn(2, 3, 50), torch.tensor([0, 7, 49])
    objective = ce_kl_torch.TileObjective(1.0, 0.3, 0.7, 0.5)

    def losses_and(grad):
        tiles = [ce_kl_torch.Tile(x.clone(), 2.0, softcap) for x in products]
        grad = tiles[0].products if grad is None else grad
        return kernel.ce_kl_tile_(*tiles, labels, objective, grad), grad

    losses, in_place = losses_and(None)
    same_losses, rounded = losses_and(torch.empty(3, 50, dtype=torch.bfloat16))
    assert torch.equal(losses, same_losses)
    torch.testing.assert_close(rounded.float(), in_place, rtol=2**-7, atol=0)  # Triton's interpreter cuts digits off


@on_each_implementation
def test_a_bias_of_minus_infinity_masks_a_token(impl):
    """As if the vocabulary did not have it: padding of a vocabulary is masked so."""

    def masked(student, student_head, teacher, teacher_head, labels, **options):
        mask = torch.zeros(VOCAB).index_fill(0, torch.tensor([VOCAB - 1]), -torch.inf)
        heads = [head._replace(bias=head.bias + mask) for head in (student_head, teacher_head)]
        return ours(student, heads[0], teacher, heads[1], labels, **options)

    def shorter(student, student_head, teacher, teacher_head, labels):
        heads = [head.map_tensors(lambda tensor: tensor[:-1]) for head in (student_head, teacher_head)]
        return naive(student, heads[0], teacher, heads[1], labels)

    results = loss_and_gradients(masked, torch.float32, dict(bias=True), impl=impl)
    assert max(errors(results, loss_and_gradients(shorter, torch.float32, dict(bias=True)))) < 1e-5


def test_hidden_states_and_head_of_two_dtypes():
    """As some state-space models have them without autocast: the product runs in the wider dtype."""
    (hidden, weight), (_, _, *teacher) = make_inputs(torch.float32)
    grads = torch.autograd.grad(ours(hidden, LMHead(weight.bfloat16()), *teacher), (hidden, weight))
    expected = torch.autograd.grad(ours(hidden, LMHead(weight), *teacher), (hidden, weight))
    assert torch.equal(grads[0], expected[0]) and torch.equal(grads[1], expected[1].bfloat16().float())


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_the_result_does_not_depend_on_chunks_and_blocks(tokens, monkeypatch):
    whole = loss_and_gradients(ours, torch.float64)
    budget = 2 * tokens * VOCAB * 8 / 2**20
    assert max(errors(loss_and_gradients(ours, torch.float64, memory_budget_mib=budget), whole)) < 1e-14
    monkeypatch.setitem(ce_kl_torch.BLOCK_ELEMENTS, "cpu", tokens * VOCAB)
    for name, value in (("NUM_WARPS", 1), ("WIDTH_BYTES", 4)):  # 32 columns at a time
        monkeypatch.setattr(ce_kl_triton, name, value)
    assert max(errors(loss_and_gradients(ours, torch.float64), whole)) < 1e-14
    assert max(errors(loss_and_gradients(ours, torch.float32, impl="triton"), whole)) < 1e-5


@on_each_implementation
def test_metrics_and_that_the_teacher_gets_no_gradient(impl):
    leaves, inputs = make_inputs(torch.float32)
    output = linear_ce_kl(*inputs, kl_weight=3.0, temperature=0.5, num_items_in_batch=torch.tensor(7), impl=impl)
    counted, labels = inputs[4] != -100, inputs[4][inputs[4] != -100]
    logits, teacher_logits = (x[counted] @ head.weight.T for x, head in (inputs[:2], inputs[2:4]))
    student, teacher = (torch.distributions.Categorical(logits=z / 0.5) for z in (logits, teacher_logits))
    expected = [
        torch.nn.functional.cross_entropy(logits, labels),
        torch.distributions.kl_divergence(teacher, student).mean(),  # at the temperature, without factors
        torch.distributions.Categorical(logits=logits).entropy().mean(),
        (logits.argmax(-1) == labels).float().mean(),
        counted.sum(),
    ]
    assert max(errors(output[1:], expected)) < 1e-5 and not any(x.requires_grad for x in output[1:])
    # The metrics are per token, whatever the denominator of the loss
    torch.testing.assert_close(6 * (output.ce_loss + 3.0 * 0.25 * output.kl_loss) / 7, output.loss.detach())
    output.loss.backward()
    assert inputs[2].grad is None and inputs[3].weight.grad is None and all(x.grad is not None for x in leaves)


@on_each_implementation
def test_of_equal_logits_the_first_token_is_the_most_likely(impl):
    head = LMHead(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    output = linear_ce_kl(torch.ones(3, 2), head, None, None, torch.tensor([1, 2, 3]), kl_weight=0, impl=impl)
    torch.testing.assert_close(output.top1_accuracy, torch.tensor(1 / 3))


@on_each_implementation
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_equal_models_have_no_kl_and_no_gradient(size, impl):
    hidden, head = (torch.randn(4, 12) * size).requires_grad_(), LMHead(torch.eye(12))
    loss = ours(hidden, head, hidden, head, torch.arange(4), ce_weight=0.0, impl=impl)
    assert max(errors([loss, *torch.autograd.grad(loss, hidden)], [0.0, 0.0])) < 1e-6


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_all_ignored_is_a_connected_zero(kl_weight):
    leaves, inputs = make_inputs(torch.float32, bias=True, num_ignored=NUM_TOKENS)
    output = linear_ce_kl(*inputs, kl_weight=kl_weight, num_items_in_batch=0)
    assert output.loss.requires_grad and torch.stack(output[:5]).detach().tolist() == [0.0] * 5
    output.loss.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


HIDDEN, HEAD, LABELS = torch.zeros(4, 3), LMHead(torch.zeros(6, 3)), torch.tensor([0, 5, -100, 2])


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        ({}, dict(impl="cuda"), "`impl` must be .* got 'cuda'"),
        ({}, dict(logits_dtype=torch.bfloat16), "`logits_dtype` must be None or torch.float32, got torch.bfloat16"),
        ({}, dict(kl_weight=math.nan), "`kl_weight` .* got 1.0, nan and 1.0"),
        ({}, dict(temperature=0.0), "`temperature` > 0, got 1.0, 1.0 and 0.0"),
        ({}, dict(memory_budget_mib=0), "`memory_budget_mib` must be finite and > 0, got 0"),
        ({}, dict(num_items_in_batch=math.nan), "`num_items_in_batch` .* got nan"),
        ({1: LMHead(torch.zeros(6, 3), torch.zeros(1))}, {}, r"`student_lm_head.bias` .*\(6,\), got \(1,\)"),
        ({3: LMHead(torch.zeros(6, 3), logit_softcap=0.0)}, {}, "`teacher_lm_head.logit_softcap` .* got 0.0"),
        ({4: LABELS.float()}, {}, "`shift_labels` must be integers, got torch.float32"),
        ({0: HIDDEN[None]}, {}, r"`student_hidden_states` must have shape .*Got \[\(\(1, 4, 3\)"),
        ({1: LMHead(torch.zeros(6, 3, device="meta"))}, {}, r"on one device.*'meta'"),  # offloaded
        ({1: LMHead(torch.zeros(0))}, {}, "`student_lm_head.weight`.*GatheredParameters"),
        ({2: None}, {}, "teacher's hidden states and head are needed, or `kl_weight=0`"),
        ({3: LMHead(torch.zeros(7, 3))}, {}, r"`teacher_lm_head.weight` .*\(6, hidden_size\).*\(\(7, 3\)"),
        ({4: LABELS + 1}, {}, r"`shift_labels` must be -100 or in \[0, 6\), got 6"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(inputs, options, message):
    arguments = [inputs.get(i, x) for i, x in enumerate([HIDDEN, HEAD, HIDDEN, HEAD, LABELS])]
    with pytest.raises(ValueError, match=message):
        linear_ce_kl(*arguments, **{"kl_weight": 1.0, **options})
