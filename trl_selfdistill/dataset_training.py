# SPDX-License-Identifier: Apache-2.0
"""Training on a user's own dataset with the steps of `trl sft`: load, train, save, push if asked."""

import os
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import Trainer, TrainingArguments

from .models import load_model_and_tokenizer
from .study_arguments import AdapterArguments, TrainingDataArguments


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def train_on_dataset(
    trainer_class: type[Trainer],
    config: TrainingArguments,
    data: TrainingDataArguments,
    adapter: AdapterArguments | None = None,
) -> Path:
    """
    Trains on `data.dataset_name` and leaves the model with its card in `config.output_dir`, which is returned. It
    resumes where `config.resume_from_checkpoint` says.

    Args:
        trainer_class (`type[Trainer]`): `SFTTrainer` or a subclass of it.
        config ([`~transformers.TrainingArguments`]): Its configuration.
        data ([`~trl_selfdistill.study_arguments.TrainingDataArguments`]): The model and the dataset.
        adapter ([`~trl_selfdistill.study_arguments.AdapterArguments`], *optional*): Whether to train an adapter.

    Raises:
        ValueError: If the dataset has not the splits asked for.
    """
    dataset = load_splits(data.dataset_name, data.dataset_config)
    model, options = data.model_name_or_path, {}
    if adapter is not None and adapter.use_peft:
        model, options["processing_class"] = load_model_and_tokenizer(model, load_in_4bit=adapter.load_in_4bit)
        if not hasattr(model, "peft_config"):
            options["peft_config"] = adapter.peft_config()
    trainer = trainer_class(
        model,
        config,
        train_dataset=_split(dataset, "dataset_train_split", data),
        eval_dataset=_split(dataset, "dataset_test_split", data) if config.eval_strategy != "no" else None,
        **options,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)  # writes the card, too
    else:
        trainer.create_model_card(Path(config.output_dir).name)
    return Path(config.output_dir)


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


def _split(dataset: DatasetDict, argument: str, data: TrainingDataArguments) -> Dataset:
    name = getattr(data, argument)
    if name not in dataset:
        raise ValueError(f"`{argument}` is {name!r}, and {data.dataset_name} has the splits {', '.join(dataset)}.")
    return dataset[name]
