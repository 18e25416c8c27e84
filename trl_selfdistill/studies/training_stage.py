# SPDX-License-Identifier: Apache-2.0
"""The stage that trains a model on a mix: a checkpoint, its accuracy over the epochs, and how it was trained."""

import json
import logging
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

from datasets import concatenate_datasets
from transformers import Trainer, TrainingArguments

from ..trainers.checkpoints import last_complete_checkpoint
from ..trainers.trainer_card import count_categories, describe_training
from .arguments import AdapterArguments
from .card import write_model_card
from .fact_accuracy import FactAccuracyCallback, read_records, write_records
from .models import EMBEDDED_MODEL, EMBEDDED_MODEL_ID, load_model_and_tokenizer
from .report import BASE_RECORDS_FILE, load_arms
from .run_cost import RunCost
from .stage import model_identity, run_arguments, run_stage
from .training_mix import load_mix


logger = logging.getLogger(__name__)

RECORDS_FILE = "accuracy.jsonl"
TRAINING_FILE = "training.json"
# What does not change the weights that a training run ends with
_WITHOUT_EFFECT = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "log_level",
    "hub_token",
    "project",
    "teacher_cache_dir",
}


def train_stage(
    trainer_class: type[Trainer],
    config: TrainingArguments,
    model: str,
    mix: Path,
    splits: tuple[str, ...],
    folder: Path,
    records_from: Path | None = None,
    adapter: AdapterArguments | None = None,
) -> Path:
    """
    Trains `model` on the mix's `splits`, evaluating every split each epoch; a killed run goes on from its last
    checkpoint.

    Args:
        trainer_class (`type[Trainer]`):
            `SFTTrainer` or a subclass of it.
        config ([`~transformers.TrainingArguments`]):
            Its configuration. `output_dir` is set to `folder`.
        model (`str`):
            Hub id or folder of the model to start from.
        mix (`Path`):
            Folder of [`~trl_selfdistill.studies.stages.mix_stage`].
        splits (`tuple[str, ...]`):
            Splits to train on.
        folder (`Path`):
            Where the checkpoint goes, with `accuracy.jsonl` and `training.json`.
        records_from (`Path`, *optional*):
            Folder of an earlier training stage that `model` comes from; its last evaluation is the first of this one.
        adapter ([`~trl_selfdistill.studies.arguments.AdapterArguments`], *optional*):
            Whether to train an adapter, and on 4-bit weights. A `model` that is an adapter itself is trained further.

    Raises:
        ValueError: If the configuration asks for a push, which would publish unfinished work.
    """
    if config.push_to_hub:
        raise ValueError(
            "`push_to_hub` is not for stages, whose folder is complete at the end only. Leave it unset, and push what "
            f"is finished: python scripts/publish_model.py --checkpoints {folder} --repo_id your-name/my-model"
        )
    folder = Path(folder)
    name, inputs = model_identity(model)
    arguments = {"trainer": trainer_class.__name__, "splits": list(splits), "config": effective_config(config), **name}
    if adapter is not None and adapter.use_peft:
        arguments["adapter"] = asdict(adapter)
    rehearsal = getattr(config, "rehearsal_dataset_name", None)
    if rehearsal is not None and Path(rehearsal).exists():
        inputs = [*inputs, rehearsal]

    def work(partial: Path) -> None:
        facts = load_mix(mix)
        trainer, seconds = _train(trainer_class, config, model, facts, splits, partial, records_from, adapter)
        if trainer.is_world_process_zero():
            about = {"origin": _origin(model), "mix": run_arguments(mix), "splits": list(splits)}
            about["composition"] = count_categories({name: facts[name] for name in splits})
            _write_training_file(trainer, partial, {**about, "seconds_per_step": seconds})
            [arm] = load_arms([partial])
            arm = arm._replace(name=folder.name)
            write_model_card(arm, [arm], partial)  # in place of TRL's draft; `report_stage` adds the other arms
            for path in partial.glob("checkpoint-*"):  # they hold the optimizer; the model is saved
                shutil.rmtree(path)

    arguments = json.loads(json.dumps(arguments, default=str))
    return run_stage(folder, arguments, [mix, *inputs], work, every_process=True)


def copy_config(config_class: type[TrainingArguments], config: TrainingArguments, **changes) -> TrainingArguments:
    """The values of `config` that `config_class` has, with `changes`."""
    values = {f.name: getattr(config, f.name) for f in fields(config_class) if f.init and hasattr(config, f.name)}
    return config_class(**{**values, **changes})


def effective_config(config: TrainingArguments) -> dict:
    """The settings of a configuration that change the weights that a run ends with."""
    return {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_EFFECT}


def _train(
    trainer_class,
    config,
    model,
    mix,
    splits,
    folder: Path,
    records_from: Path | None,
    adapter: AdapterArguments | None,
) -> tuple[Trainer, float]:
    config.output_dir = os.fspath(folder)
    adapter = adapter or AdapterArguments()
    language_model, tokenizer = load_model_and_tokenizer(model, load_in_4bit=adapter.load_in_4bit)
    peft_config = None if hasattr(language_model, "peft_config") else adapter.peft_config()
    train_dataset = concatenate_datasets([mix[name].select_columns(["prompt", "completion"]) for name in splits])
    trainer = trainer_class(
        language_model, config, train_dataset=train_dataset, processing_class=tokenizer, peft_config=peft_config
    )
    records_file, cost = folder / RECORDS_FILE, RunCost()
    checkpoint = last_complete_checkpoint(folder)
    if records_from is not None and checkpoint is None and trainer.is_world_process_zero():
        write_records(records_file, [read_records(records_from / RECORDS_FILE)[-1]._replace(step=0, epoch=0.0)])
        first = records_from / BASE_RECORDS_FILE
        first = first if first.is_file() else records_from / RECORDS_FILE
        write_records(folder / BASE_RECORDS_FILE, read_records(first)[:1])
    trainer.accelerator.wait_for_everyone()
    trainer.add_callback(FactAccuracyCallback(trainer, mix, records_file))
    trainer.add_callback(cost)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return trainer, cost.median_seconds()


def _write_training_file(trainer: Trainer, folder: Path, about: dict) -> None:
    """`training.json`: what the report and the model card say of a run, beside its accuracy."""
    training = {**describe_training(trainer), **about, "log_history": trainer.state.log_history}
    text = json.dumps(training, indent=2, ensure_ascii=False, default=str)
    (folder / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")


def _origin(model: str) -> str | None:
    """The Hub id that a chain of stages started from; `None` if it was a local folder."""
    if not Path(model).is_dir():
        return model
    earlier = Path(model) / TRAINING_FILE
    if earlier.is_file():
        return json.loads(earlier.read_text(encoding="utf-8"))["origin"]
    return EMBEDDED_MODEL_ID if run_arguments(model).get("model") == EMBEDDED_MODEL else None
