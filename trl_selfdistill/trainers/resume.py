# SPDX-License-Identifier: Apache-2.0
"""Exact resuming: a run goes on from a complete checkpoint, with the data that it was started with, or not at all."""

import hashlib
import json
import os
from pathlib import Path

from datasets import Dataset, IterableDataset, LargeList, List
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files import read_json, write_json


logger = logging.get_logger(__name__)

RESUME_FILE = "resume.json"  # in each checkpoint, with `describe_run` of the run that wrote it
_COLUMNS = ("input_ids", "labels", "seq_lengths")  # of a tokenized dataset, those that reach the model


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint in `folder` that was written to its end, or `None`. A warning names later, broken ones."""
    found = [(path.name.partition("-")[2], path) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/")]
    for _, checkpoint in sorted(((int(step), path) for step, path in found if step.isdecimal()), reverse=True):
        if _is_complete(checkpoint):
            return str(checkpoint)
        logger.warning(f"{checkpoint} is incomplete and is passed over: it has no readable {TRAINER_STATE_NAME}.")
    return None


def _is_complete(checkpoint: str | os.PathLike) -> bool:
    try:  # `Trainer` writes it last
        read_json(Path(checkpoint) / TRAINER_STATE_NAME)
    except (FileNotFoundError, ValueError):
        return False
    return True


class ExactResumeMixin:
    """
    Makes a trainer resume exactly or raise an error. `resume_from_checkpoint=True` takes the last complete checkpoint.
    Each holds [`describe_run`], which [`check_run`] compares with the present run before anything is loaded.
    """

    resumed_from: Path | None = None  # the checkpoint of this `train()` call
    _training_data: dict | None = None

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args, **kwargs):
        if str(resume_from_checkpoint).lower() == "true":  # a command line gives a text
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No valid checkpoint found in {self.args.output_dir}: train from the start.")
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._training_data = None
        if self.resumed_from is not None:
            if not _is_complete(self.resumed_from):
                broken = f"valid checkpoint at {self.resumed_from}: it has no readable {TRAINER_STATE_NAME}"
                raise ValueError(f"Can't find a {broken}. `resume_from_checkpoint=True` takes the last complete one.")
            record = self.resumed_from / RESUME_FILE  # a plain `SFTTrainer` writes none
            self.check_run(read_json(record) if record.is_file() else {}, self.resumed_from)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def describe_run(self) -> dict:
        """What a resumed run must have in common with this one, as JSON values: `training_data`."""
        if self._training_data is None:  # once a run, as it reads every token
            self._training_data = describe_dataset(self.train_dataset)
        return {"training_data": self._training_data}

    def check_run(self, saved: dict, checkpoint: Path) -> None:
        """
        Raises `ValueError` if this run would not continue `checkpoint`, whose [`describe_run`] is `saved`, empty for
        a plain `SFTTrainer`. With `ignore_data_skip=True` the training data may be others.
        """
        expected = saved.get("training_data")
        if self.args.ignore_data_skip or expected is None:
            return
        found = ExactResumeMixin.describe_run(self)["training_data"]
        if found is not None and found != expected:
            raise ValueError(
                f"`train_dataset` is not the one that {checkpoint} was trained on: got {found}, not {expected}. "
                "Resume with the same rows, tokenized in the same way, or set `ignore_data_skip=True` to use others."
            )

    def on_save_checkpoint(self, folder: Path) -> None:
        super().on_save_checkpoint(folder)
        # One of an earlier run is incomplete while its files are replaced, and its weights may have other names
        for stale in (TRAINER_STATE_NAME, "adapter_config.json", "*.safetensors*"):
            for file in folder.glob(stale):
                file.unlink()
        write_json(folder / RESUME_FILE, self.describe_run())


def describe_dataset(dataset: Dataset | IterableDataset | None) -> dict | None:
    """
    The number of rows (`num_rows`) and the SHA-256 of their tokens and labels in order (`sha256`; `None` where rows
    become tokens in a batch). `None` for a stream, which is read only once.
    """
    if not isinstance(dataset, Dataset):
        return None
    # Other columns may happen to have these names
    lists = {name: kind.feature for name, kind in dataset.features.items() if isinstance(kind, List | LargeList)}
    columns = [name for name in _COLUMNS if "int" in str(getattr(lists.get(name), "dtype", None))]
    if "input_ids" not in columns:
        return {"num_rows": len(dataset), "sha256": None}
    digest = hashlib.sha256(json.dumps(columns).encode())
    # The content, not the dataset's fingerprint, which changes when the same rows are tokenized again
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            rows = table.column(name).combine_chunks()
            for values in (rows.value_lengths(), rows.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return {"num_rows": len(dataset), "sha256": digest.hexdigest()}
