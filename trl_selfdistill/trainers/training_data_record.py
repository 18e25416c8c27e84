# SPDX-License-Identifier: Apache-2.0
"""What a run was trained on, kept in each checkpoint: a resumed run skips the batches that it has seen, which are
those only in the same dataset."""

import hashlib
import json
from pathlib import Path

from datasets import Dataset, IterableDataset


TRAINING_DATA_FILE = "training_data.json"
# Of a prepared dataset, what reaches the model
_COLUMNS = ("input_ids", "labels", "seq_lengths")


def describe_training_data(dataset: Dataset | IterableDataset) -> dict | None:
    """
    The number of rows, and the SHA-256 of the tokens and labels in their order; `None` for a stream, which is read
    once. Where rows become tokens only in a batch (`skip_prepare_dataset`, images), the hash is `None`.
    """
    if not isinstance(dataset, Dataset):
        return None
    columns = [name for name in _COLUMNS if name in dataset.column_names]
    return {"num_rows": len(dataset), "sha256": _hash_rows(dataset, columns) if "input_ids" in columns else None}


def _hash_rows(dataset: Dataset, columns: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(columns).encode())
    # The content, not the dataset's fingerprint, which changes when the same rows are tokenised anew
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            rows = table.column(name).combine_chunks()
            for values in (rows.value_lengths(), rows.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return digest.hexdigest()


def write_training_data(description: dict | None, checkpoint: Path) -> None:
    """Writes a [`describe_training_data`] into a checkpoint as `training_data.json`; nothing for a stream."""
    if description is not None:
        text = json.dumps(description, indent=2) + "\n"
        (checkpoint / TRAINING_DATA_FILE).write_text(text, encoding="utf-8")


def check_training_data(description: dict | None, checkpoint: Path) -> None:
    """
    Compares the dataset of this run with that of the checkpoint that it resumes from. A checkpoint that does not say
    (of `SFTTrainer`, or of a stream) is not compared.

    Raises:
        ValueError: If it is another one.
    """
    file = checkpoint / TRAINING_DATA_FILE
    if not file.is_file() or description is None:
        return
    expected = json.loads(file.read_text(encoding="utf-8"))
    if description != expected:
        raise ValueError(
            f"`train_dataset` is not the one that {checkpoint} was trained on: after tokenisation it has "
            f"{_in_words(description)}, and {TRAINING_DATA_FILE} has {_in_words(expected)}. Its rows, the tokenizer, "
            "the chat template, `max_length`, packing or the kind of loss mask changed. Resume with the same data, "
            "or, to go on with other data on purpose, set `ignore_data_skip=True`."
        )


def _in_words(description: dict) -> str:
    return f"{description['num_rows']} rows with SHA-256 {description['sha256']}"
