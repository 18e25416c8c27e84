# SPDX-License-Identifier: Apache-2.0
"""Runs the teacher once, before training, and keeps its last hidden states as a column of the dataset on disk."""

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import written_whole
from ..losses import IGNORE_INDEX, LMHead, ModelSide
from ..parameters.hashes import digest
from .resume import describe_dataset
from .sft_internals import DataCollatorForLanguageModeling, without_unused_columns
from .teachers import Teacher


logger = logging.get_logger(__name__)

CACHE_COLUMN = "teacher_hidden_states"


class CachedTeacher(Teacher):
    """
    The hidden states that the teacher with this hash had, in `dtype`, and its LM head: with both the KL is that over
    the whole vocabulary. A `ValueError` if a batch is of a dataset that the teacher has not been run on.
    """

    def __init__(self, sha256: str, lm_head: LMHead, dtype: torch.dtype):
        self.sha256, self._lm_head, self._dtype = sha256, lm_head, dtype

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        if CACHE_COLUMN not in inputs:
            raise ValueError(
                "With `precompute_teacher=True` the teacher has seen the trainer's own datasets, and this is another "
                "one. Pass it to the trainer as `eval_dataset`, or unset `precompute_teacher`."
            )
        weight, states, counts = self._lm_head.weight, inputs.pop(CACHE_COLUMN), _label_counts(inputs)
        most = states.size(1) // (weight.size(1) * self._dtype.itemsize)
        hidden_states = states.flatten().view(self._dtype).view(len(counts), most, weight.size(1))
        hidden_states = hidden_states[torch.arange(most, device=counts.device) < counts[:, None]]
        return ModelSide(hidden_states.to(weight.device, weight.dtype), self._lm_head)


def collate_with_states(collator: Callable[[list], dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Puts the cached column of the rows (bytes) into the batch of a collator of the model's own inputs."""
    batch = collator([{name: value for name, value in row.items() if name != CACHE_COLUMN} for row in rows])
    if all(CACHE_COLUMN in row for row in rows):
        states = [torch.from_numpy(np.frombuffer(bytearray(row[CACHE_COLUMN]), np.uint8)) for row in rows]
        if len(batch["labels"]) != len(rows):  # padding-free: one line, as accelerate takes batches apart by lines
            states = [torch.cat(states)]
        batch[CACHE_COLUMN] = pad_sequence(states, batch_first=True)
    return batch


def precompute_teacher(trainer) -> CachedTeacher:
    """
    Runs the teacher of a [`SelfDistillSFTTrainer`] over its datasets, or finds what an earlier run has kept, adds the
    hidden states to them and the collator, and returns what takes the teacher's place. A collective: the processes
    share the rows. A `ValueError` if the datasets or the folder do not allow it.
    """
    args, teacher = trainer.args, trainer.teacher
    folder = Path(args.teacher_cache_dir or os.path.join(HF_HOME, "trl_selfdistill", "teacher_cache"))
    if folder.resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise ValueError(f"`teacher_cache_dir={folder}` is inside `output_dir={args.output_dir}`: take one outside.")
    owners = [(trainer, "train_dataset"), (trainer, "eval_dataset")] if args.kl_weight else []
    if trainer.anchors is not None:
        owners.append((trainer.anchors, "dataset"))
    seen = getattr(*owners[0])
    for owner, name in owners:
        dataset = getattr(owner, name)
        if isinstance(dataset, dict):
            parts = {key: _with_answers(trainer, f"{name}[{key!r}]", part, folder) for key, part in dataset.items()}
            setattr(owner, name, parts)
        elif dataset is not None:
            setattr(owner, name, _with_answers(trainer, name, dataset, folder))
    first = trainer.data_collator([without_unused_columns(trainer, seen)[0]])
    lm_head = _targets(trainer, first).lm_head
    trainer.data_collator = functools.partial(collate_with_states, trainer.data_collator)
    teacher.release(trainer.model)
    return CachedTeacher(teacher.sha256, lm_head, getattr(torch, args.teacher_cache_dtype))


def _fingerprint(trainer, name: str, dataset: Dataset) -> str:
    """All that the teacher's answers to a dataset depend on, as the name of a folder."""
    description = describe_dataset(dataset)
    if description is None or description["sha256"] is None or dataset.format["type"] == "custom":
        raise ValueError(
            f"`precompute_teacher=True`: `{name}` is a stream, becomes tokens only in a batch or has a transform. "
            "Pass a plain `datasets.Dataset`, or unset it."
        )
    if type(trainer.data_collator) is not DataCollatorForLanguageModeling:
        raise ValueError(
            "`precompute_teacher=True` needs the collator of `SFTTrainer`, which makes the same of a row each time, "
            f"and got a `data_collator` of {type(trainer.data_collator).__name__}. Leave one of them unset."
        )
    settings = {"column": CACHE_COLUMN, "dtype": trainer.args.teacher_cache_dtype}
    settings |= {"teacher": trainer.teacher.sha256, "data": description["sha256"]}
    settings |= {"mixed_precision": trainer.accelerator.mixed_precision}
    settings |= {"padding_free": str(trainer.data_collator.padding_free)}  # of TRL's own collator if it was passed
    return digest(settings)[:32]


def _with_answers(trainer, name: str, dataset: Dataset, cache_dir: Path) -> Dataset:
    """The dataset with the cached column, which is computed unless an earlier run has left it in `cache_dir`."""
    accelerator, folder = trainer.accelerator, cache_dir / _fingerprint(trainer, name, dataset)
    if CACHE_COLUMN in dataset.column_names:  # of an earlier trainer with the same prepared dataset
        dataset = dataset.remove_columns(CACHE_COLUMN)
    with ExitStack() as stack:
        partial = None
        if accelerator.is_main_process:
            stack.enter_context(FileLock(f"{folder}.lock"))  # a job beside this one may be writing the same cache
            if not folder.is_dir():
                partial = stack.enter_context(written_whole(folder))
                partial.mkdir()
        [partial] = broadcast_object_list([partial])
        if partial is not None:
            _write_share(trainer, dataset, partial)
            accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    files = [os.fspath(file) for file in sorted(folder.glob("rows-*.arrow"))]
    logger.info(f"The teacher's answers to `{name}`: {sum(map(os.path.getsize, files)) / 1e6:,.1f} MB in {folder}.")
    # Without indices of its own: with them, `concatenate_datasets` would copy the answers, too
    answers = concatenate_datasets([Dataset.from_file(file) for file in files])
    return concatenate_datasets([dataset.flatten_indices(), answers], axis=1)


def _write_share(trainer, dataset: Dataset, folder: Path) -> None:
    """Runs the teacher over this process's share of the rows, and writes one Arrow file."""
    accelerator, collator, dtype = trainer.accelerator, trainer.data_collator, trainer.args.teacher_cache_dtype
    batch_size = 1 if collator.padding_free else trainer.args.train_batch_size  # each joined row by itself
    dataset = without_unused_columns(trainer, dataset)
    if collator.padding_free and len(dataset):
        _refuse_rows_that_meet(trainer, dataset)
    share = dataset.shard(accelerator.num_processes, accelerator.process_index, contiguous=True)
    starts = range(0, len(share), batch_size)
    file = folder / f"rows-{accelerator.process_index:05d}.arrow"
    features = Features({CACHE_COLUMN: Value("large_binary")})
    with ArrowWriter(path=os.fspath(file), features=features) as writer:
        for start in tqdm(starts, "Running the teacher", disable=None if accelerator.is_main_process else True):
            batch = collator([share[row] for row in range(start, min(start + batch_size, len(share)))])
            states, counts = _targets(trainer, batch).hidden_states, _label_counts(batch).tolist()
            if len(states) != sum(counts):
                raise ValueError(
                    "`precompute_teacher=True`: the virtual tokens of a prompt-learning adapter predict the first "
                    "token of a row. Give the rows a prompt, or unset it."
                )
            parts = states.to("cpu", getattr(torch, dtype)).split(counts)
            as_bytes = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts]
            writer.write_batch({CACHE_COLUMN: as_bytes})
        writer.finalize()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        # A forward may gather the shards of all processes: each makes as many
        for _ in range(max(gather_object([len(starts)])) - len(starts)):
            _targets(trainer, collator([dataset[0]]))


def _refuse_rows_that_meet(trainer, dataset: Dataset) -> None:
    """Refuses a teacher whose answers to a row depend on the row before it, which is another one in each epoch."""
    row, first = dataset[len(dataset) - 1], dataset[0]
    count = int(_label_counts(trainer.data_collator([row])).sum())
    before = (first, {**first, "input_ids": first["input_ids"][::-1]})
    states = [_targets(trainer, trainer.data_collator([other, row])).hidden_states for other in before]
    own, beside = (part[len(part) - count :].float() for part in states)
    if count and not torch.allclose(own, beside, rtol=0, atol=1e-3 * own.abs().max().item()):
        raise ValueError(
            "`precompute_teacher=True`: in this teacher a row sees the one before it in a batch, whatever the "
            "`position_ids`. Set `packing=False` and `padding_free=False`, or unset it."
        )


def _targets(trainer, batch: dict[str, torch.Tensor]) -> ModelSide:
    """What the trainer's teacher answers to a batch of its collator."""
    inputs = {**send_to_device(batch, trainer.accelerator.device), "use_cache": False}
    with trainer.accelerator.autocast():
        return trainer.teacher.targets(trainer.model, inputs)


def _label_counts(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens each line of a batch predicts."""
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)
