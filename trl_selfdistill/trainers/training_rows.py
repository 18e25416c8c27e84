# SPDX-License-Identifier: Apache-2.0
"""The rows that TRL's `SFTTrainer` can train on, checked before a model is loaded."""

from typing import Any

from datasets import Dataset
from trl import SFTConfig


def check_rows(args: SFTConfig, name: str, data: Any) -> None:
    """
    A `ValueError` if `data`, which messages call `name`, has no rows, or columns of none of
    [TRL's formats](https://huggingface.co/docs/trl/dataset_formats). Streams may leave both open.
    """
    if isinstance(data, Dataset) and not len(data):
        raise ValueError(f"{name} has no rows: add some.")
    columns, text = {*(getattr(data, "column_names", None) or ())}, args.dataset_text_field
    is_prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset") or columns & {"input_ids", "image", "images"}
    # With a prompt, TRL asks for a completion, whatever else there is
    accepted = {"completion"} if "prompt" in columns else {"messages", "conversations", text}
    if columns and not is_prepared and not columns & accepted:
        found = ", ".join(sorted(columns))
        raise ValueError(f"{name} has the columns {found}: give prompt and completion, messages, or {text}.")
