# SPDX-License-Identifier: Apache-2.0
"""
Two processes (gloo) are the one-process run with the same global batch: DDP, FSDP2 and DeepSpeed ZeRO, one start each.

accelerate enables FSDP on accelerators only. What keeps it from a CPU is one condition on the kind of the processes,
which `shard_on_the_cpu` answers otherwise; sharding, saving and loading are then those of accelerate and Trainer.
"""

import json
import os
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import build_model
from datasets import Dataset
from safetensors.torch import load_file
from sft_runs import FACTS, ROUNDING, TOKENIZER, logs, other_teacher
from test_laws import FEATURES, Run, train
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from two_processes import needs_fsdp2_on_cpu, run_in_two_processes

from trl_selfdistill.trainers.teachers import ModelTeacher


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


# Features of test_laws.py, each with further options
DDP = {
    "another teacher": {},
    "snapshot": {},
    "anchors": dict(loss_type="dft"),
    "teacher, trainable groups": {},
    "anchors of itself, LoRA, snapshot": {},
    "teacher cache": dict(max_steps=4, gradient_accumulation_steps=1),  # and a process without labels
}


def run_ddp(folder: Path, batch_size: int = 1) -> None:
    """Each of the runs, its weights and its logs."""
    settings = dict(per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.2, kl_weight=2.0)
    settings |= dict(gradient_accumulation_steps=2, max_steps=3, max_grad_norm=0.0)
    for name, options in DDP.items():
        feature = FEATURES[name]
        if name == "teacher cache":
            feature = feature._replace(arguments=lambda: other_teacher() | dict(train_dataset=half_labelled_rows()))
        run = train(folder / name, feature, dropout=0.0, **settings | options).trainer
        run.save_model()
        if run.is_world_process_zero():
            (folder / name / "logs.json").write_text(json.dumps(logs(run)))


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    alone, together = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run_in_two_processes(run_ddp, together)
    run_ddp(alone, batch_size=2)
    return alone, together


@pytest.mark.parametrize("name", DDP)
def test_ddp_is_one_process_with_twice_the_batch(ddp, name):
    file = "adapter_model.safetensors" if "LoRA" in name else "model.safetensors"
    alone, together = (load_file(folder / name / "run" / file) for folder in ddp)
    assert alone.keys() == together.keys()
    for key in alone:
        # The weights are of the order of 1, and sums in another order differ in their last bits, step for step
        torch.testing.assert_close(together[key], alone[key], rtol=1e-4, atol=2e-5, msg=key)
    alone, together = (json.loads((folder / name / "logs.json").read_text()) for folder in ddp)
    for row, expected in zip(together[:-1], alone[:-1], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6 + ROUNDING)
    assert max(row.get("kl_loss", 0.0) for row in alone) > 1e-6


def test_processes_share_the_cache(ddp):
    alone, together = ([*folder.glob("teacher cache/cache/*/rows-*.arrow")] for folder in ddp)
    assert alone[0].parent.name == together[0].parent.name and (len(alone), len(together)) == (1, 2)


# Features of test_laws.py, each with the format of its checkpoints
FSDP2 = {
    "teacher, trainable groups": "SHARDED_STATE_DICT",
    "anchors of itself, tied": "FULL_STATE_DICT",
    "trainable groups": "FULL_STATE_DICT",
}
# As scripts/accelerate_configs/fsdp2.yaml; `accelerate launch` hands it over in the environment
FSDP2_ENVIRONMENT = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
FSDP2_ENVIRONMENT |= dict(FSDP_CPU_RAM_EFFICIENT_LOADING="false", FSDP_OFFLOAD_PARAMS="false")


def shard_on_the_cpu() -> None:
    """Makes accelerate's state that of FSDP where a plugin is given, as it is on GPUs."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:  # whoever asks for the state takes the kind of the processes over anew
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def train_fsdp2(folder: Path, name: str, batch_size: int, resume: str | None = None) -> Run:
    options = dict(save_strategy="steps", save_steps=2, per_device_train_batch_size=batch_size)
    options |= dict(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.0)
    return train(folder, FEATURES[name], resume=resume, dropout=0.0, **options)


def run_fsdp2(folder: Path) -> None:
    """Trains without a break, and again from the checkpoint in the middle of that; saves what is compared."""
    shard_on_the_cpu()
    for name, part in product(FSDP2, ("whole", "resumed")):
        os.environ["FSDP_STATE_DICT_TYPE"] = FSDP2[name]
        AcceleratorState._reset_state()
        resume = str(folder / name / "whole/run/checkpoint-2") if part == "resumed" else None
        run = train_fsdp2(folder / name / part, name, batch_size=1, resume=resume).trainer
        assert isinstance(run.model, FSDPModule) and all(isinstance(p, DTensor) for p in run.model.parameters())
        if run.teacher is not None:
            assert all(isinstance(p, DTensor) and not p.requires_grad for p in run.teacher_model.parameters())
        run.save_model()
        weights = {key: parameter.full_tensor().detach() for key, parameter in run.model.named_parameters()}
        if run.is_world_process_zero():
            torch.save(weights, folder / name / f"{part}.pt")
            (folder / name / f"{part}.json").write_text(json.dumps(logs(run)))


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_in_two_processes(run_fsdp2, folder, **FSDP2_ENVIRONMENT)
    return folder


@needs_fsdp2_on_cpu
@pytest.mark.parametrize("name", FSDP2)
def test_fsdp2_is_one_process_resumes_exactly_and_saves_whole_models(fsdp2, tmp_path, name):
    whole, resumed = (torch.load(fsdp2 / name / f"{part}.pt", weights_only=True) for part in ("whole", "resumed"))
    alone, start, _ = train_fsdp2(tmp_path, name, batch_size=2)
    for key, parameter in alone.model.named_parameters():
        torch.testing.assert_close(whole[key], parameter.detach(), rtol=1e-4, atol=1e-5, msg=key)
        assert torch.equal(whole[key], resumed[key]), key
    still = {key for key, tensor in start.items() if torch.equal(whole[key], tensor)}
    assert still == ({key for key in start if "self_attn" not in key} if "tied" not in name else set())
    for ours, theirs in zip(json.loads((fsdp2 / name / "whole.json").read_text()), logs(alone), strict=True):
        for key in {"loss", "ce_loss", "kl_loss", "anchor_kl_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=ROUNDING)
    if FSDP2[name] == "FULL_STATE_DICT":
        saved = load_file(fsdp2 / name / "whole/run/model.safetensors")
        assert all(torch.equal(saved[key], whole[key]) for key in saved.keys() & whole.keys())


def test_a_teacher_that_other_processes_have_not_loaded_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin), device="cpu"
    )
    with pytest.raises(ValueError, match="`fsdp_cpu_ram_efficient_loading: true` .* Set it to false"):
        ModelTeacher(build_model(TOKENIZER), accelerator)
