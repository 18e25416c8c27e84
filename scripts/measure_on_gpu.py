# SPDX-License-Identifier: Apache-2.0
"""
Checks and times what only a GPU can show, in one call of less than nine minutes and without a network.

    python scripts/measure_on_gpu.py --output_dir outputs/gpu

    python scripts/measure_on_gpu.py --output_dir outputs/gpu --parts study  # what the first call has no time for

The checks run side by side, then what is timed, one after the other in the order of its worth. Each part has processes
and a time of its own: one that fails or is cut off does not stop the rest. Each leaves its output, and what it
measured, in --output_dir; a table of all of them comes last. The exit status is 1 if a part failed or an aim was
missed. `--small` runs all parts in small, also without a GPU.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch


ROOT = Path(__file__).parents[1]
OURS, LEAN, TRL = "linear_ce_kl", "linear_ce_kl, 192 MiB", "TRL's pair"
PROCESSES: list[subprocess.Popen] = []  # of the parts, as far as they were started
STOPPED = Event()  # no further one may start
SHAPES = ("llama-3.1-8b", "smollm2", "qwen2.5-1.5b", "gemma-3-1b")


class Part(NamedTuple):
    """One thing to show."""

    name: str
    seconds: int  # that it may take
    commands: list[list[str]]  # of Python, one after the other
    # Rows of the table, from its log: what was measured, and whether it is good, or None where that is open
    findings: Callable[[Path], list[tuple]]


def checks(folder: Path) -> list[Part]:
    """What is right or wrong, and takes no time of the GPU to speak of."""
    tests = ["-m", "pytest", "-p", "no:cacheprovider"]
    distributed = ["scripts/check_distributed.py", "--output_dir", str(folder / "distributed")]
    commands = [[*distributed, "--write_reference"]]
    processes = str(min(8, torch.cuda.device_count()) if torch.cuda.is_available() else 1)
    for config in ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3") if torch.cuda.is_available() else ("cpu",):
        file = f"scripts/accelerate_configs/{config}.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", processes]
        commands.append(launch + distributed)
    return [
        Part("kernels", 120, [[*tests, "tests/gpu/test_linear_ce_kl_on_cuda.py"]], last_line),
        Part("trainers", 150, [[*tests, "tests/gpu/test_trainers_on_cuda.py"]], last_line),
        Part("distributed", 200, commands, check_findings),
    ]


def timings(folder: Path, small: bool) -> list[Part]:
    """What is timed, the most worth first."""
    head = ["scripts/benchmark_linear_ce_kl.py", "--dtype", "float32" if small else "bfloat16"]
    step = ["scripts/benchmark_training_step.py"]
    tokens, shapes, repeats = (8192, 32768), SHAPES, "10"
    # Of eight rows, the small model takes as long as its Python, whose times scatter
    steps = [("llama-3.2-1b", "long_documents", "2"), ("smollm2-135m", "many_documents", "2")]
    steps += [("smollm2-135m", "long_documents", "4")]
    options = ["--steps", "8"]
    if small:
        tokens, shapes, repeats = (32, 64), ("smollm2",), "1"
        steps, options = [("tiny", "questions", "2")], ["--steps", "2", "--no-bf16"]
    heads, timed = [], []
    for number in tokens:
        command = [*head, "--num_tokens", str(number), "--repeats", repeats, "--shapes", *shapes]
        command += ["--output", str(folder / f"head-{number}")]
        heads.append(Part(f"head-{number}", 150, [command], head_findings))
    for model, workload, rounds in steps:
        name = f"step-{model}-{workload}"
        command = [*step, "--output", str(folder / name), "--shape", model, "--workload", workload, "--rounds", rounds]
        timed.append(Part(name, 150, [command + options], step_findings))
    config = f"scripts/configs/compare_{'tiny' if small else 'small_llama'}.yaml"
    compare = ["scripts/compare_methods.py", "--config", config, "--output_dir", str(folder / "study")]
    compare += ["--variants", "sft", "selfdistill", "--settings", "0.3/1"]
    return [heads[0], *timed[:2], heads[1], *timed[2:], Part("study", 420, [compare], study_findings)]


def last_line(log: Path) -> list[tuple]:
    """What pytest counted, else the last line; tests that were all skipped tell nothing."""
    text = log.read_text(encoding="utf-8")
    counts = re.findall(r"^.*\d (?:passed|failed|skipped|errors?)\b.* in [\d.]+s.*$", text, re.MULTILINE)
    lines = (counts or text.splitlines())[-1:]  # a library may complain after the tests
    return [(line, None if "skipped" in line and "passed" not in line else True) for line in lines]


def check_findings(log: Path) -> list[tuple]:
    """How many of the checks passed, and those that did not."""
    lines = log.read_text(encoding="utf-8").splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    passed = sum(line.startswith("passed") for line in lines)
    return [(f"{passed} checks passed", passed > 0), *((line, False) for line in failed)]


def head_findings(log: Path) -> list[tuple]:
    """Our head, as it is and in small chunks, beside the limit and its peers. The aims are those of Llama's shape."""
    rows = []
    for result in json.loads(log.with_suffix(".json").read_text(encoding="utf-8")):
        measured = {name: x for name, x in result["implementations"].items() if x["seconds"]}
        times = {name: statistics.median(x["seconds"]) for name, x in measured.items()}
        memory = {name: x["peak_mib"] for name, x in measured.items()}
        peers = [name for name in measured if not name.startswith(OURS)]
        fastest, leanest = (min(peers, key=of.get) for of in (times, memory))
        has_aims = result["shape"].startswith("llama")
        for name in (OURS, LEAN):
            share = statistics.median(result["limit"]) / times[name]
            ratios = {peer: times[name] / times[peer] for peer in (TRL, fastest) if peer in times}
            what = f"{result['shape']}, {name}: {times[name] * 1e3:.1f} ms, {share:.2f} of the limit"
            what += "".join(f", {ratio:.2f} of {peer}" for peer, ratio in ratios.items())
            what += f"; {memory[name]:.0f} MiB, {memory[name] / memory[leanest]:.2f} of {leanest}"
            good = memory[name] <= memory[leanest] or not has_aims
            if name == OURS:
                good = ratios[fastest] < 1 and (share >= 0.8 and ratios.get(TRL, 0) <= 0.45 or not has_aims)
            rows.append((what, good))
    return rows


def step_findings(log: Path) -> list[tuple]:
    """Ratios to `SFTTrainer` of a whole step and of the memory."""
    measured = json.loads(log.with_suffix(".json").read_text(encoding="utf-8"))
    aims = {"SelfDistillSFTTrainer": 1.4, "precompute_teacher": 1.1, "FrozenGroupsSFTTrainer": 0.85}
    rows = []
    for name, aim in aims.items():
        ratios = {
            part: statistics.median(values) / statistics.median(measured["SFTTrainer"][part])
            for part, values in measured[name].items()
        }
        what = ", ".join(f"{part} {ratio:.2f}" for part, ratio in ratios.items())
        rows.append((f"{name}: {what} of SFTTrainer's (aim {aim})", ratios["whole step"] <= aim))
    return rows


def study_findings(log: Path) -> list[tuple]:
    """What a study found out; when it was cut off, which of its stages and runs had ended."""
    report = log.with_name("study") / "methods.json"
    if not report.is_file():
        return [(line, None) for line in log.read_text(encoding="utf-8").splitlines() if "done in" in line]
    _, sft, *_, ours = json.loads(report.read_text(encoding="utf-8"))
    kept, learnt = ([x[what]["value"] for x in (sft, ours)] for what in ("stability", "plasticity"))
    found = zip(("SFT", "self-distillation"), kept, learnt, strict=True)
    return [("; ".join(f"{name} keeps {old:.3f} and learns {new:.3f}" for name, old, new in found), kept[1] > kept[0])]


def kill(*processes: subprocess.Popen) -> None:
    """Ends processes and all that they have started. A launcher ends those that it gave sessions of their own."""
    end = time.monotonic() + 10
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0, end - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def stop(signum: int, _) -> None:
    """On Ctrl-C, or ended from outside: the parts have sessions of their own, and nobody else would end them."""
    STOPPED.set()
    kill(*PROCESSES)
    os._exit(128 + signum)


def run(part: Part, folder: Path, end: float) -> list[tuple]:
    """Runs a part, until `end` of `time.monotonic` at most; its rows of the table."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if torch.cuda.is_available():
        environment |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    # Of an earlier call, whose numbers would be taken for this one's
    (folder / f"{part.name}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / part.name, ignore_errors=True)
    start, status = time.monotonic(), "ended"
    end = min(end, start + part.seconds)
    log = folder / f"{part.name}.log"
    with open(log, "w", encoding="utf-8") as output:
        for command in part.commands:
            if STOPPED.is_set():
                break
            options = dict(cwd=ROOT, env=environment, stdout=output, stderr=output)
            # A session of its own: a launcher that is killed leaves its processes to the GPU
            process = subprocess.Popen([sys.executable, *command], start_new_session=True, **options)
            PROCESSES.append(process)
            try:
                if returncode := process.wait(timeout=max(0, end - time.monotonic())):
                    status = f"FAILED, exit status {returncode}"
            except subprocess.TimeoutExpired:
                status = "cut off" if status == "ended" else f"{status}, then cut off"
                break
            finally:
                kill(process)
                process.wait()
    try:
        rows = part.findings(log) or [("no output", False)]
    except (OSError, KeyError, ValueError) as error:  # it ended before its first number
        rows = [(f"nothing was measured ({type(error).__name__})", False)]
    seconds = f"{time.monotonic() - start:.0f}"
    print(f"{part.name}: {status} after {seconds} s", flush=True)
    verdict = {None: "-", True: "yes" if status == "ended" else "NO", False: "NO"}
    return [(part.name, status, seconds, what, verdict[good]) for what, good in rows]


def main() -> int:
    """Runs the parts and prints the table; 1 if a part failed or an aim was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"), help="where logs and numbers go")
    parser.add_argument("--seconds", type=float, default=520, help="for all parts together")
    parser.add_argument("--parts", nargs="+", help="names of those to run, all by default")
    parser.add_argument("--small", action="store_true", help="in small, to try it on a CPU")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.error("no GPU was found. `--small` tries the parts on a CPU.")
    folder = args.output_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    end, table = time.monotonic() + args.seconds, []
    parts = checks(folder), timings(folder, args.small)
    names = [part.name for part in (*parts[0], *parts[1])]
    if unknown := {*(args.parts or names)} - {*names}:
        parser.error(f"--parts may be {', '.join(names)}, got {', '.join(unknown)}.")
    side_by_side, in_turn = ([part for part in kind if part.name in (args.parts or names)] for kind in parts)
    with ThreadPoolExecutor() as pool:
        for rows in pool.map(lambda part: run(part, folder, end), side_by_side):
            table += rows
    for part in in_turn:
        table += run(part, folder, end)
    lines = [
        "| part | status | s | measured | good |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(x)} |" for x in table),
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = "\n".join([f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", "", *lines])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(row[-1] == "NO" or row[1].startswith("FAILED") for row in table))


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    sys.exit(main())
