# SPDX-License-Identifier: Apache-2.0
"""SelfDistillSFTTrainer on two processes (DDP, gloo) is the one-process run with the same global batch."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from sft_runs import FACTS, TOKENIZER, architecture, logs, train
from two_processes import leave_processes, run_in_two_processes


def half_labelled_rows() -> Dataset:
    """
    Rows of uneven length, every other one without a token to predict: a process has nothing to learn from in some
    steps. (TRL drops rows without any label; that of a row's first token is never predicted.)
    """
    rows = []
    for i, fact in enumerate(FACTS):
        input_ids = TOKENIZER(fact["prompt"] + fact["completion"])["input_ids"]
        labels = [input_ids[0], *[-100] * (len(input_ids) - 1)] if i % 2 else input_ids
        rows.append({"input_ids": input_ids, "labels": labels})
    return Dataset.from_list(rows)


RUNS = {
    "a given teacher": dict(kl_weight=2.0),
    "a snapshot": dict(teacher_snapshot_steps=1),
    "another loss": dict(kl_weight=2.0, loss_type="dft"),
    "a process without labels": dict(kl_weight=2.0, max_steps=4, gradient_accumulation_steps=1),
    "frozen groups": dict(kl_weight=2.0, trainable_groups=["attention"]),
    "an adapter": dict(kl_weight=2.0),
    "a cache": dict(kl_weight=2.0, precompute_teacher=True, teacher_cache_dtype="float32"),
    "a cache, a process without labels": dict(kl_weight=2.0, precompute_teacher=True, teacher_cache_dtype="float32"),
}


def run_all(folder: Path, batch_size: int) -> None:
    """Each of the runs, its weights and its logs."""
    for name, options in RUNS.items():
        own = "snapshot" in name or "adapter" in name
        arguments = dict(teacher_model=None if own else build_model(TOKENIZER, seed=1, initializer_range=0.4))
        if "without labels" in name:
            arguments["train_dataset"] = half_labelled_rows()
            assert len(FACTS) % 2 == 0
        if "adapter" in name:
            torch.manual_seed(4)
            arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        settings = dict(per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.5)
        settings |= dict(gradient_accumulation_steps=2, max_steps=2, max_grad_norm=0.0)
        if "cache" in name:
            settings["teacher_cache_dir"] = str(folder / name / "cache")
        run = train(folder / name, architecture("llama"), arguments, **settings | options)
        run.save_model()
        if run.is_world_process_zero():
            (folder / name / "logs.json").write_text(json.dumps(logs(run)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    alone, together = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run_in_two_processes(__file__, together)
    run_all(alone, batch_size=2)
    return alone, together


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_with_twice_the_batch(folders, name):
    file = "adapter_model.safetensors" if "adapter" in name else "model.safetensors"
    alone, together = (load_file(folder / name / "run" / file) for folder in folders)
    assert alone.keys() == together.keys()
    for key in alone:
        # The weights are of the order of 1, and sums in another order differ in their last bits, step for step
        torch.testing.assert_close(together[key], alone[key], rtol=1e-4, atol=2e-5, msg=key)
    alone, together = (json.loads((folder / name / "logs.json").read_text()) for folder in folders)
    assert len(together) == len(alone) > 2
    for row, expected in zip(together[:-1], alone[:-1], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert alone[1]["kl_loss"] >= 0


def test_two_processes_write_the_cache_of_one(folders):
    alone, together = (sorted((folder / "a cache" / "cache").rglob("*.*")) for folder in folders)
    assert len(alone) == len(together) > 5 and [file.name for file in alone] == [file.name for file in together]
    for one, two in zip(alone, together, strict=True):
        if one.name == "cache.json":
            assert one.read_bytes() == two.read_bytes()
        else:
            one, two = load_file(one), load_file(two)
            for key in one:  # one row a batch or two, which changes the last bits
                torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), batch_size=1)
    leave_processes()
