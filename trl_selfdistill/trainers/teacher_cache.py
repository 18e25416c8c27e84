# SPDX-License-Identifier: Apache-2.0
"""
Runs the teacher once, before training, and keeps its last hidden states as a column of the dataset, as TRL's
`DPOTrainer` keeps reference log-probabilities. The column is an Arrow file on disk that is memory-mapped.
"""

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
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import written_whole
from ..losses import IGNORE_INDEX, LMHead, ModelSide
from ..parameters.hashes import digest
from .resume import describe_dataset
from .sft_internals import without_unused_columns
from .teachers import Teacher


logger = logging.get_logger(__name__)

_STATES, _INPUTS = CACHE_COLUMNS = ("teacher_hidden_states", "teacher_inputs")
_NAMES = ("input_ids", "position_ids", "token_type_ids")  # what a model may see of a token
_OTHER_INPUTS = (
    "The tokens, positions or labels of a batch are not those that the teacher was run on. With "
    "`precompute_teacher=True`, `data_collator` must make the same of a row each time, and keep the rows' order. Take "
    "one that draws nothing at random, another `teacher_cache_dir` for another collator, or no `precompute_teacher`."
)


class CachedTeacher(Teacher):
    """
    The hidden states that the teacher with this hash had, stored in `dtype`, and its LM head, which nothing else may
    change: with both the KL is that over the whole vocabulary. A `ValueError` if a batch is of a dataset that the
    teacher has not been run on, or has other tokens.
    """

    def __init__(self, sha256: str, lm_head: LMHead, dtype: torch.dtype):
        self.sha256, self._lm_head, self._dtype = sha256, lm_head, dtype

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        if _STATES not in inputs:
            raise ValueError(
                "With `precompute_teacher=True` the teacher has seen the trainer's own datasets, and this is another "
                "one. Pass it to the trainer as `eval_dataset`, or unset `precompute_teacher`."
            )
        weight = self._lm_head.weight
        cached, states = inputs.pop(_INPUTS), inputs.pop(_STATES)
        counts = (cached[..., 0] != IGNORE_INDEX).sum(1, keepdim=True)  # of labels in each row
        most = states.size(1) // (weight.size(1) * self._dtype.itemsize)
        hidden_states = states.flatten().view(self._dtype).view(len(counts), most, weight.size(1))
        hidden_states = hidden_states[torch.arange(most, device=counts.device) < counts]
        if not torch.equal(cached[cached[..., 1] != IGNORE_INDEX], _seen(inputs)):
            raise ValueError(_OTHER_INPUTS)
        return ModelSide(hidden_states.to(weight.device, weight.dtype), self._lm_head)


class CacheCollator:
    """Puts the cached columns of the rows (bytes) into the batch of a collator of the model's own inputs."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{k: v for k, v in row.items() if k not in CACHE_COLUMNS} for row in rows])
        if all(_STATES in row for row in rows):
            # One line for each row, as accelerate takes batches apart by lines
            states = [torch.from_numpy(np.frombuffer(bytearray(row[_STATES]), np.uint8)) for row in rows]
            seen = [torch.from_numpy(np.frombuffer(bytearray(row[_INPUTS]), np.int32)).view(-1, 4) for row in rows]
            batch[_STATES] = pad_sequence(states, batch_first=True)
            batch[_INPUTS] = pad_sequence(seen, batch_first=True, padding_value=IGNORE_INDEX)
        return batch


def precompute_teacher(trainer) -> CachedTeacher:
    """
    Runs the teacher of a [`SelfDistillSFTTrainer`] over its datasets, or finds what an earlier run has kept, and
    replaces the datasets and the collator by some with the hidden states. Returns what takes the teacher's place. A
    collective: the processes share the rows. A `ValueError` if that cannot be done with the datasets or the folder.
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
    moving = {parameter.data_ptr() for parameter in trainer.model.parameters() if parameter.requires_grad}
    if lm_head.weight.data_ptr() in moving:
        lm_head = lm_head.map_tensors(torch.clone)
    trainer.data_collator = CacheCollator(trainer.data_collator)
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
    settings = {"columns": str(CACHE_COLUMNS), "dtype": trainer.args.teacher_cache_dtype}
    settings |= {"teacher": trainer.teacher.sha256, "data": description["sha256"]}
    settings |= {"padding_free": str(trainer.padding_free), "mixed_precision": trainer.accelerator.mixed_precision}
    return digest(settings)[:32]


def _with_answers(trainer, name: str, dataset: Dataset, cache_dir: Path) -> Dataset:
    """The dataset with the cached columns, which are computed unless an earlier run has left them in `cache_dir`."""
    accelerator, folder = trainer.accelerator, cache_dir / _fingerprint(trainer, name, dataset)
    # Those of an earlier trainer with the same prepared dataset go
    dataset = dataset.remove_columns([column for column in CACHE_COLUMNS if column in dataset.column_names])
    with ExitStack() as stack:
        partial = None
        if accelerator.is_main_process:
            cache_dir.mkdir(parents=True, exist_ok=True)
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
    accelerator, collator, batch_size = trainer.accelerator, trainer.data_collator, trainer.args.train_batch_size
    dtype = getattr(torch, trainer.args.teacher_cache_dtype)
    dataset = without_unused_columns(trainer, dataset)
    if trainer.padding_free and len(dataset):
        _refuse_rows_that_meet(trainer, dataset)
    share = dataset.shard(accelerator.num_processes, accelerator.process_index, contiguous=True)
    starts = range(0, len(share), batch_size)
    file = folder / f"rows-{accelerator.process_index:05d}.arrow"
    features = Features({name: Value("large_binary") for name in CACHE_COLUMNS})
    with ArrowWriter(path=os.fspath(file), features=features) as writer:
        for start in tqdm(starts, "Running the teacher", disable=None if accelerator.is_main_process else True):
            rows = [share[row] for row in range(start, min(start + batch_size, len(share)))]
            batch = collator(rows)
            # Rows may be joined in the batch: what is whose is known of each by itself
            seen = [_seen(collator([row])) for row in rows]
            if not torch.equal(torch.cat(seen), _seen(batch)):
                raise ValueError(_OTHER_INPUTS)
            states = _targets(trainer, batch).hidden_states.to("cpu", dtype)
            counts = [int((part[:, 0] != IGNORE_INDEX).sum()) for part in seen]
            if len(states) != sum(counts):
                raise ValueError(
                    "`precompute_teacher=True`: the virtual tokens of a prompt-learning adapter predict the first "
                    "token of a row. Give the rows a prompt, or unset it."
                )
            as_bytes = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in states.split(counts)]
            writer.write_batch({_STATES: as_bytes, _INPUTS: [part.numpy().tobytes() for part in seen]})
        writer.finalize()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        # A forward may gather the shards of all processes: each makes as many
        for _ in range(max(gather_object([len(starts)])) - len(starts)):
            _targets(trainer, collator([dataset[0]]))


def _refuse_rows_that_meet(trainer, dataset: Dataset) -> None:
    """Refuses a teacher whose answers to a row depend on the row before it, which is another one in each epoch."""
    row, first = dataset[len(dataset) - 1], dataset[0]
    count = int((_seen(trainer.data_collator([row]))[:, 0] != IGNORE_INDEX).sum())
    before = (first, {**first, "input_ids": first["input_ids"][::-1]})
    states = [_targets(trainer, trainer.data_collator([other, row])).hidden_states for other in before]
    own, beside = (part[len(part) - count :].float() for part in states)
    if not torch.allclose(own, beside, rtol=0, atol=1e-3 * own.abs().max().item() if count else 0.0):
        raise ValueError(
            "`precompute_teacher=True`: in this teacher a row sees the one before it in a batch, whatever the "
            "`position_ids`. Set `packing=False` and `padding_free=False`, or unset it."
        )


def _targets(trainer, batch: dict[str, torch.Tensor]) -> ModelSide:
    """What the trainer's teacher answers to a batch of its collator."""
    inputs = {**send_to_device(batch, trainer.accelerator.device), "use_cache": False}
    with trainer.accelerator.autocast():
        return trainer.teacher.targets(trainer.model, inputs)


def _seen(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model sees, and what it is to say next: `(num_tokens, 4)`, a line for each token, row after row."""
    ids = batch["input_ids"]
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    columns = [labels, *(batch.get(name, torch.zeros_like(ids)) for name in _NAMES)]
    is_label = labels != IGNORE_INDEX
    if "attention_mask" in batch:
        is_seen = batch["attention_mask"].bool() | is_label
    elif "position_ids" in batch:  # padding-free
        is_seen = torch.ones_like(is_label)
    else:  # no label sees what follows the last one
        is_seen = is_label.flip(1).cumsum(1).flip(1) > 0
    return torch.stack(columns, -1)[is_seen].int()
