# SPDX-License-Identifier: Apache-2.0
"""linear_ce_kl is the formula of its docstring, in every precision, and keeps the laws of the KL divergence."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selfdistill import LMHead, linear_ce_kl
from trl_selfdistill.losses.objective import ce_kl_torch, ce_kl_triton


IMPLEMENTATIONS = ["torch", "triton", "reference"]
NUM_TOKENS, HIDDEN_SIZE = 10, 8


def naive_divergence(p, q, divergence):
    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    if divergence == "forward_kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p)
    mixture = divergence * p + (1 - divergence) * q
    return divergence * kl(p, mixture) + (1 - divergence) * kl(q, mixture)


def naive_loss(
    student_hidden, student_head, teacher_hidden, teacher_head, labels, items,
    *, ce_weight, kl_weight, temperature, divergence,
):  # fmt: skip
    """The loss as a textbook writes it: full logits, token by token, in the dtype of its inputs."""

    def logits(hidden, head):
        z = hidden @ head.weight.T if head.bias is None else hidden @ head.weight.T + head.bias
        z = z * head.logit_scale
        return z if head.logit_softcap is None else head.logit_softcap * (z / head.logit_softcap).tanh()

    z, t = logits(student_hidden, student_head), logits(teacher_hidden, teacher_head)
    loss = z.sum() * 0
    for i in (labels != -100).nonzero().flatten():
        ce = z[i].logsumexp(-1) - z[i, labels[i]]
        p, q = (t[i] / temperature).softmax(-1), (z[i] / temperature).softmax(-1)
        loss = loss + ce_weight * ce + kl_weight * temperature**2 * naive_divergence(p, q, divergence)
    return loss / items


class Case:
    """Random inputs in fp64, and the loss and the gradients that a function gives for them in any dtype."""

    def __init__(self, vocab=64, teacher_hidden_size=HIDDEN_SIZE, ignored="some", bias=False, tied=False, seed=0, **o):
        torch.manual_seed(seed)
        self.tied = tied
        self.head_options = {key: o.pop(key) for key in ("logit_scale", "logit_softcap") if key in o}
        self.weights = {**dict(ce_weight=1.0, kl_weight=1.0, temperature=0.5, divergence="forward_kl"), **o}
        self.labels = torch.randint(vocab, (NUM_TOKENS,))
        self.labels[{"none": slice(0), "some": slice(None, None, 3), "all": slice(None)}[ignored]] = -100
        self.student = [torch.randn(NUM_TOKENS, HIDDEN_SIZE), torch.randn(vocab, HIDDEN_SIZE)]
        self.teacher = [torch.randn(NUM_TOKENS, teacher_hidden_size), torch.randn(vocab, teacher_hidden_size)]
        if bias:
            self.student.append(torch.randn(vocab))
            self.teacher.append(torch.randn(vocab))
        # On the grid of bf16, so that what is compared is the arithmetic and not the rounding of the inputs
        self.student, self.teacher = ([x.bfloat16().double() for x in xs] for xs in (self.student, self.teacher))

    def inputs(self, dtype):
        student = [x.to(dtype, copy=True).requires_grad_() for x in self.student]
        teacher = [x.to(dtype) for x in self.teacher]
        head = LMHead(*student[1:], **self.head_options)
        # Tied: one tensor is the student's embedding (its hidden states here), its head and the teacher's head
        hidden = student[1][:NUM_TOKENS] * 1.0 if self.tied else student[0]
        teacher_head = head if self.tied else LMHead(*teacher[1:], **self.head_options)
        leaves = student[1:] if self.tied else student
        return leaves, (hidden, head, teacher[0], teacher_head, self.labels)

    def ours(self, dtype=torch.float64, **options):
        leaves, inputs = self.inputs(dtype)
        loss = linear_ce_kl(*inputs, **{**self.weights, **options}).loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def naive(self, dtype=torch.float64, items=None):
        leaves, (hidden, head, teacher_hidden, teacher_head, labels) = self.inputs(dtype)
        if teacher_head is head:
            teacher_head = head._replace(weight=head.weight.detach())
        items = max(1, int((labels != -100).sum())) if items is None else items
        loss = naive_loss(hidden, head, teacher_hidden, teacher_head, labels, items, **self.weights)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close(results, expected, **tolerance):
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [64, 507])  # a power of two, and a size that divides into nothing
@pytest.mark.parametrize(
    "options",
    [
        *(dict(ce_weight=ce, kl_weight=kl, temperature=t) for ce, kl, t in product((0, 1), (0, 1), (0.5, 1, 2))),
        *(dict(divergence=d, temperature=t) for d, t in product(("reverse_kl", 0.5, 0.1), (0.5, 1.5))),
        dict(ignored="none"),
        dict(ignored="all"),
        dict(bias=True),
        dict(logit_scale=0.25),
        dict(logit_softcap=2.0),
        dict(logit_scale=3.0, logit_softcap=5.0, bias=True),  # the order of the three matters
        dict(teacher_hidden_size=5),
        dict(tied=True),
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_as_exact_as_the_naive_formula(dtype, vocab, options, impl):
    """Error against fp64 at most twice that of the naive formula in the same dtype, plus a tolerance."""
    case = Case(vocab=vocab, **options)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    # The naive formula is all in its dtype, where fp16 has log(0) = -inf; the reference takes the softmax in fp32
    same_dtype = case.ours(dtype, impl="reference") if dtype == torch.float16 else case.naive(dtype)
    for exact, naive, ours in zip(case.naive(), same_dtype, case.ours(dtype, impl=impl), strict=True):
        assert ours.dtype == dtype or ours.dim() == 0
        assert (ours - exact).abs().max() <= 2 * (naive - exact).abs().max() + tolerance
    if impl != "triton":
        assert_close(case.ours(impl=impl), case.naive(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_num_items_in_batch_is_the_denominator(items):
    case = Case()
    assert_close(case.ours(num_items_in_batch=items), case.naive(items=7))
    output = linear_ce_kl(*case.inputs(torch.float64)[1], **case.weights, num_items_in_batch=items)
    assert output.num_tokens == 6  # the metrics are per token, whatever the denominator
    torch.testing.assert_close(6 * (output.ce_loss + 0.25 * output.kl_loss) / 7, output.loss.detach())


@pytest.mark.parametrize("kl_weight", [0, 1])
def test_all_ignored_is_a_connected_zero(kl_weight):
    case = Case(ignored="all", bias=True, kl_weight=kl_weight)
    leaves, inputs = case.inputs(torch.float32)
    output = linear_ce_kl(*inputs, **case.weights, num_items_in_batch=0)
    assert output.loss.requires_grad and torch.stack(output[:5]).detach().tolist() == [0.0] * 5
    output.loss.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_metrics():
    case = Case(vocab=12, kl_weight=3.0)
    _, inputs = case.inputs(torch.float32)
    output = linear_ce_kl(*inputs, **case.weights)
    counted = case.labels != -100
    logits = (inputs[0] @ inputs[1].weight.T)[counted]
    teacher_logits = (inputs[2] @ inputs[3].weight.T)[counted]
    student, teacher = (torch.distributions.Categorical(logits=z / 0.5) for z in (logits, teacher_logits))
    expected = {
        "ce_loss": torch.nn.functional.cross_entropy(logits, case.labels[counted]),
        "kl_loss": torch.distributions.kl_divergence(teacher, student).mean(),  # at the temperature, without factors
        "entropy": torch.distributions.Categorical(logits=logits).entropy().mean(),
        "top1_accuracy": (logits.argmax(-1) == case.labels[counted]).float().mean(),
        "num_tokens": counted.sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(output, name), value.detach(), msg=name)
        assert not getattr(output, name).requires_grad
    certain = torch.eye(12)[case.labels.clamp(min=0)] * 100  # sure of the label
    output = linear_ce_kl(certain, LMHead(torch.eye(12)), None, None, case.labels, kl_weight=0)
    assert output.top1_accuracy == 1 and output.entropy < 1e-9 and output.kl_loss == 0


seeds = st.integers(0, 2**31 - 1)
cases = st.builds(
    Case,
    seed=seeds,
    vocab=st.integers(10, 40),
    temperature=st.floats(0.25, 4),
    ce_weight=st.floats(0, 2),
    kl_weight=st.floats(0.01, 4),
    ignored=st.sampled_from(["none", "some"]),
    bias=st.booleans(),
    logit_softcap=st.sampled_from([None, 3.0]),
    logit_scale=st.sampled_from([0.5, 1.0]),
)
laws = settings(max_examples=20, deadline=None)


@laws
@given(case=cases)
def test_equal_models_have_no_kl_and_no_gradient(case):
    case.teacher = case.student
    case.weights["ce_weight"] = 0.0
    assert all(x.abs().max() < 1e-12 for x in case.ours())


@laws
@given(case=cases)
def test_kl_is_never_negative(case):
    assert linear_ce_kl(*case.inputs(torch.float64)[1], **case.weights).kl_loss > 0


def budget_of(num_tokens: int, vocab: int, dtype: torch.dtype) -> float:
    """MiB that hold the logits of so many tokens, of both models."""
    return 2 * num_tokens * vocab * dtype.itemsize / 2**20


@laws
@given(case=cases, chunk=st.integers(1, 2 * NUM_TOKENS))
def test_result_does_not_depend_on_the_chunk_size(case, chunk):
    def results(**options):
        inputs = case.inputs(torch.float64)[1]
        return case.ours(**options) + list(linear_ce_kl(*inputs, **case.weights, **options))

    budget = budget_of(chunk, case.student[1].size(0), torch.float64)
    assert_close(results(memory_budget_mib=budget), results())


@laws
@given(case=cases, rows=st.integers(1, 2 * NUM_TOKENS))
def test_result_does_not_depend_on_the_blocks_in_the_cache(case, rows):
    whole = case.ours(impl="torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ce_kl_torch.BLOCK_ELEMENTS, "cpu", rows * case.student[1].size(0))
        assert_close(case.ours(impl="torch"), whole)


@laws
@given(case=cases, block=st.sampled_from([16, 32, 64]))
def test_result_does_not_depend_on_the_blocks_of_the_triton_kernel(case, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ce_kl_triton, "BLOCK_SIZE", block)
        blocked = case.ours(torch.float32, impl="triton")
    assert_close(blocked, case.ours(torch.float32, impl="torch"), rtol=1e-4, atol=1e-5)


@laws
@given(case=cases)
def test_permuting_the_vocabulary_permutes_the_gradient(case):
    loss, hidden_grad, *head_grads = case.ours()
    order = torch.randperm(case.student[1].size(0))  # row i of the permuted head is row order[i]
    case.student[1:] = [x[order] for x in case.student[1:]]
    case.teacher[1:] = [x[order] for x in case.teacher[1:]]
    counted = case.labels != -100
    case.labels[counted] = order.argsort()[case.labels[counted]]
    assert_close(case.ours(), [loss, hidden_grad, *(grad[order] for grad in head_grads)])


@laws
@given(case=cases)
def test_the_gradient_is_that_of_the_docstring(case):
    """With an identity for a head, the gradient of the hidden states is that of the logits."""
    vocab = 16
    z, t = torch.randn(2, NUM_TOKENS, vocab, dtype=torch.float64)
    labels = torch.randint(vocab, (NUM_TOKENS,))
    head = LMHead(torch.eye(vocab, dtype=torch.float64))
    z.requires_grad_()
    (grad,) = torch.autograd.grad(linear_ce_kl(z, head, t, head, labels, **case.weights).loss, z)
    ce_weight, kl_weight, tau = case.weights["ce_weight"], case.weights["kl_weight"], case.weights["temperature"]
    expected = ce_weight * (z.softmax(-1) - torch.eye(vocab)[labels])
    expected += kl_weight * tau * ((z / tau).softmax(-1) - (t / tau).softmax(-1))
    torch.testing.assert_close(grad, (expected / NUM_TOKENS).detach())


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", 0.3])
def test_gradcheck_and_upstream_gradient(divergence, chunk):
    case = Case(vocab=11, bias=True, logit_softcap=4.0, divergence=divergence)
    budget = budget_of(chunk, 11, torch.float64)
    leaves, (*_, teacher_hidden, teacher_head, labels) = case.inputs(torch.float64)

    def loss(hidden, weight, bias):
        head = LMHead(weight, bias, logit_softcap=4.0)
        options = dict(memory_budget_mib=budget, **case.weights)
        return linear_ce_kl(hidden, head, teacher_hidden, teacher_head, labels, **options).loss

    assert torch.autograd.gradcheck(loss, leaves)
    scaled = torch.autograd.grad(-3.0 * loss(*leaves), leaves)
    assert_close(scaled, [-3.0 * grad for grad in torch.autograd.grad(loss(*leaves), leaves)])


def test_the_teacher_gets_no_gradient():
    case = Case(bias=True)
    _, (hidden, head, *_, labels) = case.inputs(torch.float32)
    teacher = [x.float().requires_grad_() for x in case.teacher]
    output = linear_ce_kl(hidden, head, teacher[0], LMHead(*teacher[1:]), labels, **case.weights)
    output.loss.backward()
    assert all(x.grad is None for x in teacher)


def test_without_kl_weight_the_teacher_is_not_needed():
    case = Case(kl_weight=0)
    _, (hidden, head, *_, labels) = case.inputs(torch.float64)
    loss = linear_ce_kl(hidden, head, None, None, labels, kl_weight=0).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ head.weight.T, labels))


def test_labels_of_another_type_and_another_ignore_index():
    case = Case(vocab=40)
    _, (*inputs, labels) = case.inputs(torch.float64)
    for other_labels, options in ((labels.int(), {}), (labels.where(labels != -100, 63), dict(ignore_index=63))):
        loss = linear_ce_kl(*inputs, other_labels, **case.weights, **options).loss
        torch.testing.assert_close(loss.detach(), case.naive()[0])


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_under_autocast(chunk, impl):
    """fp32 weights, products in bf16, softmax and loss in fp32."""
    case = Case(vocab=40)
    exact, bf16 = case.naive(), case.naive(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = case.ours(torch.float32, impl=impl, memory_budget_mib=budget_of(chunk, 40, torch.bfloat16))
    assert all(x.dtype == torch.float32 for x in ours)
    for truth, naive, result in zip(exact, bf16, ours, strict=True):
        assert (result - truth).abs().max() <= 2 * (naive - truth).abs().max() + 1e-2
    assert not torch.equal(ours[0], case.ours(torch.float32)[0])  # the product did run in bf16


HIDDEN, HEAD, LABELS = torch.zeros(4, 3), LMHead(torch.zeros(6, 3)), torch.tensor([0, 5, -100, 2])


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        ({}, dict(impl="cuda"), "`impl` must be .* got 'cuda'"),
        ({}, dict(divergence=1.5), r"`divergence` must be .*\(0, 1\).* got 1.5"),
        ({}, dict(divergence="jsd"), "`divergence` must be .* got 'jsd'"),
        ({}, dict(memory_budget_mib=0), "`memory_budget_mib` must be > 0.* got 0"),
        ({}, dict(num_items_in_batch=torch.ones(2)), r"`num_items_in_batch` must be one number, got shape \(2,\)"),
        ({1: LMHead(torch.zeros(6))}, {}, r"`student_lm_head.weight` must have shape .* got \(6,\)"),
        ({1: LMHead(torch.zeros(6, 3), torch.zeros(3))}, {}, r"`student_lm_head.bias` must have shape \(6,\)"),
        ({0: HIDDEN.bfloat16()}, {}, "`student_lm_head.weight` has dtype torch.float32.*bfloat16.* Cast one"),
        ({0: HIDDEN.int()}, {}, "`student_hidden_states` must hold floating-point numbers, got torch.int32"),
        ({2: HIDDEN.to("meta")}, {}, "`teacher_hidden_states` is on meta, `student_hidden_states` on cpu"),
        (
            {2: torch.tensor([[0.0] * 3, [0, 0, math.nan], [0] * 3, [math.inf] * 3])},
            dict(check_finite=True),
            r"`teacher_hidden_states` must be finite, got nan at token 1, dimension 2 \(2 of 4 tokens",
        ),
        ({}, dict(ce_weight=-1.0), "`ce_weight` .* got -1.0"),
        ({}, dict(kl_weight=math.nan), "`kl_weight` .* got nan"),
        ({}, dict(kl_weight=math.inf), "`kl_weight` .* got inf"),
        ({}, dict(temperature=0.0), "`temperature` .* got 0.0"),
        ({0: HIDDEN[None]}, {}, r"`student_hidden_states` must have shape \(4, 3\).* Got \(1, 4, 3\)"),
        ({0: HIDDEN[:, :2]}, {}, r"`student_hidden_states` .* Got \(4, 2\)"),
        ({2: None}, {}, "`teacher_hidden_states` and `teacher_lm_head` are needed .* `kl_weight=0`"),
        ({3: None}, {}, "`teacher_hidden_states` and `teacher_lm_head` are needed"),
        ({2: HIDDEN[:3]}, {}, r"`teacher_hidden_states` must have shape \(4, 3\).* Got \(3, 3\)"),
        ({2: HIDDEN[:, :2]}, {}, r"`teacher_hidden_states` must have shape \(4, 3\).* Got \(4, 2\)"),
        ({3: LMHead(torch.zeros(7, 3))}, {}, "`teacher_lm_head` has a vocabulary of 7 .* resize"),
        ({4: LABELS[:3]}, {}, r"`student_hidden_states` must have shape \(3, 3\): one row a label.* Got \(4, 3\)"),
        ({4: LABELS[None]}, {}, r"`shift_labels` must have shape \(num_tokens,\), got \(1, 4\)"),
        ({4: LABELS.float()}, {}, "`shift_labels` must hold integers .* got torch.float32"),
        ({4: LABELS + 1}, {}, r"`shift_labels` must be -100 or in \[0, 6\).* got 6 at position 1"),
        ({4: LABELS - 1}, {}, r"`shift_labels` .* got -1 at position 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(inputs, options, message):
    arguments = [inputs.get(i, x) for i, x in enumerate([HIDDEN, HEAD, HIDDEN, HEAD, LABELS])]
    with pytest.raises(ValueError, match=message):
        linear_ce_kl(*arguments, **{"kl_weight": 1.0, **options})
