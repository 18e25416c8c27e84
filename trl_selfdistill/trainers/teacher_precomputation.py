# SPDX-License-Identifier: Apache-2.0
"""Runs the teacher once over the prepared datasets, before training, and puts a [`CachedTeacher`] in its place."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from ..losses import IGNORE_INDEX, LMHead, ModelSide
from .adapter_teacher import TEACHER_ADAPTER
from .cached_teacher import CachedTeacher
from .hidden_state_cache import HiddenStateCache, format_bytes, read_num_tokens, write_layout
from .teacher_rows import TeacherRowCollator, number_rows
from .training_data_record import describe_training_data


DEFAULT_CACHE_DIR = os.path.join(HF_HOME, "trl_selfdistill", "teacher_cache")
_FORMAT = 1


def precompute_teacher(trainer) -> None:
    """
    Replaces `trainer.teacher` by its answers to the trainer's datasets, and numbers their rows.

    Args:
        trainer ([`SelfDistillSFTTrainer`]): With its teacher. `args.teacher_cache_dir` and `args.teacher_cache_dtype`
            say where the answers go and in what dtype.

    Raises:
        ValueError: If a dataset is a stream or becomes tokens only in a batch, if a file of the cache is damaged, or
            if the cache would be in `output_dir`.
        OSError: If the disk has no room for the cache.
    """
    datasets, hashes = _datasets_of(trainer)
    accelerator = trainer.accelerator
    parent = _cache_dir(trainer.args)
    runs = {name: _TeacherRun(trainer, dataset) for name, dataset in datasets.items()}
    side = next(iter(runs.values())).targets([0])
    lm_head = _kept_head(side.lm_head, trainer.model, accelerator.device)
    hidden_size = side.hidden_states.shape[1]
    caches = [_fill_cache(trainer, name, hashes[name], run, hidden_size, parent) for name, run in runs.items()]
    _number_datasets(trainer, datasets)
    trainer.data_collator = TeacherRowCollator(trainer.data_collator)
    trainer.teacher = CachedTeacher(trainer.teacher.sha256, lm_head, caches)
    if TEACHER_ADAPTER in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter(TEACHER_ADAPTER)
    accelerator.free_memory()  # it holds on to what it has prepared, which is the teacher and nothing else yet
    accelerator.wait_for_everyone()


def _cache_dir(args) -> Path:
    folder = Path(args.teacher_cache_dir or DEFAULT_CACHE_DIR)
    if folder.resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise ValueError(
            f"`teacher_cache_dir={os.fspath(folder)!r}` is inside `output_dir={args.output_dir!r}`, which is pushed "
            "to the Hub. Choose a folder outside of it."
        )
    return folder


def _kept_head(lm_head: LMHead, student: torch.nn.Module, device: torch.device) -> LMHead:
    """The teacher's head, copied if training would move it."""
    moving = {parameter.data_ptr() for parameter in student.parameters() if parameter.requires_grad}
    return lm_head.map_tensors(lambda t: t.detach().to(device, copy=t.data_ptr() in moving))


def _datasets_of(trainer) -> tuple[dict[str, Dataset], dict[str, str]]:
    """The datasets by the names of their arguments, and the SHA-256 of their tokens and labels."""
    datasets = {"train_dataset": trainer.train_dataset}
    if isinstance(trainer.eval_dataset, dict):
        datasets |= {_eval_name(name): dataset for name, dataset in trainer.eval_dataset.items()}
    else:
        datasets["eval_dataset"] = trainer.eval_dataset
    datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
    hashes = {}
    for name, dataset in datasets.items():
        description = describe_training_data(dataset)
        if description is None or description["sha256"] is None:
            what = "is a stream, which is read once" if description is None else "becomes tokens only in a batch"
            raise ValueError(
                "`precompute_teacher=True` runs the teacher over the tokens of every row before training, and "
                f"`{name}` {what}. Pass a `datasets.Dataset` that the trainer tokenises, or leave "
                "`precompute_teacher` unset."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}` has no rows for `precompute_teacher=True` to run the teacher over.")
        hashes[name] = description["sha256"]
    return datasets, hashes


def _eval_name(name: str) -> str:
    return f"eval_dataset[{name!r}]"


def _number_datasets(trainer, datasets: dict[str, Dataset]) -> None:
    first, numbered = 0, {}
    for name, dataset in datasets.items():
        numbered[name] = number_rows(dataset, first)
        first += len(dataset)
    trainer.train_dataset = numbered.get("train_dataset")
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {name: numbered[_eval_name(name)] for name in trainer.eval_dataset}
    else:
        trainer.eval_dataset = numbered.get("eval_dataset")


class _TeacherRun:
    """The trainer's teacher over the rows of one dataset, as the trainer's collator puts them into batches."""

    def __init__(self, trainer, dataset: Dataset):
        self._trainer = trainer
        self._collator = trainer.data_collator
        self._dataset = trainer._remove_unused_columns(dataset, "training")

    def _collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        columns = self._dataset[rows]
        return self._collator(
            [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        )

    def count_tokens(self) -> torch.Tensor:
        """The label tokens of each row, `(num_rows,)`."""
        rows = tqdm(range(len(self._dataset)), desc="Counting label tokens", leave=False, disable=None)
        return torch.tensor([int((self._collate([row])["labels"][:, 1:] != IGNORE_INDEX).sum()) for row in rows])

    @torch.no_grad()
    def targets(self, rows: list[int]) -> ModelSide:
        """What the teacher gives for a batch of rows."""
        return self._targets(self._collate(rows))

    def _targets(self, batch: dict[str, torch.Tensor]) -> ModelSide:
        accelerator = self._trainer.accelerator
        inputs = {**send_to_device(batch, accelerator.device), "use_cache": False}
        with accelerator.autocast():
            return self._trainer.teacher.targets(self._trainer.model, inputs)

    def batches(self, rows: range) -> list[list[int]]:
        """The rows in batches, the longest first: rows of a length are padded little, and memory ends early."""
        lengths = [len(ids) for ids in self._dataset[rows.start : rows.stop]["input_ids"]]
        order = sorted(rows, key=lambda row: -lengths[row - rows.start])
        size = self._trainer.args.per_device_train_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    @torch.no_grad()
    def answer(self, rows: range, num_tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
        """
        Runs the teacher over `rows`, a batch for each item, and ends with their hidden states and labels in the order
        of the rows. Until then the items are `None`.
        """
        states: dict[int, torch.Tensor] = {}
        labels: dict[int, torch.Tensor] = {}
        for batch_rows in self.batches(rows):
            batch = self._collate(batch_rows)
            shift_labels = batch["labels"][:, 1:]
            counts = num_tokens[batch_rows].tolist()
            states |= zip(batch_rows, self._targets(batch).hidden_states.cpu().split(counts), strict=True)
            labels |= zip(batch_rows, shift_labels[shift_labels != IGNORE_INDEX].split(counts), strict=True)
            if len(states) < len(rows):
                yield None
        yield torch.cat([states[row] for row in rows]), torch.cat([labels[row] for row in rows])


def _fill_cache(
    trainer, name: str, data_sha256: str, run: _TeacherRun, hidden_size: int, parent: Path
) -> HiddenStateCache:
    """The cache of a dataset: what is there of it is checked, what is missing is written."""
    accelerator, args = trainer.accelerator, trainer.args
    description = {
        "format": _FORMAT,
        "teacher": trainer.teacher.sha256,
        "data": data_sha256,
        "padding_free": trainer.padding_free,
        "mixed_precision": accelerator.mixed_precision,
        "hidden_size": hidden_size,
        "dtype": args.teacher_cache_dtype,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    folder = parent / key[:32]
    if accelerator.is_main_process and read_num_tokens(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_layout(folder, run.count_tokens(), description)
    accelerator.wait_for_everyone()
    num_tokens = read_num_tokens(folder)
    if num_tokens is None:
        raise OSError(
            f"Process {accelerator.process_index} does not find {folder}, which the main process has made: "
            "`teacher_cache_dir` must be on a disk that all machines share."
        )
    cache = HiddenStateCache(folder, num_tokens, hidden_size, getattr(torch, args.teacher_cache_dtype))
    missing = _check(cache, accelerator)
    accelerator.print(
        f"The teacher's answers to `{name}`: {int(num_tokens.sum()):,} label tokens x {hidden_size} x "
        f"{cache.dtype.itemsize} bytes, {format_bytes(cache.num_bytes)} in {folder}; {len(missing)} of "
        f"{len(cache.chunks)} chunks are to be made."
    )
    cache.check_space()
    _write_missing(cache, missing, run, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cache.remove_leftovers()
    return cache


def _check(cache: HiddenStateCache, accelerator) -> list[int]:
    """The chunks that are missing; the others are read once, each by one of the processes."""
    missing = gather_object([cache.missing()])[0]  # as the main process sees it: another job may be writing too
    there = sorted(set(range(len(cache.chunks))) - set(missing))
    share = there[accelerator.process_index :: accelerator.num_processes]
    damage = gather_object([why for chunk in share if (why := cache.find_damage(chunk))])
    if damage:
        raise ValueError(f"The teacher's cache cannot be used: {'; '.join(damage)}. Delete the file: it is made anew.")
    return missing


def _write_missing(cache: HiddenStateCache, missing: list[int], run: _TeacherRun, accelerator) -> None:
    share = missing[accelerator.process_index :: accelerator.num_processes]
    num_batches = sum(len(run.batches(cache.chunks[chunk])) for chunk in share)
    most = max(gather_object([num_batches]))
    disable = True if not accelerator.is_main_process else None
    with tqdm(total=most, desc="Running the teacher", disable=disable) as progress:
        for chunk in share:
            for answer in run.answer(cache.chunks[chunk], cache.num_tokens):
                if answer is not None:
                    cache.write(chunk, *answer)
                progress.update()
        if accelerator.distributed_type == DistributedType.FSDP:
            for _ in range(most - num_batches):  # a forward gathers the shards of all processes
                run.targets([0])
