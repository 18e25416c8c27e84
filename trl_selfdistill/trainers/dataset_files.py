# SPDX-License-Identifier: Apache-2.0
"""Datasets by the name that a user gives: a file, a folder, or one on the Hub."""

import os
from pathlib import Path

from datasets import DatasetDict, load_dataset, load_from_disk


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_splits(name_or_path: str, config: str | None = None) -> DatasetDict:
    """
    The splits of a dataset: of a JSON, JSONL, CSV or Parquet file (its only one is `train`), of a folder written by
    `save_to_disk`, or of whatever `datasets.load_dataset` takes.
    """
    path = Path(name_or_path)
    if path.is_file() and path.suffix.lower() in _BUILDERS:
        return load_dataset(_BUILDERS[path.suffix.lower()], data_files=os.fspath(path))
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        dataset = load_from_disk(path)
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
    return load_dataset(name_or_path, name=config)
