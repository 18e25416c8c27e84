# SPDX-License-Identifier: Apache-2.0
"""
Checks on the machines at hand that a distributed run is the one-process run: losses, weights, frozen parameters,
resuming.

A small random Llama, in fp32, with the same 16 rows a step however many processes there are. DeepSpeed runs
without a GPU too, where it is installed (DS_ACCELERATOR=cpu).

First the reference in one process, then each configuration; exit status 1 if a check fails:

    trl-selfdistill check-distributed --num_processes 1 --write_reference

    trl-selfdistill check-distributed --config_file fsdp2 --num_processes 2
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from trl_selfdistill import SelfDistillSFTConfig, SelfDistillSFTTrainer
from trl_selfdistill.studies.small_llama import train_tokenizer


RUNS = {
    "SFT": {"kl_weight": 0.0},
    "frozen groups": {"trainable_groups": ["attention"], "gradient_checkpointing": True},
    "another teacher": {"teacher_model_name_or_path": None},
    "cached teacher": {"precompute_teacher": True, "teacher_cache_dir": None, "teacher_cache_dtype": "float32"},
    "LoRA": {},
    "anchors": {"anchors": "self", "anchor_max_new_tokens": 8},
}
STEPS, SAVED, ROWS = 4, 2, 16
SETTINGS = {"max_steps": STEPS, "save_steps": SAVED, "learning_rate": 1e-3, "max_grad_norm": 0.0, "kl_weight": 2.0}
SETTINGS |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True}
SETTINGS |= {"bf16": False, "gradient_checkpointing": False}
DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
TEXTS = [(f"Q: What is {n} times {n + 1}?\nA:", f" {n * (n + 1)}" * (1 + n % 3)) for n in range(STEPS * ROWS)]


def save_models(folder: Path) -> None:
    """The model and another one as its teacher, both random, and their tokenizer."""
    tokenizer = train_tokenizer(map("".join, TEXTS), 400)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    for seed, name in enumerate(("model", "teacher")):
        set_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **size))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_trainer(reference: Path, folder: Path, name: str) -> SelfDistillSFTTrainer:
    """A trainer of the saved model, by default with itself as the teacher."""
    state = PartialState()
    paths = {"teacher_model_name_or_path": reference / "teacher", "teacher_cache_dir": folder.parent / "cache"}
    options = {option: str(paths[option]) if option in paths else value for option, value in RUNS[name].items()}
    args = SelfDistillSFTConfig(
        str(folder),
        per_device_train_batch_size=ROWS // state.num_processes,
        use_cpu=state.device.type == "cpu" and not DEEPSPEED,
        ddp_backend=state.backend,
        **SETTINGS | options,
    )
    data = Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in TEXTS])
    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if name == "LoRA" else None
    set_seed(0)
    return SelfDistillSFTTrainer(str(reference / "model"), args, train_dataset=data, peft_config=adapter)


def train(
    reference: Path, folder: Path, name: str, checkpoint: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights at the end of a run, on the main process, and its losses."""
    trainer = make_trainer(reference, folder, name)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    weights = {key: tensor.float().cpu().clone().contiguous() for key, tensor in state.items()}
    trainer.accelerator.free_memory()
    return weights, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Over all tensors of `ours`."""
    return max((tensor - theirs[key]).abs().max().item() for key, tensor in ours.items())


def compare(name: str, weights: dict, losses: list[float], resumed: dict, reference: Path) -> list[tuple]:
    """Rows of the table: what, the difference, the tolerance."""
    expected, start = (load_file(reference / file) for file in (f"{name}.safetensors", "model/model.safetensors"))
    their_losses = json.loads((reference / "losses.json").read_text())[name]
    rows = [
        ("losses", max(abs(a - b) for a, b in zip(losses, their_losses, strict=True)), 1e-3),
        ("weights", largest_difference(weights, expected), 1e-4),
        ("resumed weights", largest_difference(weights, resumed), 1e-6),
    ]
    if "trainable_groups" in RUNS[name]:
        frozen = {key: tensor for key, tensor in weights.items() if "self_attn" not in key}
        rows += [("frozen parameters against the start", largest_difference(frozen, start), 0.0)]
    return rows


def main() -> int:
    """Prints the table on the main process; the number of checks that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/check_distributed"), help="Where runs go.")
    parser.add_argument("--write_reference", action="store_true", help="Write what the others are compared with.")
    args = parser.parse_args()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true" or not torch.accelerator.is_available()
    state = PartialState(backend="gloo") if on_cpu and DEEPSPEED else PartialState(cpu=on_cpu)
    reference, runs = args.output_dir / "reference", args.output_dir / f"{state.num_processes}-processes"
    if not args.write_reference and not (reference / "losses.json").is_file():
        raise FileNotFoundError(f"No reference in {reference}. Run this in one process with --write_reference first.")
    if ROWS % state.num_processes:
        raise ValueError(f"{state.num_processes} processes cannot share {ROWS} rows. Start 1, 2, 4, 8 or 16.")
    if state.is_main_process:
        shutil.rmtree(runs, ignore_errors=True)
        if args.write_reference:
            save_models(reference)
    state.wait_for_everyone()
    table, all_losses = [], {}
    for name in RUNS:
        weights, all_losses[name] = train(reference, runs / name, name)
        if args.write_reference:
            save_file(weights, reference / f"{name}.safetensors")
            continue
        resumed, _ = train(reference, runs / f"{name}-resumed", name, runs / f"{name}/checkpoint-{SAVED}")
        if state.is_main_process:
            table += [(name, *row) for row in compare(name, weights, all_losses[name], resumed, reference)]
    if args.write_reference:
        (reference / "losses.json").write_text(json.dumps(all_losses, indent=2) + "\n", encoding="utf-8")
    if state.is_main_process:
        kind = "FSDP" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else state.distributed_type.value
        print(f"{state.num_processes} processes, {kind}")
        for name, what, difference, tolerance in table:
            verdict = "passed" if difference <= tolerance else "FAILED"
            print(f"{verdict}  {name}: {what}, {difference:.2e} (at most {tolerance:.0e})", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    return sum(difference > tolerance for _, _, difference, tolerance in table)


if __name__ == "__main__":
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # compared in fp32, whatever the configuration says
    sys.exit(min(main(), 1))
