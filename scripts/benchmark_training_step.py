# SPDX-License-Identifier: Apache-2.0
"""
Times steps of `SelfDistillSFTTrainer`, with a teacher in memory and with its answers on disk, against `SFTTrainer` on
the same batches, in alternating short runs.

    python scripts/benchmark_training_step.py --model_name_or_path outputs/quickstart/model

A step of SFT is one forward and two forwards' worth of backward; a teacher in memory adds one forward, so 4/3 is the
limit of its ratio without the optimizer. Answers on disk add the product of the head and nothing else. With
`--anchors` each step takes a text of as many tokens beside each row.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_selfdistill import SelfDistillSFTConfig, SelfDistillSFTTrainer
from trl_selfdistill.trainers.sft_internals import label_positions_only


# Rows of a batch, tokens of a row, and how many of them at its end are labels
WORKLOADS = {"questions": (8, 20, 4), "documents": (2, 256, 255)}
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


def run(trainer_class, config_class, args, folder: str, **options) -> StepTimes:
    """One short training, from the same weights on the same batches each time."""
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    config = config_class(
        folder, max_steps=args.steps + WARMUP_STEPS, per_device_train_batch_size=WORKLOADS[args.workload][0],
        bf16=args.bf16, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, completion_only_loss=True, **options,
    )  # fmt: skip
    dataset = make_dataset(args.workload, args.steps + WARMUP_STEPS, model.config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    times = StepTimes(time.process_time if args.processor_time else time.perf_counter)
    arguments = dict(train_dataset=dataset, processing_class=tokenizer, callbacks=[times])
    if "anchors" in options:
        length = WORKLOADS[args.workload][1]
        text = tokenizer.decode(tokenizer(" the" * length)["input_ids"][:length])
        arguments["anchor_dataset"] = Dataset.from_dict({"text": [text] * 100})
    trainer_class(model, config, **arguments).train()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--workload", choices=WORKLOADS, default="questions")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bf16")
    parser.add_argument("--anchors", action="store_true", help="time `anchors='kl'` instead of the teacher alone")
    parser.add_argument("--processor_time", action="store_true", help="of a CPU that others use, too")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each trainer, in turns")
    args = parser.parse_args()
    variants = {
        "SFTTrainer": (SFTTrainer, SFTConfig, {}),
        "SFTTrainer, label positions": (SFTTrainer, SFTConfig, {}),  # as it is on a GPU anyway
    }
    ours = {"SelfDistillSFTTrainer": {}, "precompute_teacher": dict(precompute_teacher=True)}
    if args.anchors:
        weights = {"anchors": dict(anchors="kl", kl_weight=0.0), "anchors, λ = 0.3": dict(anchors="kl", kl_weight=0.3)}
        ours = weights | {f"{name}, cache": options | ours["precompute_teacher"] for name, options in weights.items()}
    variants |= {name: (SelfDistillSFTTrainer, SelfDistillSFTConfig, options) for name, options in ours.items()}
    parts = {name: {"forward + backward": [], "whole step": []} for name in variants}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        for _ in range(args.rounds):
            for name, (trainer_class, config_class, options) in variants.items():
                where = dict(teacher_cache_dir=cache) if "precompute_teacher" in options else {}
                with label_positions_only() if name.endswith("label positions") else nullcontext():
                    times = run(trainer_class, config_class, args, folder, **options, **where)
                parts[name]["forward + backward"] += times.forward_backward[WARMUP_STEPS:]
                parts[name]["whole step"] += times.whole[WARMUP_STEPS:]
    rows, length, num_labels = WORKLOADS[args.workload]
    unit = "ms of processor time" if args.processor_time else "ms"
    print(f"{args.workload}: {rows} x {length} tokens, {num_labels} labels a row; bf16 {args.bf16}; "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads; {unit}, median [quartiles]")  # fmt: skip
    print(f"| part | {' | '.join(variants)} | ratios to SFTTrainer |\n{'|---' * (len(variants) + 2)}|")
    for part in ("forward + backward", "whole step"):
        medians = {name: statistics.median(parts[name][part]) for name in variants}
        cells = []
        for name, median in medians.items():
            low, _, high = statistics.quantiles(parts[name][part], n=4)
            cells.append(f"{median * 1e3:.0f} [{low * 1e3:.0f}, {high * 1e3:.0f}]")
        ratios = ", ".join(f"{median / medians['SFTTrainer']:.2f}" for median in list(medians.values())[1:])
        print(f"| {part} | {' | '.join(cells)} | {ratios} |")


if __name__ == "__main__":
    main()
