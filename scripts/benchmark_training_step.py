# SPDX-License-Identifier: Apache-2.0
"""
Times steps of our trainers against `SFTTrainer` on the same batches, in short runs by turns: `SelfDistillSFTTrainer`
with a teacher in memory and with its answers on disk, and `FrozenGroupsSFTTrainer` with attention alone.

    python scripts/benchmark_training_step.py --model_name_or_path outputs/quickstart/model

    python scripts/benchmark_training_step.py --shape llama-3.2-1b --workload long_documents

A step of SFT is one forward and two forwards' worth of backward; a teacher in memory adds one forward, so 4/3 is the
limit of its ratio without the optimizer. Answers on disk add the product of the head and nothing else. With
`--anchors` each step takes a text of as many tokens beside each row. `--shape` takes a random model.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_selfdistill import (
    FrozenGroupsSFTConfig,
    FrozenGroupsSFTTrainer,
    SelfDistillSFTConfig,
    SelfDistillSFTTrainer,
)
from trl_selfdistill.studies.small_llama import train_tokenizer
from trl_selfdistill.trainers.sft_internals import label_positions_only


# Rows of a batch, tokens of a row, and how many of them at its end are labels
WORKLOADS = {
    "questions": (8, 20, 4),
    "documents": (2, 256, 255),
    "long_documents": (8, 1024, 1023),
    "many_documents": (32, 1024, 1023),
}
_SIZE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "smollm2-135m": dict(zip(_SIZE, (576, 1536, 30, 9, 3), strict=True), vocab_size=49152),
    "llama-3.2-1b": dict(zip(_SIZE, (2048, 8192, 16, 32, 8), strict=True), vocab_size=128256),
    "tiny": dict(zip(_SIZE, (32, 64, 2, 2, 1), strict=True), vocab_size=512),
}
WARMUP_STEPS = 3


class StepTimes(TrainerCallback):
    """Seconds of each step by a clock: forward and backward, and the whole step."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.forward_backward, self.whole = clock, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.clock()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        synchronize()
        self.forward_backward.append(self.clock() - self.start)

    def on_optimizer_step(self, args, state, control, **kwargs):
        synchronize()
        self.whole.append(self.clock() - self.start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_dataset(workload: str, num_batches: int, vocab_size: int) -> Dataset:
    rows, length, num_labels = WORKLOADS[workload]
    torch.manual_seed(0)
    input_ids = torch.randint(10, vocab_size, (rows * num_batches, length)).tolist()
    mask = [0] * (length - num_labels) + [1] * num_labels
    return Dataset.from_dict({"input_ids": input_ids, "completion_mask": [mask] * len(input_ids)})


def make_model(args):
    """The model in fp32 and its tokenizer."""
    if not args.shape:
        path = args.model_name_or_path
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a large one takes a minute on a CPU
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape], tie_word_embeddings=True))
    return model, train_tokenizer([" the"] * 10, 300)


def run(trainer_class, config_class, args, folder: str, **options) -> dict[str, list[float]]:
    """One short training, from the same weights on the same batches each time: seconds, and MiB at the peak."""
    model, tokenizer = make_model(args)
    config = config_class(
        folder, max_steps=args.steps + WARMUP_STEPS, per_device_train_batch_size=WORKLOADS[args.workload][0],
        bf16=args.bf16, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, completion_only_loss=True, **options,
    )  # fmt: skip
    dataset = make_dataset(args.workload, args.steps + WARMUP_STEPS, model.config.vocab_size)
    times = StepTimes(time.process_time if args.processor_time else time.perf_counter)
    arguments = dict(train_dataset=dataset, processing_class=tokenizer, callbacks=[times])
    if "anchors" in options:
        length = WORKLOADS[args.workload][1]
        text = tokenizer.decode(tokenizer(" the" * length)["input_ids"][:length])
        arguments["anchor_dataset"] = Dataset.from_dict({"text": [text] * 100})
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer_class(model, config, **arguments).train()
    measured = {"forward + backward": times.forward_backward[WARMUP_STEPS:], "whole step": times.whole[WARMUP_STEPS:]}
    if torch.cuda.is_available():
        measured["peak memory"] = [torch.cuda.max_memory_allocated() / 2**20]
    return measured


def report(measured: dict[str, dict[str, list[float]]], args) -> str:
    rows, length, num_labels = WORKLOADS[args.workload]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    unit = "ms of processor time" if args.processor_time else "ms"
    lines = [
        f"{args.shape or args.model_name_or_path}, {args.workload}: {rows} x {length} tokens, {num_labels} labels; "
        f"bf16 {args.bf16}; torch {torch.__version__}, {device}; {unit}, median [quartiles]; memory in MiB",
        "",
        f"| part | {' | '.join(measured)} | ratios to SFTTrainer |\n{'|---' * (len(measured) + 2)}|",
    ]
    for part in measured["SFTTrainer"]:
        medians, cells = {}, []
        for name, parts in measured.items():
            median = medians[name] = statistics.median(parts[part])
            if part == "peak memory":
                cells.append(f"{median:.0f}")
                continue
            low, _, high = statistics.quantiles(parts[part], n=4)
            cells.append(f"{median * 1e3:.0f} [{low * 1e3:.0f}, {high * 1e3:.0f}]")
        ratios = ", ".join(f"{median / medians['SFTTrainer']:.2f}" for median in list(medians.values())[1:])
        lines.append(f"| {part} | {' | '.join(cells)} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_name_or_path")
    model.add_argument("--shape", choices=SHAPES, help="a random model of this shape")
    parser.add_argument("--workload", choices=WORKLOADS, default="questions")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bf16")
    parser.add_argument("--anchors", action="store_true", help="time `anchors='kl'` instead of the teacher alone")
    parser.add_argument("--processor_time", action="store_true", help="of a CPU that others use, too")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each trainer, in turns")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    if args.steps * args.rounds < 2:
        parser.error(f"--steps {args.steps} --rounds {args.rounds}: quartiles need at least two steps.")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    variants = {"SFTTrainer": (SFTTrainer, SFTConfig, {})}
    if not torch.cuda.is_available():
        variants["SFTTrainer, label positions"] = (SFTTrainer, SFTConfig, {})  # as it is on a GPU anyway
    ours = {"SelfDistillSFTTrainer": {}, "precompute_teacher": dict(precompute_teacher=True)}
    if args.anchors:
        weights = {"anchors": dict(anchors="kl", kl_weight=0.0), "anchors, λ = 0.3": dict(anchors="kl", kl_weight=0.3)}
        ours = weights | {f"{name}, cache": options | ours["precompute_teacher"] for name, options in weights.items()}
    variants |= {name: (SelfDistillSFTTrainer, SelfDistillSFTConfig, options) for name, options in ours.items()}
    if not args.anchors:
        frozen = dict(trainable_groups=["attention"], verify_frozen=False)  # which hashes before and after the steps
        variants["FrozenGroupsSFTTrainer"] = (FrozenGroupsSFTTrainer, FrozenGroupsSFTConfig, frozen)
    measured = {name: {} for name in variants}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        for _ in range(args.rounds):
            for name, (trainer_class, config_class, options) in variants.items():
                where = dict(teacher_cache_dir=cache) if "precompute_teacher" in options else {}
                with label_positions_only() if name.endswith("label positions") else nullcontext():
                    parts = run(trainer_class, config_class, args, folder, **options, **where)
                for part, values in parts.items():
                    measured[name].setdefault(part, []).extend(values)
    text = report(measured, args)
    print(text)
    if args.output:
        Path(f"{args.output}.md").write_text(text + "\n", encoding="utf-8")
        Path(f"{args.output}.json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
