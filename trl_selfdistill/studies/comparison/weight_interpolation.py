# SPDX-License-Identifier: Apache-2.0
"""Weights between two models (WiSE-FT, arXiv 2109.01903): what fine-tuning changed, taken back in part."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset

from ..fact_accuracy import AccuracyRecord, answered_correctly, read_records, write_records
from ..models import load_model_and_tokenizer
from ..stage import model_identity, run_stage


_RECORDS_FILE = "accuracy.jsonl"


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model by name, as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def interpolated(model: torch.nn.Module, start: dict[str, torch.Tensor], mixing_weight: float) -> Iterator[None]:
    """
    The model has the weights `(1 - mixing_weight) * start + mixing_weight * own` within the context, its own after.

    Args:
        model (`torch.nn.Module`): The fine-tuned model.
        start (`dict[str, torch.Tensor]`): Its weights before, of [`copy_weights`].
        mixing_weight (`float`): 0 for the start, 1 for the model as it is.

    Raises:
        `ValueError`: If `mixing_weight` is not in [0, 1].
    """
    if not 0 <= mixing_weight <= 1:
        raise ValueError(f"`mixing_weight` must be in [0, 1], got {mixing_weight}.")
    own = copy_weights(model)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.lerp(start[name].to(parameter.device), own[name], mixing_weight))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(own[name])


def interpolation_stage(
    start: str,
    end: Path,
    mixing_weights: list[float],
    fact_sets: dict[str, Dataset],
    inputs: Iterable[str | os.PathLike],
    folder: Path,
    bf16: bool = False,
) -> list[AccuracyRecord]:
    """
    Asks the facts with weights between those of two models, and keeps the answers in `folder/accuracy.jsonl`.

    Args:
        start (`str`): Hub id or folder of the model that was fine-tuned.
        end (`Path`): Folder of what it became.
        mixing_weights (`list[float]`): Shares of the end's weights, in [0, 1].
        fact_sets (`dict[str, Dataset]`): The facts by name.
        inputs (`Iterable[str | os.PathLike]`): Files and folders that the end and the facts come from.
        folder (`Path`): Where the stage goes.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to ask under bf16 autocast.

    Returns:
        `list[AccuracyRecord]`: One for each mixing weight, which is its `epoch`.
    """

    def work(partial: Path) -> None:
        start_weights = copy_weights(load_model_and_tokenizer(start)[0])
        model, tokenizer = load_model_and_tokenizer(end)
        model.to(PartialState().device)
        records = []
        for weight in mixing_weights:
            with (
                interpolated(model, start_weights, weight),
                torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
            ):
                correct = {
                    name: answered_correctly(model, tokenizer, facts, in_parallel=True)
                    for name, facts in fact_sets.items()
                }
            records.append(AccuracyRecord(0, weight, correct))
        if PartialState().is_main_process:
            write_records(partial / _RECORDS_FILE, records)

    name, start_inputs = model_identity(start)
    arguments = {"mixing_weights": mixing_weights, "bf16": bf16, **name}
    run_stage(folder, arguments, [*inputs, *start_inputs], work, every_process=True)
    return read_records(folder / _RECORDS_FILE)
