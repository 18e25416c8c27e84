# SPDX-License-Identifier: Apache-2.0
"""The one way in which studies train: a variant, in a stage folder of its own, asked its facts and timed."""

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from ..files import warn_without, write_json
from ..hub.model_card import CARD_FILE
from ..trainers import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer, SelfDistillSFTConfig, SelfDistillSFTTrainer
from ..trainers.frozen_groups_sft_config import copy_config
from ..trainers.resume import last_complete_checkpoint
from ..trainers.sft_internals import label_positions_only
from ..trainers.trainer_card import count_categories, describe_training
from .arguments import rows_per_step
from .card import write_model_card
from .fact_accuracy import FactAccuracyCallback, read_records, write_records
from .models import adapter_arguments, load_model_and_tokenizer, model_identity, model_to_ask
from .results import BASE_FILE, RECORDS_FILE, TRAINING_FILE, VariantResult, read_result
from .stage import run_arguments, run_stage


_CONFIGS = {SelfDistillSFTTrainer: SelfDistillSFTConfig, FrozenGroupsSFTTrainer: FrozenGroupsSFTConfig}
# What does not change the weights that a training run ends with
_WITHOUT_EFFECT = {"output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "log_level", "hub_token"}
_WITHOUT_EFFECT |= {"project", "teacher_cache_dir", "use_cpu"}  # a study may be moved to another device
_INPUTS = ("anchor_dataset_name", "teacher_model_name_or_path")  # that count by their content, where they are local
_FORMER = {"teacher_model_revision": None}  # of `SelfDistillSFTConfig`, by which older runs are known


class Variant(NamedTuple):
    """
    A way to train, as what it changes in plain SFT.

    Args:
        name (`str`): Names its folders.
        label (`str`): Its name for readers.
        trainer_class (`type[Trainer]`, *optional*, defaults to `SFTTrainer`): `SFTTrainer` or a subclass.
        changes (`dict`, *optional*): What it sets in the training configuration.
        rows (`Callable`, *optional*): `rows(known, new, num_rows, generator)`, its training rows of `prompt` and
            `completion`, by default all. The run's steps take `num_rows` of them.
        trainer_arguments (`dict`, *optional*): Others; `peft_config` may be `f(model, tokenizer, known)`.
        prepare (`Callable`, *optional*): `prepare(trainer, folder)` adds callbacks before training.
        about (`dict`, *optional*): What else of its settings decides the result, as JSON values.
        group (`str`, *optional*): The kind of remedy that it is.
        steps, rate (`float`, *optional*, defaults to `1.0`): Multiply the steps, and the learning rate.
    """

    name: str
    label: str
    trainer_class: type[Trainer] = SFTTrainer
    changes: dict[str, Any] = {}
    rows: Callable[[Dataset, Dataset, int, random.Random], Dataset] | None = None
    trainer_arguments: dict[str, Any] = {}
    prepare: Callable[[Trainer, Path], None] | None = None
    about: dict[str, Any] = {}
    group: str = ""
    steps: float = 1.0
    rate: float = 1.0

    @property
    def title(self) -> str:
        """Its label, and how many steps it makes."""
        return self.label if self.steps == 1 else f"{self.label}, {self.steps:g} times the steps"


class StudySetup(NamedTuple):
    """
    What all runs of a study share.

    Args:
        start (`str`): Hub id or folder of the model that every run starts from, and that is the teacher.
        mix (`Path`): Folder of the splits `known`, `new` and `heldout`.
        config (`TrainingArguments`): The training of every run.
        model_args ([`~trl.ModelConfig`], *optional*): How the model is loaded, and whether an adapter is trained.
        annotated (`Path`, *optional*): The facts that the mix was chosen from.
        label (`str`, *optional*): The model's name for readers.
        base (`Path`, *optional*): File of what it answers untrained, asked with exemplars.
    """

    start: str
    mix: Path
    config: TrainingArguments
    model_args: ModelConfig = ModelConfig()
    annotated: Path | None = None
    label: str = ""
    base: Path | None = None

    def load(self, model: str | Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model, by default the one that every run starts from, with its tokenizer."""
        options = self.config.trust_remote_code, self.config.model_init_kwargs
        return load_model_and_tokenizer(model or self.start, self.model_args, *options)

    def to_ask(self) -> AbstractContextManager[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The model that every run starts from, as [`~trl_selfdistill.studies.models.model_to_ask`] gives it."""
        options = self.config.bf16, self.config.trust_remote_code, self.config.model_init_kwargs
        return model_to_ask(self.start, self.model_args, *options)

    @property
    def precision(self) -> str:
        """In which precision the first stage was trained, as a line of a report."""
        return f"Precision: {read_result(Path(self.start)).training['precision']}.\n"


class StepTimes(TrainerCallback):
    """Times each optimizer step, without evaluation and saving."""

    def __init__(self):
        self.seconds, self.costs = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self._clock = time.process_time if args.device.type == "cpu" else time.perf_counter
        self._ended = self._clock()

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)
        self.costs.append(self._clock() - self._ended)  # with drawing its rows, but nothing done once
        self._ended = self._clock()

    def on_epoch_end(self, args, state, control, **kwargs):  # after the evaluation
        self._ended = self._clock()

    on_save = on_evaluate = on_epoch_end

    def summary(self, num_steps: int) -> dict[str, float | None]:
        """Median seconds a step, and those of all steps, on a CPU processor time. `None` if no step was made."""
        seconds = num_steps * statistics.fmean(self.costs) if self.costs else None
        return {"seconds_per_step": statistics.median(self.seconds or [None]), "training_seconds": seconds}


class RunFacts(NamedTuple):
    """The facts of a run: `known` and `new` to train on, and those that are `asked`, by the name of their set."""

    known: Dataset
    new: Dataset
    asked: dict[str, Dataset]


def train_variant(
    variant: Variant,
    setup: StudySetup,
    folder: Path,
    facts: Callable[[Path], RunFacts],
    *,
    num_steps: int | None = None,
    eval_epochs: int = 1,
    before: bool = True,
    keep_model: bool = True,
    earlier: Path | None = None,
) -> VariantResult:
    """
    Trains a variant unless `folder` already holds its result. A killed run goes on from its last complete checkpoint.

    The folder gets `accuracy.jsonl` (what was answered, from before the first step to the end), `training.json`
    (settings, cost, the trainer's log) and, with `keep_model`, the model and its card. A `ValueError` if the
    configuration asks for a push.

    Args:
        variant ([`Variant`]): What to train.
        setup ([`StudySetup`]): What all runs share.
        folder (`Path`): Where the result goes.
        facts (`Callable[[Path], RunFacts]`): Makes the facts, if the run has to be made. It may write into its folder.
        num_steps (`int`, *optional*): Optimizer steps. By default the epochs of the configuration decide.
        eval_epochs (`int`, *optional*, defaults to `1`): Epochs from one evaluation to the next; 0: the end only.
        before (`bool`, *optional*, defaults to `True`): Whether to ask before the first step.
        keep_model (`bool`, *optional*, defaults to `True`): Whether to keep the model that training ends with.
        earlier (`Path`, *optional*): Folder of the run that `setup.start` comes from, with the same facts asked. Its
            last evaluation is the first one here.
    """
    if setup.config.push_to_hub:
        command = f"trl-selfdistill publish --checkpoints {folder} --repo_id your-name/my-model"
        raise ValueError(f"`push_to_hub` would publish an unfinished run. Leave it unset, and later run {command}")
    config = training_config(variant, setup.config, num_steps)
    keep_model |= run_arguments(folder).get("keep_model", False)  # what is there has all that is asked for
    identity, inputs = model_identity(setup.start, setup.model_args)
    settings = config.to_dict() | (_FORMER if isinstance(config, SelfDistillSFTConfig) else {})
    inputs += [path for name in _INPUTS if (path := settings.get(name)) and Path(path).exists()]
    arguments = {
        "trainer": variant.trainer_class.__name__,
        "config": {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT},
        "adapter": adapter_arguments(setup.model_args),
        "about": {"variant": variant.name, **variant.about},
        "asked": {"before": before, "eval_epochs": eval_epochs},
        "keep_model": keep_model,
        **identity,
    }

    def work(partial: Path) -> None:
        config.output_dir, records = os.fspath(partial), partial / RECORDS_FILE
        run_facts = facts(partial)
        trainer = _make_trainer(variant, setup, config, run_facts)
        checkpoint = last_complete_checkpoint(partial)
        if earlier is not None and checkpoint is None and trainer.is_world_process_zero():
            last = read_records(earlier / RECORDS_FILE)[-1]
            write_records(records, [last._replace(step=0, epoch=0.0)])
        trainer.add_callback(FactAccuracyCallback(trainer, run_facts.asked, records, eval_epochs, before))
        if variant.prepare is not None:
            variant.prepare(trainer, partial)
        trainer.add_callback(times := StepTimes())
        with label_positions_only():  # in every run, so that their seconds a step can be compared
            trainer.train(resume_from_checkpoint=checkpoint)
        if keep_model:
            trainer.save_model()
        if trainer.is_world_process_zero():
            write_json(partial / TRAINING_FILE, _describe_run(trainer, variant, setup, run_facts, times))
            if setup.base is not None:
                shutil.copyfile(setup.base, partial / BASE_FILE)
            for path in [*partial.glob("checkpoint-*"), *partial.glob("_*")]:  # optimizers, teachers, caches
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if keep_model:
                result = read_result(partial)._replace(name=folder.name)
                with warn_without(partial / CARD_FILE):
                    write_model_card(result, [result], partial)  # a report adds the other variants
            else:
                (partial / CARD_FILE).unlink(missing_ok=True)

    return read_result(run_stage(folder, arguments, [setup.mix, *inputs], work, every_process=True))


def _make_trainer(variant: Variant, setup: StudySetup, config: TrainingArguments, facts: RunFacts) -> Trainer:
    config.model_init_kwargs = None  # `SFTTrainer` is handed the model
    model, tokenizer = setup.load()
    known, new = (part.select_columns(["prompt", "completion"]) for part in (facts.known, facts.new))
    rows = concatenate_datasets([known, new])
    if variant.rows is not None:
        num_rows = rows_per_step(config) * max(config.max_steps, 0)
        rows = variant.rows(known, new, num_rows, random.Random(config.seed))
    options = {} if hasattr(model, "peft_config") else {"peft_config": get_peft_config(setup.model_args)}
    if getattr(config, "anchors", None):  # which may not be among them
        options["eval_dataset"] = {k: part for k, part in facts.asked.items() if k not in ("known", "new")}
    options |= variant.trainer_arguments
    if callable(options.get("peft_config")):
        options["peft_config"] = options["peft_config"](model, tokenizer, known)
    return variant.trainer_class(model, config, train_dataset=rows, processing_class=tokenizer, **options)


def _describe_run(trainer: Trainer, variant: Variant, setup: StudySetup, facts: RunFacts, times: StepTimes) -> dict:
    """What the report and the model card say of a run, beside its accuracy."""
    training = describe_training(trainer)
    trained_on = {name: part for name, part in (("known", facts.known), ("new", facts.new)) if len(part)}
    return {
        **training,
        **times.summary(training["num_steps"]),
        "label": variant.title,
        "about": variant.about,
        "started_from": Path(setup.start).name if (Path(setup.start) / TRAINING_FILE).is_file() else None,
        "mix": run_arguments(setup.mix),
        "splits": [*trained_on],
        "composition": count_categories(trained_on),
        "rows_per_step": rows_per_step(trainer.args),
        "log_history": trainer.state.log_history,
    }


def training_config(variant: Variant, shared: TrainingArguments, num_steps: int | None = None) -> TrainingArguments:
    """The `shared` configuration with the changes of a variant, and `num_steps` of SFT in place of its epochs."""
    changes = dict(variant.changes)
    if num_steps is not None:
        changes["max_steps"] = max(1, round(num_steps * variant.steps))
    changes["learning_rate"] = changes.get("learning_rate", shared.learning_rate) * variant.rate
    return copy_config(shared, _CONFIGS.get(variant.trainer_class, SFTConfig), **changes)


def steps_of_epochs(num_rows: int, config: TrainingArguments) -> int:
    """The optimizer steps of the configured epochs over `num_rows`."""
    return max(1, round(config.num_train_epochs * -(-num_rows // rows_per_step(config))))
