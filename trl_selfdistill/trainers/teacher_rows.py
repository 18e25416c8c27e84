# SPDX-License-Identifier: Apache-2.0
"""Which rows of the prepared dataset a batch is made of: a column of row numbers that survives shuffling, sampling and
collation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset


TEACHER_ROW = "teacher_row"  # the dataset's column
TEACHER_ROWS = "teacher_rows"  # the batch's tensor, of shape (rows of the batch,)


def number_rows(dataset: Dataset, first: int) -> Dataset:
    """The dataset with the column `teacher_row`: `first`, `first + 1` ..."""
    if TEACHER_ROW in dataset.column_names:  # of an earlier trainer with the same prepared dataset
        dataset = dataset.remove_columns(TEACHER_ROW)
    return dataset.add_column(TEACHER_ROW, list(range(first, first + len(dataset))))


class TeacherRowCollator:
    """
    Adds to a collator's batch the `teacher_rows` that it was made of, as far as its examples are numbered.

    Args:
        collator (`Callable`): The collator of the model's own inputs.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [example[TEACHER_ROW] for example in examples if TEACHER_ROW in example]
        batch = self.collator([{k: v for k, v in example.items() if k != TEACHER_ROW} for example in examples])
        if rows:
            batch[TEACHER_ROWS] = torch.tensor(rows)
        return batch
