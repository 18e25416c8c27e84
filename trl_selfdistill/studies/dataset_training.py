# SPDX-License-Identifier: Apache-2.0
"""What the training scripts do: train on a mix of facts, or on a user's own dataset as `trl sft` does."""

from pathlib import Path

from datasets import Dataset
from transformers import Trainer
from trl import ModelConfig, SFTConfig, get_peft_config

from ..trainers.frozen_groups_sft_trainer import check_rows
from .arguments import TrainingDataArguments
from .models import check_model_is_there, load_model_and_tokenizer, loading_options
from .runs import StudySetup, Variant, train_variant
from .stage import RUN_FILE
from .stages import facts_of_mix
from .tables import load_table


def train_as_asked(
    trainer_class: type[Trainer], config: SFTConfig, data: TrainingDataArguments, model_args: ModelConfig
) -> Path:
    """
    Trains on `data.mix`, resuming by itself, or on `data.dataset_name`, resuming from `config.resume_from_checkpoint`.
    Leaves the model, or the adapter that `model_args` ask for, and its card in `config.output_dir`, which is returned.
    """
    folder = Path(config.output_dir)
    if data.mix is not None:
        setup = StudySetup(model_args.model_name_or_path, Path(data.mix), config, model_args)
        variant = Variant(folder.name, folder.name, trainer_class, about={"splits": data.splits})
        train_variant(variant, setup, folder, lambda partial: facts_of_mix(setup.mix, tuple(data.splits)))
        return folder

    def load(split: str) -> Dataset:
        table = load_table(data.dataset_name, split, data.dataset_config)
        source = f"`dataset_name={data.dataset_name}` (split {split!r})"
        check_rows(config, source, table)
        for name in {"prompt", "completion", "text", "messages"} & {*table.column_names}:
            if (row := table.data.column(name).is_null().index(True).as_py()) >= 0:
                raise ValueError(f"{source}, row {row + 1}: there is no {name}; fill it in or leave the row out")
            value = table[0][name]
            has_turns = isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)
            if value == [] or not (has_turns if name == "messages" else has_turns or isinstance(value, str)):
                raise ValueError(f"{source}: {name} is {value!r}; give text, or a list of `role` and `content`")
        return table

    model, options = model_args.model_name_or_path, {"peft_config": get_peft_config(model_args)}
    if (folder / RUN_FILE).is_file() or folder.resolve() == Path(model).resolve():
        raise ValueError(f"`output_dir`: {folder} is the model to train, or a stage's. Take another folder.")
    check_model_is_there(model, model_args.model_revision)
    if (Path(model) / "adapter_config.json").is_file():  # an adapter that is trained further
        init_kwargs, config.model_init_kwargs = config.model_init_kwargs, None
        model, tokenizer = load_model_and_tokenizer(model, model_args, config.trust_remote_code, init_kwargs)
        options = {"processing_class": tokenizer}
    else:  # SFTTrainer loads it: it knows the class, be it a vision-language model, and its processor
        config.model_init_kwargs = loading_options(model_args) | (config.model_init_kwargs or {})
    trainer = trainer_class(
        model,
        config,
        train_dataset=load(data.dataset_train_split),
        eval_dataset=load(data.dataset_test_split) if config.eval_strategy != "no" else None,
        **options,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)  # writes the card, too
    else:
        trainer.create_model_card(folder.name, data.dataset_name)
    return folder
