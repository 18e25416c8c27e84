# SPDX-License-Identifier: Apache-2.0
"""A training run made for its measurements: accuracy, drift, cost. Its weights are kept only if `finish` does so."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..trainers.checkpoints import last_complete_checkpoint
from ..trainers.sft_internals import label_positions_only
from ..trainers.trainer_card import describe_training
from .fact_accuracy import AccuracyRecord, FactAccuracyCallback, read_records
from .models import load_model_and_tokenizer
from .run_cost import RunCost
from .stage import model_identity, run_stage
from .training_stage import effective_config


RECORDS_FILE = "accuracy.jsonl"
TRAINING_FILE = "training.json"
DRIFT_FILE = "drift.jsonl"


class Experiment(NamedTuple):
    """
    One run.

    Args:
        folder (`Path`): Where its measurements go.
        trainer_class (`type[Trainer]`): `SFTTrainer` or a subclass.
        config ([`~transformers.TrainingArguments`]): Its configuration; `output_dir` is set to the folder.
        model (`str`): Hub id or folder of the model to start from.
        data (`Callable[[Path], tuple[Dataset, dict[str, Dataset]]]`):
            Makes the training data, and the facts to ask before and after, by name. Called if the run is to be made,
            with its folder: what is written there under a name with `_` in front is deleted in the end.
        inputs (`tuple[str | Path, ...]`): Files and folders that the two come from.
        about (`dict`): What else the run depends on, as JSON values.
        trainer_arguments (`dict`, *optional*): Further arguments of the trainer, such as `peft_config`.
        callbacks (`Callable[[Trainer, Path], list[TrainerCallback]]`, *optional*):
            Makes further callbacks, and may change the trainer before training.
        finish (`Callable[[Trainer, Path], None]`, *optional*): Called after training, with the folder to write into.
        each_epoch (`bool`, *optional*, defaults to `False`): Whether the facts are asked after each epoch, too.
    """

    folder: Path
    trainer_class: type[Trainer]
    config: TrainingArguments
    model: str
    data: Callable[[Path], tuple[Dataset, dict[str, Dataset]]]
    inputs: Iterable[str | os.PathLike]
    about: dict
    trainer_arguments: dict = {}
    callbacks: Callable[[Trainer, Path], list[TrainerCallback]] | None = None
    finish: Callable[[Trainer, Path], None] | None = None
    each_epoch: bool = False


class ExperimentResult(NamedTuple):
    """
    What a run left.

    Args:
        name (`str`): Its folder's name.
        records (`list[AccuracyRecord]`): From before the first step to the end.
        training (`dict`): Content of `training.json`: cost, steps, the trainer's log and `about`.
        drift (`list[dict]`): Lines of `drift.jsonl`, empty without a probe.
    """

    name: str
    records: list[AccuracyRecord]
    training: dict
    drift: list[dict]


def run_experiment(experiment: Experiment) -> ExperimentResult:
    """
    Makes a run unless its folder has it already; a killed one goes on from its last complete checkpoint.

    The folder holds `accuracy.jsonl` ([`~trl_selfdistill.studies.fact_accuracy.AccuracyRecord`]), `training.json`,
    and what callbacks and `finish` write.
    """
    name, inputs = model_identity(experiment.model)
    arguments = {
        "trainer": experiment.trainer_class.__name__,
        "config": effective_config(experiment.config),
        "about": experiment.about,
        "each_epoch": experiment.each_epoch,
        **name,
    }
    arguments = json.loads(json.dumps(arguments, default=str))
    folder = run_stage(
        experiment.folder,
        arguments,
        [*experiment.inputs, *inputs],
        lambda partial: _train(experiment, partial),
        every_process=True,
    )
    result = read_experiment(folder)
    if result.records[-1].step != result.training["steps"]:
        raise ValueError(
            f"{folder}: its last evaluation is of step {result.records[-1].step} of {result.training['steps']}, as an "
            "earlier version left it after an interruption. Delete the folder, and the run is made again."
        )
    return result


def read_experiment(folder: str | os.PathLike) -> ExperimentResult:
    """Reads what a finished run left in its folder."""
    folder = Path(folder)
    drift = folder / DRIFT_FILE
    return ExperimentResult(
        folder.name,
        read_records(folder / RECORDS_FILE),
        json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8")),
        [json.loads(line) for line in drift.read_text(encoding="utf-8").splitlines()] if drift.is_file() else [],
    )


def _train(experiment: Experiment, folder: Path) -> None:
    config = experiment.config
    config.output_dir = os.fspath(folder)
    model, tokenizer = load_model_and_tokenizer(experiment.model)
    train_dataset, fact_sets = experiment.data(folder)
    trainer = experiment.trainer_class(
        model,
        config,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        **experiment.trainer_arguments,
    )
    cost = RunCost()
    records = folder / RECORDS_FILE
    trainer.add_callback(FactAccuracyCallback(trainer, fact_sets, records, each_epoch=experiment.each_epoch))
    for callback in experiment.callbacks(trainer, folder) if experiment.callbacks is not None else ():
        trainer.add_callback(callback)
    trainer.add_callback(cost)
    with label_positions_only():  # most positions of a fact are its question
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    if experiment.finish is not None:
        experiment.finish(trainer, folder)
    if trainer.is_world_process_zero():
        training = {**describe_training(trainer), **cost.summary(), "about": experiment.about}
        training |= {"steps": trainer.state.global_step, "log_history": trainer.state.log_history}
        training["rows_per_step"] = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        text = json.dumps(training, indent=2, ensure_ascii=False, default=str)
        (folder / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")
        # The weights, those of the teacher and the start too, and the rows
        for path in [*folder.glob("checkpoint-*"), *folder.glob("_*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / "README.md").unlink(missing_ok=True)  # the card of a model that is not kept
