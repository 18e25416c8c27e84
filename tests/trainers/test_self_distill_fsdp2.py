# SPDX-License-Identifier: Apache-2.0
"""Student and teacher sharded by FSDP2 over two processes (gloo, a CPU mesh) are the one-process model.

accelerate does not enable FSDP on a CPU, so that the student is sharded here by `fully_shard` itself; the teacher by
the trainer's own `ModelTeacher`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import build_model
from sft_runs import TOKENIZER
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from two_processes import run_in_two_processes

from trl_selfdistill.parameters.groups import freeze_groups
from trl_selfdistill.trainers.sft_internals import DistillationTargets, add_distillation_forward
from trl_selfdistill.trainers.teacher import ModelTeacher


STEPS = 3
OPTIONS = {
    "full": dict(),
    "tied embeddings": dict(tie_word_embeddings=True),
    "frozen groups": dict(trainable_groups=["attention", "norm"]),
}


def batches() -> list[list[dict[str, torch.Tensor]]]:
    """For each step a row for each of the two processes; in the second step the second has no label at all."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for step in range(STEPS):
        rows = []
        for rank in range(2):
            input_ids = torch.randint(3, 300, (1, 8 + 3 * rank + step), generator=generator)
            labels = input_ids.clone()
            labels[:, : 2 + rank] = -100
            if (step, rank) == (1, 1):
                labels[:] = -100
            rows.append(dict(input_ids=input_ids, labels=labels, use_cache=False))
        steps.append(rows)
    return steps


def train(name: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Losses, gradients and weights: of one process with both rows (`rank` None), or of one of two."""
    options = dict(OPTIONS[name])
    groups = options.pop("trainable_groups", None)
    student = build_model(TOKENIZER, initializer_range=0.3, **options)
    teacher_model = build_model(TOKENIZER, seed=1, initializer_range=0.3, **options)
    if groups:
        freeze_groups(student, trainable_groups=groups)
    add_distillation_forward(student)
    sharded = rank is not None
    plugin = SimpleNamespace(fsdp_plugin=None)
    if sharded:
        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(student)
        plugin.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP if sharded else DistributedType.NO,
        device=torch.device("cpu"),
        state=plugin,
        prepare_model=lambda model, evaluation_mode: model,
        unwrap_model=lambda model: model,
    )
    teacher = ModelTeacher(teacher_model, accelerator)
    assert isinstance(teacher.model, FSDPModule) == sharded
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    result = {}
    for step, rows in enumerate(batches()):
        num_items = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
        loss = torch.zeros(())
        for row in rows if rank is None else [rows[rank]]:
            side = teacher.targets(student, row)
            targets = DistillationTargets(side, 1.0, 2.0, 0.5, num_items)
            # FSDP averages the gradients over the processes
            row_loss = student(**row, distillation=targets).ce_kl.loss * (2 if sharded else 1)
            row_loss.backward()
            loss = loss + row_loss.detach() / (2 if sharded else 1)
        if sharded:
            torch.distributed.all_reduce(loss)
        result[f"loss {step}"] = loss
        for parameter_name, parameter in student.named_parameters():
            if parameter.grad is not None:
                result[f"grad {step} {parameter_name}"] = full(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    result |= {f"weight {name}": full(parameter.detach()) for name, parameter in student.named_parameters()}
    return result


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_in_two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_two_shards_are_one_model(sharded, name):
    expected = train(name, None)
    for rank in range(2):
        found = torch.load(sharded / f"{name}-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=key)
    start = build_model(TOKENIZER, initializer_range=0.3, **{k: v for k, v in OPTIONS[name].items() if "tie" in k})
    if "trainable_groups" in OPTIONS[name]:
        still = {n for n, p in start.named_parameters() if torch.equal(found[f"weight {n}"], p)}
        assert still == {n for n in dict(start.named_parameters()) if "self_attn" not in n and "norm" not in n}
        assert not any(key.startswith("grad") and key.split()[-1] in still for key in found)


def test_a_teacher_that_other_processes_have_not_loaded_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin), device="cpu"
    )
    with pytest.raises(ValueError, match="`fsdp_cpu_ram_efficient_loading: true` .* Set it to false"):
        ModelTeacher(build_model(TOKENIZER), accelerator)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for run in OPTIONS:
        rank = torch.distributed.get_rank()
        torch.save(train(run, rank), Path(sys.argv[1]) / f"{run}-{rank}.pt")
    torch.distributed.destroy_process_group()
