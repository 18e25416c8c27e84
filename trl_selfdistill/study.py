# SPDX-License-Identifier: Apache-2.0
"""The stages of the study, each from a file or folder to another (see `stage`).

model -> facts -> annotated -> mix -> stage1 -> one folder for each arm -> report
"""

import json
import logging
import math
import os
import shutil
import statistics
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .fact_accuracy import FactAccuracyCallback, read_records, write_records
from .facts import load_facts, save_facts
from .geonames import geonames_facts, known_place_names
from .models import EMBEDDED_MODEL, load_model_and_tokenizer, save_embedded_model
from .slick import SLICK_COLUMNS, annotate_facts
from .stage import run_stage
from .study_arguments import ModelAndFactsArguments, SlickArguments
from .training_mix import SPLITS, MixSettings, build_training_mix


logger = logging.getLogger(__name__)

FACTS_FILE = "facts.jsonl"
RECORDS_FILE = "accuracy.jsonl"
TRAINING_FILE = "training.json"
GEONAMES = "geonames"
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
}


def model_stage(name_or_path: str, folder: Path) -> str:
    """The model to load by: `name_or_path`, or the folder that the embedded model was written to."""
    if name_or_path != EMBEDDED_MODEL:
        return name_or_path
    return os.fspath(run_stage(folder, {"model": EMBEDDED_MODEL}, [], save_embedded_model))


def facts_stage(arguments: ModelAndFactsArguments, folder: Path) -> Path:
    """Writes the facts to ask about to `folder/facts.jsonl`, and returns that file."""

    def work(partial: Path) -> None:
        relations = arguments.fact_relations
        if arguments.facts == GEONAMES:
            facts = geonames_facts(relations, arguments.max_facts_per_relation, arguments.max_facts_per_answer)
        else:
            facts = _limited(load_facts(arguments.facts, arguments.facts_split), arguments)
        save_facts(facts, partial / FACTS_FILE)

    settings = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name != "model_name_or_path"}
    inputs = [arguments.facts] if Path(arguments.facts).exists() else []
    return run_stage(folder, settings, inputs, work) / FACTS_FILE


def _limited(facts: Dataset, arguments: ModelAndFactsArguments) -> Dataset:
    """The facts of the wanted relations, in their order, up to the limits of each relation and answer."""
    relations = arguments.fact_relations or list(dict.fromkeys(facts["relation"]))
    if missing := set(relations) - set(facts["relation"]):
        raise ValueError(
            f"`fact_relations` asks for {', '.join(sorted(missing))}, which {arguments.facts} does not have. It has: "
            f"{', '.join(sorted(set(facts['relation'])))}."
        )
    per_relation, per_answer, kept = {}, {}, []
    for row, (relation, answer) in enumerate(zip(facts["relation"], facts["answer"], strict=True)):
        if relation not in relations:
            continue
        counts = per_relation.get(relation, 0), per_answer.get((relation, answer), 0)
        limits = arguments.max_facts_per_relation, arguments.max_facts_per_answer
        if any(limit is not None and count >= limit for count, limit in zip(counts, limits, strict=True)):
            continue
        per_relation[relation], per_answer[relation, answer] = counts[0] + 1, counts[1] + 1
        kept.append(row)
    return facts.select(kept)


def annotate_stage(
    model: str, facts: Path, slick: SlickArguments, folder: Path, bf16: bool = False, seed: int = 0
) -> Path:
    """Asks `model` the facts and writes them with their SLiCK category to `folder/facts.jsonl`; returns that file."""
    settings = slick.settings(seed)

    def work(partial: Path) -> None:
        language_model, tokenizer = load_model_and_tokenizer(model)
        language_model.to(PartialState().device)
        with torch.autocast(language_model.device.type, torch.bfloat16, enabled=bf16):
            annotated = annotate_facts(
                load_facts(facts),
                language_model,
                tokenizer,
                settings,
                batch_size=slick.slick_batch_size,
                progress_file=partial / "progress.jsonl",
            )
        save_facts(annotated, partial / FACTS_FILE)

    arguments = {"model": model, "slick": asdict(settings), "bf16": bf16, "batch_size": slick.slick_batch_size}
    inputs = [facts, model] if Path(model).is_dir() else [facts]
    return run_stage(folder, arguments, inputs, work) / FACTS_FILE


def mix_stage(annotated: Path, settings: MixSettings, folder: Path, seed: int = 0) -> Path:
    """Writes the splits `known`, `new` and `heldout` as JSONL files to `folder`, and returns it."""

    def work(partial: Path) -> None:
        facts = load_facts(annotated)
        places = known_place_names() if {"P17", "P131"} & set(facts["relation"]) else ()
        for name, split in build_training_mix(facts, settings, seed, exclude=places).items():
            save_facts(split, partial / f"{name}.jsonl")

    return run_stage(folder, {"mix": asdict(settings), "seed": seed}, [annotated], work)


def load_mix(folder: Path) -> dict[str, Dataset]:
    """The splits of a mix by name."""
    return {name: load_facts(Path(folder) / f"{name}.jsonl") for name in SPLITS}


def train_stage(
    trainer_class: type[Trainer],
    config: TrainingArguments,
    model: str,
    mix: Path,
    splits: tuple[str, ...],
    folder: Path,
    records_from: Path | None = None,
) -> Path:
    """
    Trains `model` on the mix's `splits`, evaluating every split each epoch; a killed run goes on from its last checkpoint.

    Args:
        trainer_class (`type[Trainer]`):
            `SFTTrainer` or a subclass of it.
        config ([`~transformers.TrainingArguments`]):
            Its configuration. `output_dir` is set to `folder`.
        model (`str`):
            Hub id or folder of the model to start from.
        mix (`Path`):
            Folder of [`mix_stage`].
        splits (`tuple[str, ...]`):
            Splits to train on.
        folder (`Path`):
            Where the checkpoint goes, with `accuracy.jsonl` and `training.json`.
        records_from (`Path`, *optional*):
            Folder of an earlier training stage that `model` comes from; its last evaluation is the first of this one.
    """
    explicit = {k: v for k, v in config.to_dict().items() if k not in _WITHOUT_EFFECT}
    arguments = {"trainer": trainer_class.__name__, "model": model, "splits": list(splits), "config": explicit}
    inputs = [mix, model] if Path(model).is_dir() else [mix]

    def work(partial: Path) -> None:
        _train(trainer_class, config, model, load_mix(mix), splits, partial, records_from)

    return run_stage(folder, json.loads(json.dumps(arguments, default=str)), inputs, work, every_process=True)


def _train(trainer_class, config, model, mix, splits, folder: Path, records_from: Path | None) -> None:
    config.output_dir = os.fspath(folder)
    language_model, tokenizer = load_model_and_tokenizer(model)
    train_dataset = concatenate_datasets([mix[name].select_columns(["prompt", "completion"]) for name in splits])
    trainer = trainer_class(language_model, config, train_dataset=train_dataset, processing_class=tokenizer)
    records_file, timer = folder / RECORDS_FILE, StepTimer()
    checkpoint = get_last_checkpoint(folder)
    if records_from is not None and checkpoint is None and trainer.is_world_process_zero():
        write_records(records_file, [read_records(records_from / RECORDS_FILE)[-1]._replace(step=0, epoch=0.0)])
    trainer.accelerator.wait_for_everyone()
    trainer.add_callback(FactAccuracyCallback(trainer, mix, records_file))
    trainer.add_callback(timer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    parameters = list(trainer.model.parameters())
    training = {
        "trainer": trainer_class.__name__,
        "seconds_per_step": timer.median(),
        "num_steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "kl_weight": getattr(config, "kl_weight", None),
        "temperature": getattr(config, "temperature", None),
        "log_history": trainer.state.log_history,
    }
    (folder / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob("checkpoint-*"):  # they hold the optimizer; the model is saved
        shutil.rmtree(path)


class StepTimer(TrainerCallback):
    """Measures the seconds of each optimizer step, without evaluation and saving."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)

    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds) if self.seconds else math.nan
