# SPDX-License-Identifier: Apache-2.0
"""Training on a user's own dataset with the steps of `trl sft`: load, train, save, push if asked."""

from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import Trainer, TrainingArguments

from ..trainers.dataset_files import load_splits
from .arguments import AdapterArguments, TrainingDataArguments
from .models import load_model_and_tokenizer


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
        data ([`~trl_selfdistill.studies.arguments.TrainingDataArguments`]): The model and the dataset.
        adapter ([`~trl_selfdistill.studies.arguments.AdapterArguments`], *optional*): Whether to train an adapter.

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


def _split(dataset: DatasetDict, argument: str, data: TrainingDataArguments) -> Dataset:
    name = getattr(data, argument)
    if name not in dataset:
        raise ValueError(f"`{argument}` is {name!r}, and {data.dataset_name} has the splits {', '.join(dataset)}.")
    return dataset[name]
