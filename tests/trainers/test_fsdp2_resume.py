# SPDX-License-Identifier: Apache-2.0
"""SelfDistillSFTTrainer under FSDP2 on two processes (gloo): it is the one-process run, and it saves and resumes.

accelerate enables FSDP on accelerators only. What keeps it from a CPU is one condition on the kind of the processes,
which `shard_on_the_cpu` answers otherwise; sharding, saving and loading are then those of accelerate and Trainer.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from conftest import build_model
from safetensors.torch import load_file
from sft_runs import TOKENIZER, logs, trainer
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from two_processes import leave_processes, run_in_two_processes


STEPS, SAVED = 4, 2
GROUPS = dict(trainable_groups=["attention"], kl_weight=2.0)
# Each with the options of the trainer, those of the model, and the format of the checkpoints
RUNS = {
    "frozen groups": (GROUPS, {}, "FULL_STATE_DICT"),
    "frozen groups, sharded checkpoint": (GROUPS, {}, "SHARDED_STATE_DICT"),
    "tied embeddings": (dict(kl_weight=2.0), dict(tie_word_embeddings=True), "FULL_STATE_DICT"),
    "no teacher": (dict(trainable_groups=["attention"], kl_weight=0.0), {}, "FULL_STATE_DICT"),
}
# As scripts/accelerate_configs/fsdp2.yaml; `accelerate launch` hands it over in the environment
FSDP2 = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
FSDP2 |= dict(FSDP_CPU_RAM_EFFICIENT_LOADING="false", FSDP_OFFLOAD_PARAMS="false", FSDP_RESHARD_AFTER_FORWARD="true")


def shard_on_the_cpu() -> None:
    """Makes accelerate's state that of FSDP where a plugin is given, as it is on GPUs."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:  # whoever asks for the state takes the kind of the processes over anew
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def run_of(folder: Path, name: str, batch_size: int, **changes):
    options, model, _ = RUNS[name]
    arguments = {}
    if options["kl_weight"]:
        arguments["teacher_model"] = build_model(TOKENIZER, seed=1, initializer_range=0.4, **model)
    settings = dict(max_steps=STEPS, save_strategy="steps", save_steps=SAVED, learning_rate=1e-2)
    settings |= dict(per_device_train_batch_size=batch_size, weight_decay=0.1, max_grad_norm=0.0)
    student = build_model(TOKENIZER, initializer_range=0.4, **model)
    return trainer(folder, student, arguments, **settings | options | changes)


def train_sharded(folder: Path, name: str) -> None:
    """Trains without a break, and again from the checkpoint in the middle of that; saves what is compared."""
    os.environ["FSDP_STATE_DICT_TYPE"] = RUNS[name][2]
    for part in ("whole", "resumed"):
        AcceleratorState._reset_state()
        run = run_of(folder / part, name, batch_size=1)
        resume = folder / "whole" / "run" / f"checkpoint-{SAVED}" if part == "resumed" else None
        run.train(resume_from_checkpoint=resume and str(resume))
        assert isinstance(run.model, FSDPModule) and all(isinstance(p, DTensor) for p in run.model.parameters())
        if run.teacher is not None:
            assert all(isinstance(p, DTensor) and not p.requires_grad for p in run.teacher_model.parameters())
        run.save_model()
        optimizer = get_optimizer_state_dict(run.model, run.optimizer.optimizer)
        moments = {key: full(state["exp_avg"]) for key, state in optimizer["state"].items()}
        weights = {key: full(parameter) for key, parameter in run.model.named_parameters()}
        if run.is_world_process_zero():
            torch.save({"weights": weights, "moments": moments}, folder / f"{part}.pt")
            (folder / f"{part}.json").write_text(json.dumps(logs(run)))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for name in RUNS:
        (folder / name).mkdir()
    run_in_two_processes(__file__, folder, **FSDP2)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_shards_through_the_trainer_are_one_process(sharded, tmp_path, name):
    alone = run_of(tmp_path, name, batch_size=2)
    start = {key: parameter.detach().clone() for key, parameter in alone.model.named_parameters()}
    alone.train()
    found = torch.load(sharded / name / "whole.pt", weights_only=True)
    for key, parameter in alone.model.named_parameters():
        torch.testing.assert_close(found["weights"][key], parameter.detach(), rtol=1e-4, atol=1e-6, msg=key)
    still = {key for key, tensor in start.items() if torch.equal(found["weights"][key], tensor)}
    if "trainable_groups" in RUNS[name][0]:
        assert still == {key for key in start if "self_attn" not in key} and still
    else:
        assert not still
    assert found["moments"].keys() == start.keys() - still  # what is frozen has no state
    for ours, theirs in zip(json.loads((sharded / name / "whole.json").read_text()), logs(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for key in {"loss", "ce_loss", "kl_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_resuming_from_shards_is_the_uninterrupted_run(sharded, name):
    whole, resumed = (torch.load(sharded / name / f"{part}.pt", weights_only=True) for part in ("whole", "resumed"))
    for kind in ("weights", "moments"):
        assert whole[kind].keys() == resumed[kind].keys()
        for key, tensor in whole[kind].items():
            assert torch.equal(tensor, resumed[kind][key]), key


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[2] == "FULL_STATE_DICT"])
def test_what_is_saved_is_whole(sharded, name):
    weights = torch.load(sharded / name / "whole.pt", weights_only=True)["weights"]
    saved = load_file(sharded / name / "whole/run/model.safetensors")
    assert weights.keys() ^ saved.keys() <= {"lm_head.weight"}  # where it is tied, it has two names
    for key in weights.keys() & saved.keys():
        assert torch.equal(saved[key], weights[key]), key


if __name__ == "__main__":
    shard_on_the_cpu()
    for run_name in RUNS:
        train_sharded(Path(sys.argv[1]) / run_name, run_name)
    leave_processes()
