# SPDX-License-Identifier: Apache-2.0
"""
Times `linear_ce_kl` against its peers, forward and backward, side by side, and checks all against fp64 before.

    python scripts/benchmark_linear_ce_kl.py --shapes smollm2 --num_tokens 1024 --dtype float32

The limit is the time of the four matrix products that no implementation can do without, measured in the same rounds.
Peak memory is what a step adds to the inputs: the allocator's on CUDA, the resident set's of a process of its own on a
CPU. Needs `pip install -e ".[benchmark]"`; on a GPU the same command times the Triton kernel. An implementation that
fails, for want of memory mostly, is left out of the rounds, and its row names the error.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from trl_selfdistill import LMHead, linear_ce_kl
from trl_selfdistill.studies.figures import page_figure


# Hidden size and vocabulary
SHAPES = {
    "smollm2": (576, 49152),
    "qwen2.5-1.5b": (1536, 151936),
    "llama-3.1-8b": (4096, 128256),
    "gemma-3-1b": (1152, 262144),
}
KL_WEIGHT, TEMPERATURE = 1.0, 0.5


def ours(hidden, weight, teacher_hidden, teacher_weight, labels, **options):
    inputs = (hidden, LMHead(weight), teacher_hidden, LMHead(teacher_weight), labels)
    return linear_ce_kl(*inputs, kl_weight=KL_WEIGHT, temperature=TEMPERATURE, **options).loss


def trl_pair(hidden, weight, teacher_hidden, teacher_weight, labels):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    metrics = ("log_probs", "entropy", "is_top1")
    log_probs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, metrics)
    sides = (hidden, weight, None, teacher_hidden, teacher_weight, None)
    divergence, _ = ChunkedDivergenceFunction.apply(*sides, 0.0, TEMPERATURE)
    return (-log_probs + KL_WEIGHT * TEMPERATURE**2 * divergence).mean()


def liger(hidden, weight, teacher_hidden, teacher_weight, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    soft = KL_WEIGHT * TEMPERATURE**2
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=soft, beta=0.0, temperature=TEMPERATURE)
    return loss(hidden, weight, teacher_hidden, teacher_weight, labels)


def orda(hidden, weight, teacher_hidden, teacher_weight, labels):
    from orda_kernel import SeparateTeacher, distillation_loss

    teacher = SeparateTeacher(teacher_hidden, teacher_weight)
    options = dict(kl_weight=KL_WEIGHT, kl_temperature=TEMPERATURE)
    return distillation_loss(hidden, weight, labels, teacher, **options).loss


def eager(hidden, weight, teacher_hidden, teacher_weight, labels):
    """The formula of the docstring of [`linear_ce_kl`], with all logits in memory."""
    logits, teacher_logits = (hidden @ weight.T).float(), (teacher_hidden @ teacher_weight.T).float()
    log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (logits, teacher_logits))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    return F.cross_entropy(logits, labels) + KL_WEIGHT * TEMPERATURE**2 * kl


@torch.compile(dynamic=False)
def torchtune_formula(hidden, weight, teacher_hidden, teacher_weight, labels):
    """`ForwardKLLoss` of torchtune (softmax in fp32 of whole logits, the teacher's entropy added), plus CE."""
    logits = hidden @ weight.T
    teacher_probs = F.softmax((teacher_hidden @ teacher_weight.T) / TEMPERATURE, dim=-1, dtype=torch.float32)
    cross = (teacher_probs * F.log_softmax(logits / TEMPERATURE, dim=-1, dtype=torch.float32)).sum(-1)
    kl = torch.special.entr(teacher_probs).sum(-1).neg() - cross
    return F.cross_entropy(logits.float(), labels) + KL_WEIGHT * TEMPERATURE**2 * kl.mean()


IMPLEMENTATIONS = {
    "linear_ce_kl": ours,
    "linear_ce_kl, 192 MiB": partial(ours, memory_budget_mib=192),
    "linear_ce_kl, fp32 logits": partial(ours, logits_dtype=torch.float32),
    "reference (eager)": eager,
    "TRL's pair": trl_pair,
    "Liger": liger,
    "orda-kernel": orda,
    "torchtune's formula": torchtune_formula,
}


def make_inputs(shape: str, num_tokens: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Hidden states and heads of a student and of a teacher close to it, with logits of the size of a real model's."""
    hidden_size, vocab_size = SHAPES[shape]
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, device=device)
    weight = torch.randn(vocab_size, hidden_size, device=device) * 3 / hidden_size**0.5
    teacher_hidden = (hidden + 0.1 * torch.randn_like(hidden)).detach()
    labels = torch.randint(vocab_size, (num_tokens,), device=device)
    student = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    return [*student, teacher_hidden.to(dtype), weight.detach().to(dtype, copy=True), labels]


def step(function, inputs) -> None:
    torch.autograd.grad(function(*inputs), inputs[:2])


def four_products(inputs, outputs) -> None:
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in inputs[:4])
    logits, grad_hidden, grad_weight = outputs
    torch.mm(hidden, weight.T, out=logits)
    torch.mm(teacher_hidden, teacher_weight.T, out=logits)
    torch.mm(logits, weight, out=grad_hidden)
    torch.mm(logits.T, hidden, out=grad_weight)


def seconds(function, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def errors(args, dtype) -> dict[str, float]:
    """
    Of each implementation's gradients: the largest difference from fp64, as a share of the largest gradient. At the
    smallest shape: a large head in fp64, with its gradients, does not fit where the benchmark itself does.
    """
    inputs = make_inputs("smollm2", 64, dtype, args.device)
    exact = [x.detach().double().requires_grad_(i < 2) if i < 4 else x for i, x in enumerate(inputs)]
    expected = torch.autograd.grad(ours(*exact), exact[:2])  # fp64, in PyTorch
    result = {}
    for name in args.implementations:
        try:
            grads = torch.autograd.grad(IMPLEMENTATIONS[name](*inputs), inputs[:2])
        except Exception:  # of a peer: the others are measured all the same
            traceback.print_exc()
            result[name] = math.nan
            continue
        pairs = zip(grads, expected, strict=True)
        result[name] = max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs)
    return result


def peak_mib(name: str, inputs, args, shape: str, num_tokens: int) -> float:
    """What one step adds to the inputs at its peak, after a first step."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(IMPLEMENTATIONS[name], inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--peak_memory_of", name, "--shapes", shape, "--dtype", args.dtype]
    command += ["--num_tokens", str(num_tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak_of_this_process(args, dtype) -> None:
    """Prints the growth of the resident set by a step; a step of few tokens before loads what stays."""
    import resource

    step(IMPLEMENTATIONS[args.peak_memory_of], make_inputs("smollm2", 8, dtype, "cpu"))
    inputs = make_inputs(args.shapes[0], args.num_tokens[0], dtype, "cpu")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step(IMPLEMENTATIONS[args.peak_memory_of], inputs)
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024 - resident / 2**20)


def measure(shape: str, num_tokens: int, args, dtype, error: dict[str, float]) -> dict:
    """
    Times the limit and each implementation in rounds that run all of them one after the other.

    Returns:
        `dict`: The shape, the seconds of the limit, and for each implementation its seconds, peak memory in MiB and
        error; no seconds, and the name of the failure, for one that failed.
    """
    inputs = make_inputs(shape, num_tokens, dtype, args.device)
    hidden, weight = (x.detach() for x in inputs[:2])
    outputs = (hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden), torch.empty_like(weight))
    runs, peaks, failures = {"limit": partial(four_products, inputs, outputs)}, {}, {}
    runs["limit"]()
    for name in args.implementations:
        run = partial(step, IMPLEMENTATIONS[name], inputs)
        try:
            run()  # compiles, and loads libraries
            peaks[name], runs[name] = peak_mib(name, inputs, args, shape, num_tokens), run
        except Exception as failure:
            traceback.print_exc()
            failures[name] = type(failure).__name__
        if args.device == "cuda":
            torch.cuda.empty_cache()
    times = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, args.device))
    measured = {}
    for name in args.implementations:
        measured[name] = {"seconds": times.get(name, []), "peak_mib": peaks.get(name), "error": error[name]}
        measured[name]["failure"] = failures.get(name)
    return {"shape": shape, "num_tokens": num_tokens, "limit": times["limit"], "implementations": measured}


def report(result: dict, args) -> str:
    limit = statistics.median(result["limit"])
    hidden_size, vocab_size = SHAPES[result["shape"]]
    rate = 8 * result["num_tokens"] * hidden_size * vocab_size / limit / 1e12
    lines = [
        f"{result['shape']} (hidden {hidden_size}, vocabulary {vocab_size}), {result['num_tokens']} tokens, "
        f"{args.dtype}, {machine(args.device)}: four products {limit * 1e3:.1f} ms ({rate:.2f} TFLOP/s)",
        "",
        "| implementation | ms, median [min, max] | share of the limit | peak memory, MiB | error of the gradients |",
        "|---|---|---|---|---|",
    ]
    for name, measured in result["implementations"].items():
        cells = [measured["failure"], "-", "-"]
        if times := measured["seconds"]:
            median, low, high = (x * 1e3 for x in (statistics.median(times), min(times), max(times)))
            spread = f"{median:.1f} [{low:.1f}, {high:.1f}]"
            cells = [spread, f"{limit * 1e3 / median:.2f}", f"{measured['peak_mib']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {measured['error']:.1e} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, python {platform.python_version()}"


def plot(results: list[dict], args) -> None:
    names = args.implementations[::-1]
    colors = ["C1" if name.startswith("linear_ce_kl") else "0.6" for name in names]
    with page_figure(f"{args.output}.png", (0.2 * len(names) + 0.4) * len(results) + 0.4) as figure:
        axes = figure.subplots(len(results), 2, sharey=True, sharex="col", squeeze=False)
        for (left, right), result in zip(axes, results, strict=True):
            limit, measured = statistics.median(result["limit"]), [result["implementations"][name] for name in names]
            shares = [limit / statistics.median(x["seconds"]) if x["seconds"] else 0.0 for x in measured]
            left.barh(names, shares, color=colors)
            left.axvline(1.0, color="black", linestyle=":", linewidth=1, marker="")
            left.set(title=f"{result['shape']}, {result['num_tokens']:,} tokens, {args.dtype}", xlim=(0, 1.05))
            right.scatter([x["peak_mib"] or math.nan for x in measured], names, color=colors)
            right.grid(axis="y", alpha=0.3)
        axes[-1][0].set(xlabel="share of the four-product limit (dotted)")
        axes[-1][1].set(xlabel="peak memory of a step, MiB", xscale="log")
        axes[-1][1].xaxis.set_major_formatter("{x:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2"])
    parser.add_argument("--num_tokens", nargs="+", type=int, default=[1024], help="label tokens of a step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each of which runs every implementation")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json, OUTPUT.md and OUTPUT.png")
    parser.add_argument("--peak_memory_of", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.peak_memory_of:
        return print_peak_of_this_process(args, dtype)
    error, results = errors(args, dtype), []
    for num_tokens in args.num_tokens:
        for shape in args.shapes:
            results.append(measure(shape, num_tokens, args, dtype, error))
            print(report(results[-1], args), end="\n\n", flush=True)
            if args.output:  # each time: what is there stays if the next one does not end
                text = "\n\n".join(report(result, args) for result in results)
                for suffix, content in ((".md", text + "\n"), (".json", json.dumps(results))):
                    Path(f"{args.output}{suffix}").write_text(content, encoding="utf-8")
                plot(results, args)


if __name__ == "__main__":
    main()
